import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit.denoising import ddim
from dit.diffusion import DiffusionConfig, chain
from dit.solvers import quadratic_steps, solve

SPREAD = torch.tensor([0.1, 0.3, 1.0, 2.0]).view(1, 4, 1, 1)  # of Gaussian data, one for each channel
START = torch.randn(64, 4, 1, 1, generator=torch.Generator().manual_seed(0))
NAMES = ("dpmpp", "unipc")


def gaussian_model(config):
    """The exact prediction for data N(0, SPREAD^2), and variance channels that nobody should read."""
    bars = chain(config).alphas_bar

    def model(x, t):
        bar = bars[t].float()
        variance = bar * SPREAD**2 + 1 - bar
        eps, clean = x * (1 - bar).sqrt() / variance, x * bar.sqrt() * SPREAD**2 / variance
        v = bar.sqrt() * eps - (1 - bar).sqrt() * clean
        output = {"epsilon": eps, "x": clean, "v": v}[config.prediction]
        return torch.cat([output, torch.full_like(x, torch.nan)], dim=1)

    return model


def error(x, config):
    """Root mean square of each channel's distance from the exact flow's end, relative to the channel's spread."""
    bar = chain(config).alphas_bar[-1].float()
    exact = START * SPREAD / (bar * SPREAD**2 + 1 - bar).sqrt()
    return ((x - exact) / SPREAD).square().mean(dim=0).sqrt().flatten()


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("name", NAMES)
def test_twenty_steps_are_nearer_the_exact_flow_than_ddims(name, schedule):
    config = DiffusionConfig(schedule=schedule)
    ours = error(solve(name, gaussian_model(config), START, config, 20), config)
    by_ddim = error(ddim(gaussian_model(config), START, chain(config, "20")), config)
    assert (ours < by_ddim).all() and ours.mean() < 0.5 * by_ddim.mean(), (ours, by_ddim)
    if schedule == "linear":
        assert (ours < 0.2 * by_ddim).all(), (ours, by_ddim)


@pytest.mark.parametrize("name", NAMES)
def test_solvers_converge_at_second_order(name):
    """Of the coarser channels: the chain ends at noise 0.01, and its last leap costs the finest 0.5% at any number."""
    config, model = DiffusionConfig(), gaussian_model(DiffusionConfig())
    errors = [error(solve(name, model, START, config, n), config)[1:].norm().item() for n in (15, 30, 60)]
    assert errors[0] / errors[1] > 3 and errors[1] / errors[2] > 3, errors


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("name", NAMES)
def test_solvers_agree_on_equal_networks_in_other_parameterisations(name, schedule):
    drawn = []
    for prediction in ("epsilon", "x", "v"):
        config = DiffusionConfig(schedule=schedule, prediction=prediction, variance="fixed_large")
        drawn.append(solve(name, gaussian_model(config), START, config, 12))
    torch.testing.assert_close(drawn[1], drawn[0], rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(drawn[2], drawn[0], rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("num_steps", [1, 2, 3, 7])
@pytest.mark.parametrize("name", NAMES)
def test_the_model_is_asked_once_a_step_from_the_noisiest(name, num_steps):
    config, seen = DiffusionConfig(), []
    exact = gaussian_model(config)
    x = solve(name, lambda x, t: seen.append(t) or exact(x, t), START, config, num_steps)
    assert [t.item() for t in seen] == quadratic_steps(num_steps) and seen[0].shape == ()
    assert x.shape == START.shape and x.dtype == torch.float32 and x.isfinite().all()


def test_unknown_solvers_and_impossible_steps_are_refused():
    with pytest.raises(ValueError, match="use dpmpp or unipc"):
        solve("euler", gaussian_model(DiffusionConfig()), START, DiffusionConfig(), 5)
    for num_steps in (0, 1001):
        with pytest.raises(ValueError, match="num_steps must be 1 to 1000"):
            solve("unipc", gaussian_model(DiffusionConfig()), START, DiffusionConfig(), num_steps)


@settings(max_examples=50, deadline=None)
@given(num_steps=st.integers(2, 1000))
def test_quadratic_steps_are_different_and_reach_both_ends(num_steps):
    steps = quadratic_steps(num_steps)
    assert steps[0] == 999 and steps[-1] == 0 and len(steps) == num_steps
    gaps = [a - b for a, b in zip(steps[:-1], steps[1:], strict=True)]
    assert min(gaps) >= 1 and all(b <= a + 1 for a, b in zip(gaps[:-1], gaps[1:], strict=True))
