import pytest
import torch

from dit.diffusion import Diffusion, linear_betas, respace, space_timesteps
from dit.sampling import ancestral, ddim, euler, guided, heun

CHAIN = respace(Diffusion(linear_betas()), space_timesteps(1000, "50"))


def recorded(noise):
    steps = iter(noise)
    return lambda: next(steps)


@torch.no_grad()
@pytest.mark.parametrize("clip", [False, True])
def test_ancestral_equals_the_recorded_trajectory(golden_network, clip):
    network, g = golden_network("gaussian_sample_50")
    kind = "p_sample_clip" if clip else "p_sample"
    x = ancestral(guided(network, g["y"], 10, 1), g["z"], CHAIN, recorded(g[f"{kind}.noise"]), clip)
    expected = g[f"{kind}.final"]
    assert (x - expected).abs().max() <= 2e-5 * expected.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("clip", [False, True])
def test_ddim_equals_the_recorded_trajectory(golden_network, clip):
    network, g = golden_network("gaussian_sample_50")
    x = ddim(guided(network, g["y"], 10, 1), g["z"], CHAIN, clip)
    expected = g["ddim_eta0_clip.final" if clip else "ddim_eta0.final"]
    assert (x - expected).abs().max() <= 2e-5 * expected.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("solver", [euler, heun])
def test_ode_solvers_equal_the_reference(golden_network, solver):
    network, g = golden_network("sit_ode")
    x = solver(guided(network, g["y"], 10, 1), g["z"], torch.linspace(0, 1, 11))
    expected = g[f"Linear.velocity.{'euler' if solver is euler else 'heun2'}.n11.final"]
    assert (x - expected).abs().max() <= 1e-5 * expected.abs().max()


@torch.no_grad()
def test_guidance_mixes_both_predictions_in_one_call(golden_network):
    network, g = golden_network("dit_forward_p2")
    x, y, t = g["in.x"], torch.tensor([1, 2, 3, 4]), torch.tensor(17)
    calls = []
    network.register_forward_hook(lambda *_: calls.append(1))
    mixed = guided(network, y, 10, 2.5)(x, t)
    assert len(calls) == 1
    cond = network(x, t.expand(4), y)
    uncond = network(x, t.expand(4), torch.full((4,), 10))
    torch.testing.assert_close(mixed[:, :4], uncond[:, :4] + 2.5 * (cond - uncond)[:, :4], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mixed[:, 4:], cond[:, 4:], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_guidance_equals_the_reference_where_the_conventions_agree(golden_network):
    """The published guidance leaves the fourth latent channel alone; the first three are the same."""
    network, g = golden_network("dit_forward_p2")
    for i in range(len(g["cfg.x"]) // 2):
        x, y, t = g["cfg.x"][i : i + 1], g["cfg.y"][i : i + 1], g["cfg.t"][i]
        for scale in (1.0, 1.5, 4.0):
            ours = guided(network, y, 10, scale)(x, t)
            torch.testing.assert_close(ours[:, :3], g[f"out.cfg_{scale}"][i : i + 1, :3], atol=5e-5, rtol=1e-5)


@pytest.mark.parametrize("solver,order", [(euler, 1), (heun, 2)])
def test_ode_solvers_converge_at_their_order(solver, order):
    """dx/dt = (m - x)/(t - 2) is solved by a straight line towards m; dx/dt = x cos t by exp(sin t)."""
    x = torch.ones(3, 1, 1, 1, dtype=torch.float64)
    exact = torch.tensor(1.0, dtype=torch.float64).sin().exp()
    errors = [
        (solver(lambda x, t: x * t.cos(), x, torch.linspace(0, 1, n + 1, dtype=torch.float64)) - exact).abs().max()
        for n in (20, 40)
    ]
    assert torch.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.1)


def test_gaussian_data_is_drawn_with_its_mean_and_spread():
    """Data N(2, 0.5^2): the exact velocity of the linear path moves N(0, 1) onto it."""
    mean, spread = 2.0, 0.5

    def velocity(x, t):
        variance = (t * spread) ** 2 + (1 - t) ** 2
        gain = (t * spread**2 - (1 - t)) / variance
        return mean + gain * (x - t * mean)

    generator = torch.Generator().manual_seed(0)
    x = heun(velocity, torch.randn(20000, 1, 1, 1, generator=generator), torch.linspace(0, 1, 101))
    assert x.mean().item() == pytest.approx(mean, abs=0.02)
    assert x.std().item() == pytest.approx(spread, rel=0.02)


def test_ancestral_draws_gaussian_data_with_its_mean_and_spread():
    mean, spread = 0.5, 0.3
    chain = Diffusion(linear_betas())
    bars = Diffusion(linear_betas()).alphas_bar

    def model(x, t):
        bar = bars[t].float()
        gain = bar.sqrt() * spread**2 / (bar * spread**2 + 1 - bar)
        clean = mean + gain * (x - bar.sqrt() * mean)
        eps = (x - bar.sqrt() * clean) / (1 - bar).sqrt()
        return torch.cat([eps, torch.full_like(eps, -1.0)], dim=1)

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5000, 1, 1, 1, generator=generator)
    x = ancestral(model, x, chain, lambda: torch.randn(x.shape, generator=generator))
    assert x.mean().item() == pytest.approx(mean, abs=0.02)
    assert x.std().item() == pytest.approx(spread, rel=0.03)
