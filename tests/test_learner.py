import pytest
import torch

from dit import ema
from dit.alignment import AlignmentConfig, new_projector
from dit.learner import Learner
from dit.model import DiT, ModelConfig

BIAS = "final_layer.linear.bias"


@pytest.fixture
def network():
    torch.manual_seed(0)
    return DiT(ModelConfig("custom", 2, 8, 1, 2), input_size=4, in_channels=2, num_classes=3)


def projector():
    return new_projector(8, AlignmentConfig(weight=0.5, projector_size=4), 6, seed=0)


def give_gradients(learner, scale=1.0, aligned=True):
    learner.forget_gradients()
    for number, weight in enumerate(learner.weights):
        weight.grad = scale * torch.ones_like(weight) * (number + 1)
    for weight in learner.projector.parameters() if learner.projector is not None and aligned else ():
        weight.grad = torch.ones_like(weight)


def test_every_tensor_has_its_name_and_is_the_one_that_learns(network):
    learner = Learner(network, power_ema=(0.1,), projector=projector())
    tensors = learner.tensors()
    names = [name for name, _ in network.named_parameters()]
    extra = [f"align.{name}" for name, _ in learner.projector.named_parameters()]
    expected = {f"{kind}.{name}" for kind in ("model", "ema", "power.0.1", "exp_avg", "exp_avg_sq") for name in names}
    expected |= {*extra, *(f"{kind}.{name}" for kind in ("exp_avg", "exp_avg_sq") for name in extra)}
    assert tensors.keys() == expected | {"adam.count", "adam.align.count"}
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    give_gradients(learner)
    learner.update(0.1)
    learner.average(0, 0.9)
    still = {name for name, tensor in tensors.items() if torch.equal(tensor, before[name])}
    assert not still and tensors["adam.count"] == tensors["adam.align.count"] == 1


def test_the_norm_is_told_before_it_is_held_down(network):
    learner = Learner(network)
    give_gradients(learner)
    squares = sum((number + 1) ** 2 * weight.numel() for number, weight in enumerate(learner.weights))
    norm, applied = learner.update(0.0, grad_clip=0.5)
    assert applied.item() is True and norm.item() == pytest.approx(squares**0.5, rel=1e-6)
    held = torch.cat([weight.grad.flatten() for weight in learner.weights]).norm()
    assert held.item() == pytest.approx(0.5, rel=1e-5)


def test_the_norm_counts_the_projector_while_it_learns_and_then_it_stays(network):
    learner = Learner(network, projector=projector())
    give_gradients(learner)
    aligned, _ = learner.update(0.1)
    give_gradients(learner, aligned=False)
    before = [weight.clone() for weight in learner.projector.parameters()]
    plain, _ = learner.update(0.1)
    count = sum(weight.numel() for weight in before)
    assert aligned.item() ** 2 - plain.item() ** 2 == pytest.approx(count, rel=1e-2)
    assert all(torch.equal(a, b) for a, b in zip(before, learner.projector.parameters(), strict=True))
    assert learner.tensors()["adam.align.count"] == 1 and learner.tensors()["adam.count"] == 2


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan, 1e30])  # the last one's square is infinite
@pytest.mark.parametrize("grad_clip", [0.0, 1.0])
def test_one_bad_number_and_no_weight_changes(network, bad, grad_clip):
    learner = Learner(network, projector=projector())
    give_gradients(learner)
    learner.update(0.1)
    before = {name: tensor.clone() for name, tensor in learner.tensors().items()}
    give_gradients(learner)
    learner.weights[3].grad.view(-1)[0] = bad
    _, applied = learner.update(0.1, grad_clip)
    assert applied.item() is False
    assert all(torch.equal(tensor, before[name]) for name, tensor in learner.tensors().items())


def test_averages_are_of_the_weights_at_each_step(network):
    learner = Learner(network, power_ema=(0.1,))
    weights = [network.get_parameter(BIAS).detach().double().clone()]
    for step in range(6):
        give_gradients(learner)
        learner.update(0.1 * (step + 1))
        learner.average(step, 0.8)
        weights.append(network.get_parameter(BIAS).detach().double().clone())
    plain = weights[0]
    for weight in weights[1:]:
        plain = 0.8 * plain + 0.2 * weight
    torch.testing.assert_close(learner.tensors()[f"ema.{BIAS}"].double(), plain, rtol=1e-5, atol=1e-7)
    edges = (torch.arange(7, dtype=torch.float64) / 6) ** (ema.gamma_of(0.1) + 1)
    power = edges.diff() @ torch.stack(weights[1:])
    torch.testing.assert_close(learner.tensors()[f"power.0.1.{BIAS}"].double(), power, rtol=1e-5, atol=1e-7)


def test_the_averaged_network_is_another_one_with_the_average_as_weights(network):
    learner = Learner(network)
    give_gradients(learner)
    learner.update(0.1)
    learner.average(0, 0.5)
    average = learner.averaged_network()
    assert not average.training and not any(weight.requires_grad for weight in average.parameters())
    for name, weight in average.named_parameters():
        assert torch.equal(weight, learner.tensors()[f"ema.{name}"])
    learner.average(1, 0.0)
    assert not torch.equal(average.get_parameter(BIAS), learner.tensors()[f"ema.{BIAS}"])
