import json
from pathlib import Path

import pytest
import torch
from gaussian_flow import GaussianFlow

from dit import stochastic
from dit.sampling import guided
from dit.stochastic import diffusion_coefficient, last_step, sde, sde_euler, sde_heun, sde_interval, sde_times
from dit.transport import PATHS, TransportConfig, score_gain

NAMES = {"linear": "Linear", "gvp": "GVP", "vp": "VP"}
FORMS = ("constant", "sbdm", "sigma", "linear", "decreasing", "increasing_decreasing", "kl", "kl_eta")
PUBLISHED = {"sbdm": "SBDM", "increasing_decreasing": "inccreasing-decreasing"}
METHODS = {"euler": sde_euler, "heun": sde_heun}
path = pytest.mark.parametrize("path", NAMES)
form = pytest.mark.parametrize("form", FORMS)


def recorded(noise):
    steps = iter(noise)
    return lambda: next(steps)


def drawn(model, config, z, noise, *, form, last, method):
    """The reference's drawing: 8 noisy steps and a last one of 0.04."""
    size = 0.0 if last == "none" else 0.04
    setting = {"form": form, "last_step": last, "last_step_size": size, "method": method}
    times = sde_times(config, 8 if last == "none" else 9, **setting)
    x = METHODS[method](*sde(model, config, 4, form), z, times, recorded(noise))
    return last_step(last, model, config, 4, form)(x, times[-1], size)


@path
@torch.no_grad()
def test_sdes_equal_the_reference(golden, golden_network, path):
    network, ode = golden_network("sit_ode")
    g, _ = golden("sit_sde")
    model = guided(network, ode["y"][:1], torch.tensor([10]), 1)
    ours = {told: name for name, told in PUBLISHED.items()}
    keys = [key for key in g if key.startswith(NAMES[path] + ".")]
    assert len(keys) >= 20
    for key in keys:
        _, prediction, told, last, method, _ = key.split(".")
        config = TransportConfig(path, prediction)
        how = {"form": ours.get(told, told), "last": last.lower(), "method": method.lower()}
        x = drawn(model, config, ode["z"][:1], g["noise"], **how)
        assert (x - g[key]).abs().max() <= 1e-5 * g[key].abs().max(), key


@torch.no_grad()
def test_a_guided_sde_equals_the_reference(golden, golden_network):
    network, ode = golden_network("sit_ode")
    g, _ = golden("sit_sde")
    model = guided(network, ode["y"][:1], torch.tensor([10]), 4.0, channels=3)
    found = [
        drawn(model, TransportConfig(), ode["z"][:1], g["cfg4.noise"], form=form, last="mean", method="euler")
        for form in ("sigma", "linear")
    ]
    for x in found:  # the two forms are one on the linear path
        assert (x - g["cfg4.final"]).abs().max() <= 1e-5 * g["cfg4.final"].abs().max()


@path
def test_coefficients_equal_the_reference(golden, path):
    g, _ = golden("sit_transport_terms")
    t = g["t_grid"]
    for form in FORMS[:6]:
        for norm in (1.0, 0.7):
            expected = g[f"{NAMES[path]}.diffusion.{PUBLISHED.get(form, form)}.norm{norm}"][:, 0]
            found = diffusion_coefficient(form, t, path, norm)
            last = form == "sigma" and path == "vp"  # the reference's sigma cancels at t = 0.999
            torch.testing.assert_close(found[:-1], expected[:-1], rtol=1e-5, atol=1e-7)
            torch.testing.assert_close(found[-1], expected[-1], rtol=2e-4 if last else 1e-5, atol=1e-7)


@path
def test_intervals_equal_the_reference(path):
    told = json.loads((Path(__file__).parent / "golden" / "sit_intervals.json").read_text())
    for prediction in ("velocity", "score", "noise"):
        config = TransportConfig(path, prediction)
        for form in ("sbdm", "sigma"):
            for size in (0.0, 0.04):
                expected = told[f"{NAMES[path]}.{prediction}"][f"sde.{PUBLISHED.get(form, form)}.last{size}"]
                if form == "sbdm" and path != "vp":
                    expected[0] = 1e-3  # the reference starts a velocity's at 0, where the coefficient is infinite
                assert sde_interval(config, form=form, last_step_size=size) == pytest.approx(tuple(expected))


def moments_of(data, prediction, form, method, num_steps):
    """Mean and variance (C, 1, 1) of the sampler's own law, without sampling: every step is linear in x and noise.

    Drawing number k has one unit of noise at step k, number 0 one spread of the start; the last has none.
    """
    config = data.config(prediction)
    times = sde_times(config, num_steps, form=form, last_step="none", method=method).double()
    mean, variance = data.moments(times[0])
    x = mean.expand(num_steps + 2, 2, 1, 1).clone()
    x[0] += variance.sqrt()
    units = (
        torch.eye(num_steps + 2, dtype=torch.float64)[1:-1]
        .view(num_steps, num_steps + 2, 1, 1, 1)
        .expand(-1, -1, 2, 1, 1)
    )
    x = METHODS[method](*sde(data.network(prediction), config, 2, form), x, times, recorded(units))
    return x[-1], (x[:-1] - x[-1]).square().sum(0), times[-1]


@path
@form
@pytest.mark.parametrize("method", METHODS)
def test_sdes_reach_mean_and_variance_of_gaussian_data(path, form, method):
    """With an error that halves when the steps double: 24 coefficients on paths, both methods."""
    data = GaussianFlow(path)
    errors = []
    for num_steps in (40, 80):
        mean, variance, t = moments_of(data, "velocity", form, method, num_steps)
        exact_mean, exact_variance = data.moments(t)
        errors.append(max((mean - exact_mean).abs().max(), (variance / exact_variance - 1).abs().max()))
    assert errors[1] < 0.04 and errors[1] < max(0.65 * errors[0], 2e-3)


@path
@pytest.mark.parametrize("prediction", ["score", "noise"])
def test_sdes_of_any_prediction_are_the_same(path, prediction):
    data = GaussianFlow(path)
    config, x = data.config(prediction), torch.randn(3, 2, 1, 1, dtype=torch.float64)
    drift, _ = sde(data.network(prediction), config, 2, "sigma")
    expected, _ = sde(data.network("velocity"), data.config("velocity"), 2, "sigma")
    for t in torch.tensor([0.1, 0.6], dtype=torch.float64):
        torch.testing.assert_close(drift(x, t), expected(x, t))


@path
def test_the_kl_coefficients_minimise_their_bounds(path):
    """SiT's bound, with w = 2 w_t and w^KL = 2 gain: (1 + w / w^KL)^2 / (2 w), plus eta w; each by its derivative."""
    t = torch.linspace(0.1, 0.9, 5, dtype=torch.float64)
    w_kl = 2 * score_gain(path, t)
    for form, eta in (("kl", 0.0), ("kl_eta", 0.3), ("kl_eta", 2.0)):
        w = (2 * diffusion_coefficient(form, t, path, eta or 1.0)).requires_grad_()
        bound = (1 + w / w_kl).square() / (2 * w) + eta * w
        (slope,) = torch.autograd.grad(bound.sum(), w)
        torch.testing.assert_close(slope, torch.zeros_like(slope), rtol=0, atol=1e-9)
    for other in (0.5, 2.0):
        w_t = w.detach() * other
        assert ((1 + w_t / w_kl).square() / (2 * w_t) + eta * w_t > bound).all()
    torch.testing.assert_close(
        diffusion_coefficient("kl", t, path, 0.7), diffusion_coefficient("sbdm", t, path, 0.7), rtol=0, atol=0
    )
    ends = diffusion_coefficient("kl_eta", torch.tensor([0.0, 0.999]), path)
    assert ends.isfinite().all() and (ends >= 0).all()


@path
@pytest.mark.parametrize("kind", ["mean", "euler", "tweedie"])
def test_last_steps_end_at_the_data(path, kind):
    """From the law at t = 1 - 0.04, mean and spread end within a hundredth of the data's; Tweedie is the expectation."""
    data = GaussianFlow(path, spreads=(1.0, 1.4))
    t = torch.tensor(0.96, dtype=torch.float64)
    mean, variance = data.moments(t)
    x = torch.stack([mean, mean + variance.sqrt()])
    step = last_step(kind, data.network("noise"), data.config("noise"), 2, "sigma")
    ended = step(x, t, 0.04)
    alpha_t, _, _, _ = PATHS[path](t)
    means, spreads = (torch.tensor(v, dtype=torch.float64)[:, None, None] for v in (data.means, data.spreads))
    if kind == "tweedie":
        torch.testing.assert_close(ended, means + alpha_t * spreads**2 * (x - mean) / variance)
    torch.testing.assert_close(ended[0], means, rtol=1e-2, atol=0)
    torch.testing.assert_close(ended[1] - ended[0], spreads, rtol=2e-2, atol=0)
    assert torch.equal(last_step("none", None, data.config("noise"), 2)(x, t, 0.04), x)


@path
@form
@pytest.mark.parametrize("method,last", [("euler", "mean"), ("heun", "tweedie"), ("euler", "none"), ("heun", "none")])
def test_evaluations_are_known_before_and_every_setting_is_finite(path, form, method, last):
    calls = []

    def model(x, t):
        calls.append(t)
        return torch.cat([x / 2, torch.full_like(x, torch.nan)], dim=1)  # learned sigma is not looked at

    config = TransportConfig(path)
    times = sde_times(config, 6, form=form, last_step=last, method=method)
    noise = recorded(torch.randn(6, 2, 4, 2, 2))
    x = METHODS[method](*sde(model, config, 4, form), torch.randn(2, 4, 2, 2), times, noise)
    x = last_step(last, model, config, 4, form)(x, times[-1], 0.04)
    noisy = 6 if last == "none" else 5
    assert len(times) == noisy + 1
    assert len(calls) == noisy * (2 if method == "heun" else 1) + 6 - noisy
    assert x.isfinite().all()


def test_samples_of_an_sde_spread_as_the_data():
    """The same once more by drawing: the law above takes the noise of each step for independent."""
    data, generator = GaussianFlow("linear"), torch.Generator().manual_seed(0)
    config, x = data.config("velocity"), torch.randn(20000, 2, 1, 1, generator=generator, dtype=torch.float64)
    times = sde_times(config, 40, last_step="mean").double()
    model = data.network("velocity")
    x = sde_heun(*sde(model, config, 2), x, times, lambda: torch.randn(x.shape, generator=generator).double())
    x = last_step("mean", model, config, 2)(x, times[-1], 0.04)
    assert x.mean(dim=(0, 2, 3)).tolist() == pytest.approx(data.means, abs=0.03)
    assert x.std(dim=(0, 2, 3)).tolist() == pytest.approx(data.spreads, rel=0.03)


@pytest.mark.parametrize(
    "setting,words",
    [
        ({"num_steps": 1}, "num_steps must be at least 2"),
        ({"num_steps": 9, "last_step_size": 0.0}, "last_step_size must be between 0 and 1"),
        ({"num_steps": 9, "last_step_size": 1.0}, "last_step_size must be between 0 and 1"),
        ({"num_steps": 0, "last_step": "none"}, "num_steps must be at least 1"),
    ],
)
def test_a_last_step_that_cannot_be_is_refused(setting, words):
    with pytest.raises(ValueError, match=words):
        stochastic.sde_times(TransportConfig(), **setting)
