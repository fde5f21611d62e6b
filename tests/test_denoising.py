import pytest
import torch

from dit.denoising import ancestral, ddim, ddim_reverse
from dit.diffusion import DiffusionConfig, chain
from dit.sampling import guided

CHAIN = chain(spacing="50")
SPREAD = torch.tensor([0.2, 0.6, 1.5]).view(1, 3, 1, 1)  # of Gaussian data, one for each channel


def recorded(noise):
    steps = iter(noise)
    return lambda: next(steps)


def watched(model, seen):
    """The model, keeping every x it is asked at."""
    return lambda x, t: seen.append(x) or model(x, t)


def gaussian_model(diffusion):
    """The exact prediction for data N(0, SPREAD^2), with variance channels that say: the posterior's."""
    config = diffusion.config
    bars = chain(DiffusionConfig(schedule=config.schedule)).alphas_bar

    def model(x, t):
        bar = bars[t].float()
        eps = x * (1 - bar).sqrt() / (bar * SPREAD**2 + 1 - bar)
        clean = x * bar.sqrt() * SPREAD**2 / (bar * SPREAD**2 + 1 - bar)
        v = bar.sqrt() * eps - (1 - bar).sqrt() * clean
        output = {"epsilon": eps, "x": clean, "v": v}[config.prediction]
        return torch.cat([output, torch.full_like(output, -1.0)], dim=1)

    return model


def spread_at(diffusion, step):
    """Of x_t of Gaussian data."""
    bar = diffusion.alphas_bar[step].float()
    return (bar * SPREAD**2 + 1 - bar).sqrt()


def plain(network, g):
    return lambda x, t: network(x, t.expand(len(x)), g["y"])


def assert_near(x, expected):
    assert (x - expected).abs().max() <= 2e-5 * expected.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("kind", ["p_sample", "p_sample_clip"])
def test_ancestral_equals_the_recorded_trajectory(golden_network, kind):
    network, g = golden_network("gaussian_sample_50")
    seen = []
    model = watched(plain(network, g), seen)
    x = ancestral(model, g["z"], CHAIN, recorded(g[f"{kind}.noise"]), clip=kind.endswith("clip"))
    assert_near(seen[25], g[f"{kind}.middle"])
    assert_near(x, g[f"{kind}.final"])


@torch.no_grad()
def test_guided_ancestral_equals_the_recorded_trajectory(golden_network):
    """The published guidance: scale 4 on the first three channels."""
    network, g = golden_network("gaussian_sample_50")
    seen = []
    model = watched(guided(network, g["y"], 10, 4.0, channels=3), seen)
    x = ancestral(model, g["z"], CHAIN, recorded(g["p_sample_cfg4.noise"]))
    assert_near(seen[25], g["p_sample_cfg4.middle"])
    assert_near(x, g["p_sample_cfg4.final"])


@torch.no_grad()
@pytest.mark.parametrize("kind", ["ddim_eta0", "ddim_eta0_clip", "ddim_eta1"])
def test_ddim_equals_the_recorded_trajectory(golden_network, kind):
    network, g = golden_network("gaussian_sample_50")
    seen = []
    noise = {"eta": 1.0, "noise": recorded(g[f"{kind}.noise"])} if kind == "ddim_eta1" else {}
    x = ddim(watched(plain(network, g), seen), g["z"], CHAIN, clip=kind.endswith("clip"), **noise)
    assert_near(seen[25], g[f"{kind}.middle"])
    assert_near(x, g[f"{kind}.final"])


def test_ancestral_draws_gaussian_data_with_its_mean_and_spread():
    mean, spread, diffusion = 0.5, 0.3, chain()

    def model(x, t):
        bar = diffusion.alphas_bar[t].float()
        gain = bar.sqrt() * spread**2 / (bar * spread**2 + 1 - bar)
        clean = mean + gain * (x - bar.sqrt() * mean)
        eps = (x - bar.sqrt() * clean) / (1 - bar).sqrt()
        return torch.cat([eps, torch.full_like(eps, -1.0)], dim=1)

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5000, 1, 1, 1, generator=generator)
    x = ancestral(model, x, diffusion, lambda: torch.randn(x.shape, generator=generator))
    assert x.mean().item() == pytest.approx(mean, abs=0.02)
    assert x.std().item() == pytest.approx(spread, rel=0.03)


@pytest.mark.parametrize("variance", ["fixed_small", "learned_range"])
@pytest.mark.parametrize("clip", [False, True])
def test_ddim_of_eta_1_is_ancestral_with_the_posteriors_variance(variance, clip):
    diffusion, generator = chain(DiffusionConfig(variance=variance), "20"), torch.Generator().manual_seed(0)
    x, noise = torch.randn(4, 3, 2, 2, generator=generator), torch.randn(20, 4, 3, 2, 2, generator=generator)
    model = gaussian_model(diffusion)
    by_ancestral = ancestral(model, x, diffusion, recorded(noise), clip)
    by_ddim = ddim(model, x, diffusion, eta=1.0, noise=recorded(noise), clip=clip)
    torch.testing.assert_close(by_ddim, by_ancestral, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_draws_gaussian_data_with_its_spread_at_every_eta(eta):
    diffusion, generator = chain(spacing="200"), torch.Generator().manual_seed(0)
    x = torch.randn(2000, 3, 1, 1, generator=generator)
    drawn = ddim(
        gaussian_model(diffusion), x, diffusion, eta=eta, noise=lambda: torch.randn(x.shape, generator=generator)
    )
    torch.testing.assert_close(drawn.std(dim=0).view(3), SPREAD.view(3), rtol=0.08, atol=0)
    # eta 0 keeps each start's place in the distribution; eta 1 forgets it
    place = torch.corrcoef(torch.stack([x[:, 1].flatten(), drawn[:, 1].flatten()]))[0, 1].item()
    assert place > 0.999 if eta == 0 else place < 0.9


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_ddim_converges_to_the_exact_flow(schedule):
    """On Gaussian data the flow scales: x at the end is x at the start by the ratio of the spreads."""
    x, errors = torch.linspace(-2, 2, 5).view(5, 1, 1, 1).expand(5, 3, 1, 1), []
    for count in (50, 100, 200):
        diffusion = chain(DiffusionConfig(schedule=schedule, prediction="epsilon"), str(count))
        drawn = ddim(gaussian_model(diffusion), x, diffusion)
        errors.append((drawn - x * SPREAD / spread_at(diffusion, -1)).abs().max().item())
    assert errors[0] / errors[1] > 1.7 and errors[1] / errors[2] > 1.7, errors


def test_reverse_ddim_undoes_ddim_as_the_steps_grow():
    x, errors = torch.randn(5, 3, 2, 2, generator=torch.Generator().manual_seed(0)), []
    for count in (50, 100, 200, 400):
        diffusion = chain(spacing=str(count))
        model = gaussian_model(diffusion)
        data = ddim(model, x, diffusion)
        errors.append((ddim_reverse(model, data, diffusion, num_steps=count - 1) - x).abs().max().item())
    assert all(a / b > 1.6 for a, b in zip(errors[:-1], errors[1:], strict=True)), errors
    assert errors[-1] < 0.05
    # the last step leaves the noise alone: what the network sees in the end of the chain
    last = ddim_reverse(model, data, diffusion)
    before = ddim_reverse(model, data, diffusion, num_steps=399)
    torch.testing.assert_close(last, model(before, torch.tensor(999))[:, :3])


def test_samplers_agree_on_equal_networks_in_other_parameterisations():
    generator, drawn = torch.Generator().manual_seed(0), []
    x = torch.randn(3, 3, 2, 2, generator=generator)
    for prediction in ("epsilon", "x", "v"):
        diffusion = chain(DiffusionConfig(prediction=prediction, variance="fixed_large"), "20")
        drawn.append(ddim(gaussian_model(diffusion), x, diffusion))
    torch.testing.assert_close(drawn[1], drawn[0], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(drawn[2], drawn[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("num_steps", [2, 3, 6, 8])
def test_few_steps_of_eta_1_are_finite(schedule, num_steps):
    """Their sigma^2 is all but 1 - alpha_bar, and by rounding more."""
    diffusion = chain(DiffusionConfig(schedule=schedule), str(num_steps))
    x = torch.randn(2, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    drawn = ddim(gaussian_model(diffusion), x, diffusion, eta=1.0, noise=lambda: x)
    assert drawn.isfinite().all()


def test_impossible_etas_are_refused():
    x = torch.zeros(1, 3, 1, 1)
    with pytest.raises(ValueError, match="eta must be 0"):
        ddim(gaussian_model(CHAIN), x, CHAIN, eta=1.5, noise=lambda: x)
    with pytest.raises(ValueError, match="give `noise`"):
        ddim(gaussian_model(CHAIN), x, CHAIN, eta=0.5)
