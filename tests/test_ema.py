import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit.ema import decay_at, gamma_of, inner_products, mixture, power_decay_at, sigma_rel_of, update


@given(decay=st.floats(0, 1), values=st.lists(st.floats(-10, 10), min_size=1, max_size=20))
def test_average_equals_its_closed_form(decay, values):
    average = [torch.zeros(1, dtype=torch.float64)]
    for value in values:
        update(average, [torch.tensor([value], dtype=torch.float64)], decay)
    closed = sum((1 - decay) * decay ** (len(values) - 1 - i) * value for i, value in enumerate(values))
    assert average[0].item() == pytest.approx(closed, abs=1e-9)


def test_warmup_follows_the_young_run_and_ends_at_the_decay():
    assert decay_at(0, 0.9999, warmup=False) == 0.9999
    assert decay_at(0, 0.9999, warmup=True) == 0.1
    assert decay_at(10**7, 0.9999, warmup=True) == 0.9999


@given(st.floats(1e-3, 0.288))
@settings(max_examples=50)
def test_width_and_exponent_belong_together(sigma_rel):
    assert sigma_rel_of(gamma_of(sigma_rel)) == pytest.approx(sigma_rel, rel=1e-9)


def test_the_width_is_the_profiles_standard_deviation():
    """Figures that the paper gives: 5% is gamma 16.97, 10% is gamma 6.94."""
    assert gamma_of(0.05) == pytest.approx(16.97, abs=0.005) and gamma_of(0.10) == pytest.approx(6.94, abs=0.005)
    tau, gamma = torch.linspace(0, 1, 200_001, dtype=torch.float64), gamma_of(0.15)
    density = (gamma + 1) * tau**gamma
    mean = torch.trapezoid(density * tau, tau)
    variance = torch.trapezoid(density * (tau - mean) ** 2, tau)
    assert variance.sqrt().item() == pytest.approx(0.15, rel=1e-6)


@pytest.mark.parametrize("sigma_rel", [0, -0.1, 0.29, 1.0, float("nan")])
def test_a_width_that_no_power_function_has_is_refused(sigma_rel):
    with pytest.raises(ValueError, match="sigma_rel must be above 0 and below 0.2887"):
        gamma_of(sigma_rel)


def profile(step, sigma_rel, length):
    """The weight of each update's result in a power-function average: the density's integral over each unit of time."""
    edges = (torch.arange(length + 1, dtype=torch.float64) / step).clamp(max=1) ** (gamma_of(sigma_rel) + 1)
    return edges.diff()


def running(walk, sigma_rel):
    """All power-function averages along a walk (T, D), by their updates."""
    average, averages = walk[0] + 100, []  # what it was before does not count
    for step, weights in enumerate(walk):
        update([average], [weights], power_decay_at(step, gamma_of(sigma_rel)))
        averages.append(average.clone())
    return averages


@pytest.fixture(scope="module")
def walk():
    torch.manual_seed(0)
    return 10 + torch.randn(400, 50, dtype=torch.float64).cumsum(0)


@pytest.mark.parametrize("sigma_rel", [0.05, 0.2])
def test_the_updates_weigh_every_step_as_the_power_function_does(walk, sigma_rel):
    for step in (1, 7, 400):
        torch.testing.assert_close(running(walk, sigma_rel)[step - 1], profile(step, sigma_rel, 400) @ walk)


def test_inner_products_are_the_integrals():
    steps, gammas = torch.tensor([100.0, 250.0, 250.0]), torch.tensor([3.0, 17.0, 0.5])
    tau = torch.linspace(0, 250, 500_001, dtype=torch.float64)
    densities = [
        torch.where(tau <= t, (g + 1) * tau**g / t ** (g + 1), 0) for t, g in zip(steps.double(), gammas, strict=True)
    ]
    numeric = torch.tensor([[torch.trapezoid(a * b, tau) for b in densities] for a in densities])
    torch.testing.assert_close(inner_products(steps, gammas, steps, gammas), numeric.double(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("sigma_rel,most", [(0.04, 0.004), (0.08, 0.001), (0.12, 0.001), (0.18, 0.002)])
def test_another_width_is_rebuilt_from_the_kept_averages(walk, sigma_rel, most):
    kept = [(step, width) for width in (0.05, 0.1) for step in range(20, 401, 20)]
    averages = {width: running(walk, width) for width in (0.05, 0.1, sigma_rel)}
    factors, error = mixture(kept, 400, sigma_rel)
    rebuilt = sum(x * averages[width][step - 1] for x, (step, width) in zip(factors, kept, strict=True))
    wanted = averages[sigma_rel][-1]
    plain = (averages[0.1][-1] - wanted).norm() / (wanted - walk[-1]).norm()  # just taking a kept one
    assert factors.sum().item() == pytest.approx(1, abs=1e-12)
    assert (rebuilt - wanted).norm() / (wanted - walk[-1]).norm() < most < 0.05 * plain
    assert error < 0.02


def test_an_earlier_step_is_rebuilt_too_and_a_kept_average_is_given_back_exactly(walk):
    kept = [(step, width) for width in (0.05, 0.1) for step in range(20, 401, 20)]
    factors, error = mixture(kept, 240, 0.1)
    assert factors[kept.index((240, 0.1))].item() == pytest.approx(1, abs=1e-9) and error < 1e-6
    assert factors.abs().sum().item() == pytest.approx(1, abs=1e-8)
    upto = [(step, width) for step, width in kept if step <= 240]
    factors, _ = mixture(upto, 240, 0.07)
    averages = {width: running(walk, width) for width in (0.05, 0.1, 0.07)}
    rebuilt = sum(x * averages[width][step - 1] for x, (step, width) in zip(factors, upto, strict=True))
    assert (rebuilt - averages[0.07][239]).norm() < 4e-3 * (walk[239] - averages[0.07][239]).norm()


def test_what_cannot_be_rebuilt_well_says_so_and_keeps_constant_weights_as_they_are():
    factors, error = mixture([(400, 0.05), (400, 0.1)], 400, 0.25)
    assert error > 0.3 and factors.sum().item() == pytest.approx(1)
