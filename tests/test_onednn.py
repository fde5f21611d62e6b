import pytest
import torch

from dit.onednn import Linear, available, linear

pytestmark = pytest.mark.skipif(not available(), reason="no oneDNN for this processor, or in this torch")


def given(*shape, trained=True):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(*shape, 24), torch.randn(40, 24), torch.randn(40)
    return x.requires_grad_(trained), weight.requires_grad_(), bias.requires_grad_()


@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 3, 5)])
def test_a_product_has_the_gradients_of_torchs(shape):
    tensors = given(*shape)
    output, expected = Linear.apply(*tensors), torch.nn.functional.linear(*tensors)
    towards = torch.linspace(-1, 1, output.numel()).view_as(output)
    found = torch.autograd.grad(output, tensors, towards)
    told = torch.autograd.grad(expected, tensors, towards)
    for one, other in zip((output, *found), (expected, *told), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
        assert one.is_contiguous()  # a weight's gradient is taken over as it is, beside the weight's own memory


def test_gradients_that_come_as_a_view_are_taken_as_they_are():
    x, weight, bias = given(3, 5)
    torch.autograd.backward(Linear.apply(x, weight, bias), torch.ones(()).expand(3, 5, 40))
    torch.testing.assert_close(bias.grad, torch.full((40,), 15.0))
    torch.testing.assert_close(weight.grad, x.detach().sum((0, 1)).expand(40, 24))


def test_what_is_not_trained_gets_no_gradient():
    x, weight, bias = given(3, trained=False)
    Linear.apply(x, weight, bias).sum().backward()
    assert x.grad is None and weight.grad is not None


def test_gelu_is_its_tanh_form():
    x, weight, bias = (tensor.detach() for tensor in given(4))
    expected = torch.nn.functional.gelu(torch.nn.functional.linear(x, weight, bias), approximate="tanh")
    torch.testing.assert_close(linear(x, weight, bias, "gelu"), expected, rtol=1e-5, atol=1e-5)
