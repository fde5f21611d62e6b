import torch

from dit.transport import interpolate, linear_path, training_loss


def test_path_and_loss_equal_the_reference(golden):
    tensors, _ = golden("sit_transport_terms")
    x, noise, t = tensors["x1"], tensors["x0"], tensors["t"]
    x_t, target = interpolate(x, noise, t)
    torch.testing.assert_close(x_t, tensors["Linear.xt"], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(target, tensors["Linear.ut"], rtol=1e-5, atol=1e-7)
    loss = training_loss(lambda x_t, t, y: tensors["fake_out"], x, None, t, noise)
    torch.testing.assert_close(loss, tensors["Linear.velocity.None.loss"], rtol=1e-5, atol=1e-7)


def test_learned_sigma_channels_are_dropped(golden):
    tensors, _ = golden("sit_transport_terms")
    x, noise, t = tensors["x1"], tensors["x0"], tensors["t"]
    twice = torch.cat([tensors["fake_out"], torch.full_like(x, 1e6)], dim=1)
    loss = training_loss(lambda x_t, t, y: twice, x, None, t, noise)
    torch.testing.assert_close(loss, tensors["Linear.velocity.None.loss"], rtol=1e-5, atol=1e-7)


def test_the_velocity_is_the_derivative_of_the_path():
    x, noise, t, h = torch.randn(6, 2, 4, 4).double(), torch.randn(6, 2, 4, 4).double(), torch.rand(6).double(), 1e-6
    difference = (interpolate(x, noise, t + h)[0] - interpolate(x, noise, t - h)[0]) / (2 * h)
    torch.testing.assert_close(difference, interpolate(x, noise, t)[1], rtol=1e-6, atol=1e-8)
    alpha_t, sigma_t, _, _ = linear_path(torch.tensor([0.0, 1.0]))
    assert alpha_t.tolist() == [0, 1] and sigma_t.tolist() == [1, 0]
