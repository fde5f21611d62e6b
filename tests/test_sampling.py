from types import SimpleNamespace

import pytest
import torch
from gaussian_flow import GaussianFlow

from dit.sampling import dopri5, euler, guided, heun
from dit.transport import TransportConfig, interval, velocity_of

NAMES = {"linear": "Linear", "gvp": "GVP", "vp": "VP"}
FIXED = {"euler": euler, "heun2": heun}


@torch.no_grad()
@pytest.mark.parametrize("path", NAMES)
@pytest.mark.parametrize("prediction", ["velocity", "score", "noise"])
def test_ode_solvers_equal_the_reference(golden_network, path, prediction):
    network, g = golden_network("sit_ode")
    config = TransportConfig(path, prediction)
    velocity = velocity_of(guided(network, g["y"], 10, 1), config, 4)
    t0, t1 = interval(config)
    solvers = ["euler", "dopri5"] if prediction == "score" else ["euler", "heun2", "dopri5"]
    for name in solvers:
        if name == "dopri5":
            x = dopri5(velocity, g["z"], t0, t1, overshoot=True)
        else:
            x = FIXED[name](velocity, g["z"], torch.linspace(t0, t1, 11))
        expected = g[f"{NAMES[path]}.{prediction}.{name}.n11.final"]
        tolerance = 1e-4 if name == "dopri5" else 1e-5
        assert (x - expected).abs().max() <= tolerance * expected.abs().max(), name
    landed = dopri5(velocity, g["z"], t0, t1)  # within the solver's own tolerance of the other
    assert 0 < (landed - expected).abs().max() <= 2e-3 * expected.abs().max()


@torch.no_grad()
def test_reverse_guided_and_default_ode_equal_the_reference(golden_network):
    network, g = golden_network("sit_ode")
    plain, guide = guided(network, g["y"], 10, 1), guided(network, g["y"], torch.full((2,), 10), 4.0, channels=3)
    for key, x in {
        "euler.n11.reverse": euler(plain, g["z"], torch.linspace(1, 0, 11)),
        "euler.n11.cfg4": euler(guide, g["z"], torch.linspace(0, 1, 11)),
        "dopri5.n50_default": dopri5(plain, g["z"], 0, 1, rtol=1e-3, atol=1e-6, overshoot=True),
    }.items():
        expected = g[f"Linear.velocity.{key}.final"]
        tolerance = 1e-4 if "dopri5" in key else 1e-5
        assert (x - expected).abs().max() <= tolerance * expected.abs().max(), key


@torch.no_grad()
def test_guidance_mixes_both_predictions_in_one_call(golden_network):
    network, g = golden_network("dit_forward_p2")
    x, y, t = g["in.x"], torch.tensor([1, 2, 3, 4]), torch.tensor(17)
    calls = []
    network.register_forward_hook(lambda *_: calls.append(1))
    mixed = guided(network, y, torch.full_like(y, 10), 2.5)(x, t)
    assert len(calls) == 1
    cond = network(x, t.expand(4), y)
    uncond = network(x, t.expand(4), torch.full((4,), 10))
    torch.testing.assert_close(mixed[:, :4], uncond[:, :4] + 2.5 * (cond - uncond)[:, :4], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mixed[:, 4:], cond[:, 4:], rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("patches", ["p2", "p4"])
@pytest.mark.parametrize("scale", [1.0, 1.5, 4.0])
def test_guidance_of_three_channels_equals_the_reference(golden_network, scale, patches):
    network, g = golden_network(f"dit_forward_{patches}")
    for i in range(len(g["cfg.x"])):
        x, y, t = g["cfg.x"][i : i + 1], g["cfg.y"][i : i + 1], g["cfg.t"][i]
        expected = g[f"out.cfg_{scale}"][i : i + 1]
        ours = guided(network, y, torch.full_like(y, 10), scale, channels=3)(x, t)
        torch.testing.assert_close(ours, expected, atol=2e-5, rtol=1e-5)
        everything = guided(network, y, torch.full_like(y, 10), scale)(x, t)
        torch.testing.assert_close(everything[:, :3], expected[:, :3], atol=2e-5, rtol=1e-5)


def test_guidance_of_embeddings_keeps_to_its_interval():
    """A network that answers with the mean of its condition: 3 with it, 0 without."""
    sizes = []

    def network(x, t, y):
        sizes.append(len(x))
        assert t.shape == (len(x),) and y.shape == (len(x), 5, 6)
        return y.mean(dim=(1, 2)).view(-1, 1, 1, 1).expand_as(x)

    x, y = torch.zeros(2, 4, 3, 3), torch.full((2, 5, 6), 3.0)
    model = guided(network, y, torch.zeros_like(y), 2.0, interval=(0.25, 0.75))
    values = [model(x, torch.tensor(t)).mean().item() for t in (0.0, 0.25, 0.5, 0.75, 0.9)]
    assert values == [3, 6, 6, 6, 3] and sizes == [2, 4, 4, 4, 2]
    backwards = guided(
        network, y, torch.zeros_like(y), 2.0, interval=(0.0, 0.5), clock=lambda step: 1 - step / 999, channels=1
    )
    values = [backwards(x, torch.tensor(step)).mean(dim=(0, 2, 3)).tolist() for step in (999, 600, 400, 0)]
    assert values == [[6, 3, 3, 3], [6, 3, 3, 3], [3, 3, 3, 3], [3, 3, 3, 3]]
    sizes.clear()
    guided(network, y, torch.zeros_like(y), 1.0)(x, torch.tensor(0.5))
    assert sizes == [2]


@pytest.mark.parametrize("path", NAMES)
@pytest.mark.parametrize("solver,order", [(euler, 1), (heun, 2)])
def test_ode_solvers_converge_at_their_order_on_gaussian_data(path, solver, order):
    """A Gaussian's flow keeps quantiles: x goes to mean + sqrt(variance) times its standard score."""
    data, x = GaussianFlow(path), torch.linspace(-2, 2, 6, dtype=torch.float64).view(3, 2, 1, 1)
    t0, t1 = interval(data.config("velocity"))
    (mean, variance), (mean_1, variance_1) = data.moments(t0), data.moments(t1)
    exact = mean_1 + (variance_1 / variance).sqrt() * (x - mean)
    steps = (80, 160) if path == "vp" else (20, 40)  # VP's velocity is steep close to the data
    errors = [
        (solver(data.network("velocity"), x, torch.linspace(t0, t1, n + 1, dtype=torch.float64)) - exact).abs().max()
        for n in steps
    ]
    assert torch.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.2)


@pytest.mark.parametrize("path", NAMES)
@pytest.mark.parametrize("prediction", ["velocity", "score", "noise"])
def test_dopri5_keeps_to_its_tolerance_on_gaussian_data(path, prediction):
    data, x = GaussianFlow(path), torch.linspace(-2, 2, 6, dtype=torch.float64).view(3, 2, 1, 1)
    config = data.config(prediction)
    t0, t1 = interval(config)
    (mean, variance), (mean_1, variance_1) = data.moments(t0), data.moments(t1)
    exact = mean_1 + (variance_1 / variance).sqrt() * (x - mean)
    errors, evaluations, times = [], [], []
    for tolerance in (1e-3, 1e-7):
        calls = []

        def network(x, t, calls=calls):
            calls.append(t.item())
            return data.answer(prediction, x, t)

        drawn = dopri5(velocity_of(network, config, 2), x, t0, t1, rtol=tolerance, atol=tolerance)
        errors.append((drawn - exact).abs().max().item())
        evaluations.append(len(calls))
        times += calls
    assert errors[0] < 5e-2 and errors[1] < 5e-6 and evaluations[0] < evaluations[1]
    assert max(times) <= t1


def test_dopri5_says_where_it_cannot_be():
    with pytest.raises(ValueError, match="dopri5 needs float64, which mps does not have: use heun"):
        dopri5(None, SimpleNamespace(device=torch.device("mps")), 0.0, 1.0)
