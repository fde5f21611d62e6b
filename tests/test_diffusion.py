import math

import numpy as np
import pytest
import torch
from conftest import GOLDEN
from hypothesis import given, settings
from hypothesis import strategies as st

from dit.diffusion import Diffusion, DiffusionConfig, bits_per_dim, chain, gaussian_kl, training_loss
from dit.timesteps import space_timesteps

FULL = chain()
CLOSE = {"rtol": 1e-5, "atol": 1e-6}
PREDICTIONS, VARIANCES = ("epsilon", "x", "v"), ("learned_range", "learned", "fixed_large", "fixed_small")


def draws(count, *shape, seed=0):
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))


def test_tables_equal_the_reference():
    reference = np.load(GOLDEN / "gaussian_tables.npz")
    ours = {
        "betas": "betas",
        "alphas_cumprod": "alphas_bar",
        "alphas_cumprod_prev": "alphas_bar_prev",
        "alphas_cumprod_next": "alphas_bar_next",
        "sqrt_alphas_cumprod": "sqrt_alphas_bar",
        "sqrt_one_minus_alphas_cumprod": "sqrt_one_minus_alphas_bar",
        "sqrt_recip_alphas_cumprod": "sqrt_reciprocal_alphas_bar",
        "sqrt_recipm1_alphas_cumprod": "sqrt_reciprocal_alphas_bar_less_1",
        "posterior_variance": "posterior_variance",
        "posterior_log_variance_clipped": "posterior_log_variance",
        "posterior_mean_coef1": "posterior_coef1",
        "posterior_mean_coef2": "posterior_coef2",
        "timestep_map": "timestep_map",
    }
    chains = {label: chain(spacing=label) for label in ("250", "50", "ddim25", "1")}
    chains |= {"full": FULL, "10_15_20": chain(spacing="10,15,20")}
    chains["cosine_full"] = chain(DiffusionConfig(schedule="cosine"))
    compared = 0
    for label, diffusion in chains.items():
        for theirs, name in ours.items():
            if (key := f"{label}.{theirs}") in reference:
                actual = getattr(diffusion, name).numpy()
                np.testing.assert_allclose(actual, reference[key], rtol=1e-12, err_msg=key)
                compared += 1
    assert compared == 6 * 13 + 3


@pytest.mark.parametrize("label", ["full", "250"])
def test_terms_equal_the_reference(golden, label):
    tensors, _ = golden("gaussian_terms")
    diffusion = chain(spacing="" if label == "full" else label)
    g = {k.removeprefix(f"{label}."): v for k, v in tensors.items()}
    x, noise, fake, t = g["x0"], g["noise"], g["fake8"], g["t"]
    x_t = diffusion.q_sample(x, t, noise)
    torch.testing.assert_close(x_t, g["q_sample"], **CLOSE)
    torch.testing.assert_close(diffusion.posterior_mean(x, x_t, t)[:, :, :2], g["q_posterior.mean"], **CLOSE)
    log_variance = diffusion.at("posterior_log_variance", t).expand_as(x)
    torch.testing.assert_close(log_variance[:, :, :2], g["q_posterior.log_variance"], **CLOSE)
    for clip in (0, 1):
        terms = diffusion.p_mean_log_variance(fake, x_t, t, bool(clip))
        for key, actual in zip(("mean", "log_variance", "pred_xstart"), terms, strict=True):
            torch.testing.assert_close(actual[:, :, :2], g[f"p_mean_variance.clip{clip}.{key}"], **CLOSE)
    fake = fake.clone().requires_grad_()
    diffusion.loss(fake, x, x_t, noise, t)["loss"].mean().backward()
    torch.testing.assert_close(fake.grad, g["loss.grad_fake"], **CLOSE)


@pytest.mark.parametrize("label", ["full", "250", "ddim25"])
def test_losses_and_the_steps_that_are_asked_for_equal_the_reference(golden, label):
    tensors, _ = golden("gaussian_terms")
    diffusion = chain(spacing="" if label == "full" else label)
    g = {k.removeprefix(f"{label}."): v for k, v in tensors.items()}
    noise, fake, t, seen = g["noise"], g["fake8"], g["t"], []
    for name in ("x0", "x0_clamped"):
        losses = diffusion.loss(fake, g[name], diffusion.q_sample(g[name], t, noise), noise, t)
        for key in ("loss", "mse", "vb"):
            torch.testing.assert_close(losses[key], g[f"loss.{name}.{key}"], **CLOSE)
    training_loss(diffusion, lambda x_t, t, y: seen.append(t) or fake, g["x0"], None, t, noise)
    assert torch.equal(seen[0], g["model_t_seen"])


@pytest.mark.parametrize(
    "label,config,spacing",
    [
        ("rescaled_mse", DiffusionConfig(loss="rescaled_mse"), ""),
        ("rescaled_mse_250", DiffusionConfig(loss="rescaled_mse"), "250"),
        ("kl", DiffusionConfig(loss="rescaled_kl"), ""),  # the published code's "use_kl" is the rescaled one
        ("xstart", DiffusionConfig(prediction="x"), ""),
        ("fixed_large", DiffusionConfig(variance="fixed_large"), ""),
        ("fixed_small", DiffusionConfig(variance="fixed_small"), ""),
        ("kl_fixed_small", DiffusionConfig(variance="fixed_small", loss="rescaled_kl"), ""),
        ("cosine", DiffusionConfig(schedule="cosine"), ""),
    ],
)
def test_other_settings_equal_the_reference(golden, label, config, spacing):
    tensors, _ = golden("gaussian_terms")
    g = {k.removeprefix(f"alt.{label}."): v for k, v in tensors.items()}
    diffusion, t = chain(config, spacing), g["alt.t"] // (4 if spacing else 1)
    fake = g["fake8"] if config.learns_variance else g["fake4"]
    x_t = diffusion.q_sample(g["x0"], t, g["noise"])
    terms = diffusion.p_mean_log_variance(fake, x_t, t)
    for key, actual in zip(("mean", "log_variance", "pred_xstart"), terms, strict=True):
        torch.testing.assert_close(actual[:, :, :1, :2], g[f"p.{key}"], **CLOSE)
    losses = diffusion.loss(fake, g["x0"], x_t, g["noise"], t)
    expected = {key for key in ("loss", "mse", "vb") if f"alt.{label}.{key}" in tensors}
    for key in expected:
        torch.testing.assert_close(losses[key], g[key], **CLOSE)
    assert "loss" in expected and expected >= set(losses) - {"vb"}


def test_the_rescaled_bound_counts_every_step_of_the_chain():
    x, noise, output, t = draws(4, 2, 3, 3), draws(4, 2, 3, 3, seed=1), draws(4, 4, 3, 3, seed=2), torch.arange(4) * 10
    plain, rescaled = (chain(DiffusionConfig(loss=loss), "50") for loss in ("kl", "rescaled_kl"))
    x_t = plain.q_sample(x, t, noise)
    terms = rescaled.loss(output, x, x_t, noise, t)
    torch.testing.assert_close(terms["loss"], 50 * plain.loss(output, x, x_t, noise, t)["loss"])
    torch.testing.assert_close(terms["loss"], 50 * terms["vb"])


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_equal_networks_in_other_parameterisations_give_equal_steps(schedule, variance):
    """A network that knows the noise says so as noise, as clean latents or as v: the same p, and no error."""
    t = torch.tensor([0, 1, 250, 500, 900])
    x, noise, v = draws(5, 2, 4, 4), draws(5, 2, 4, 4, seed=1), draws(5, 2, 4, 4, seed=2) / 3
    guess = noise + 0.1 * draws(5, 2, 4, 4, seed=3)  # a network that is not quite right
    results = []
    for prediction in PREDICTIONS:
        diffusion = chain(DiffusionConfig(schedule=schedule, prediction=prediction, variance=variance))
        x_t = diffusion.q_sample(x, t, noise)
        alpha, sigma = diffusion.at("sqrt_alphas_bar", t), diffusion.at("sqrt_one_minus_alphas_bar", t)
        clean = (x_t - sigma * guess) / alpha
        output = {"epsilon": guess, "x": clean, "v": alpha * guess - sigma * clean}[prediction]
        mean, log_variance, pred = diffusion.p_mean_log_variance(torch.cat([output, v], dim=1), x_t, t)
        results.append((mean, log_variance, pred, diffusion.predict(output, x_t, t)[1]))
        torch.testing.assert_close(diffusion.predict_x(x_t, t, diffusion.target(x, noise, t)), x, rtol=1e-3, atol=2e-3)
    for other in results[1:]:
        torch.testing.assert_close(other[0], results[0][0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(other[1], results[0][1])
        torch.testing.assert_close(other[2], results[0][2], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(other[3], results[0][3], rtol=1e-2, atol=1e-3)  # x says little of the noise at t = 0


@settings(max_examples=25, deadline=None)
@given(
    t=st.integers(0, 999),
    prediction=st.sampled_from(PREDICTIONS),
    schedule=st.sampled_from(["linear", "cosine"]),
    seed=st.integers(0, 999),
)
def test_the_target_leads_back_to_latents_and_noise(t, prediction, schedule, seed):
    diffusion = chain(DiffusionConfig(prediction=prediction, schedule=schedule, variance="fixed_small"))
    steps = torch.tensor([t])
    x, noise = draws(2, 1, 2, 3, 3, seed=seed).double()
    x_t = diffusion.q_sample(x, steps, noise)
    predicted_x, predicted_noise = diffusion.predict(diffusion.target(x, noise, steps), x_t, steps)
    alpha, sigma = (diffusion.alphas_bar[t].sqrt().item(), (1 - diffusion.alphas_bar[t]).sqrt().item())
    # the tables hold seven digits, which the division by alpha or sigma magnifies
    torch.testing.assert_close(predicted_x, x, rtol=0, atol=2e-6 / alpha)
    torch.testing.assert_close(predicted_noise, noise, rtol=0, atol=2e-6 / sigma)
    losses = diffusion.loss(diffusion.target(x, noise, steps), x, x_t, noise, steps)
    assert losses.keys() == {"loss", "mse"} and losses["loss"].item() == 0


@settings(max_examples=25, deadline=None)
@given(count=st.integers(2, 200), schedule=st.sampled_from(["linear", "cosine"]))
def test_a_respaced_chain_keeps_the_marginals(count, schedule):
    config = DiffusionConfig(schedule=schedule, prediction="v", variance="fixed_small")
    full, steps = chain(config), space_timesteps(1000, str(count))
    diffusion = chain(config, str(count))
    assert steps[0] == 0 and steps[-1] == 999 and len(steps) == count
    torch.testing.assert_close(diffusion.alphas_bar, full.alphas_bar[steps], rtol=1e-10, atol=1e-15)
    assert diffusion.config == config and diffusion.timestep_map.tolist() == steps


@settings(max_examples=25, deadline=None)
@given(count=st.integers(2, 200), schedule=st.sampled_from(["linear", "cosine"]))
def test_the_posterior_is_bayes_rule(count, schedule):
    """q(x_{t-1} | x) q(x_t | x_{t-1}) = q(x_t | x) q(x_{t-1} | x_t, x): in precisions, and in where the mean goes."""
    diffusion = chain(DiffusionConfig(schedule=schedule), str(count))
    alphas, previous = 1 - diffusion.betas[1:], diffusion.alphas_bar_prev[1:]
    precision = alphas / diffusion.betas[1:] + 1 / (1 - previous)
    exact = {"rtol": 1e-8, "atol": 1e-12}
    torch.testing.assert_close(diffusion.posterior_variance[1:], 1 / precision, **exact)
    torch.testing.assert_close(diffusion.posterior_coef1[1:], previous.sqrt() / (1 - previous) / precision, **exact)
    torch.testing.assert_close(diffusion.posterior_coef2[1:], alphas.sqrt() / diffusion.betas[1:] / precision, **exact)


def test_variances_are_what_their_names_say():
    t, x_t = torch.tensor([0, 1, 30]), torch.zeros(3, 1, 2, 2)
    ends = torch.cat([draws(3, 1, 2, 2), torch.tensor([-1.0, 0.0, 1.0]).view(3, 1, 1, 1).expand(3, 1, 2, 2)], dim=1)
    log_variance = {v: chain(DiffusionConfig(variance=v), "50").log_variance(ends, x_t, t) for v in VARIANCES}
    torch.testing.assert_close(log_variance["learned"], ends[:, 1:])
    small, large = log_variance["fixed_small"], log_variance["fixed_large"]
    assert (small[0] == large[0]).all() and (small[1:] < large[1:]).all()
    torch.testing.assert_close(log_variance["learned_range"][1], (small + large)[1] / 2)
    torch.testing.assert_close(log_variance["learned_range"][2], large[2])


def test_a_network_without_room_for_the_variance_is_told_so():
    x, t = draws(2, 4, 4, 4), torch.tensor([3, 500])
    with pytest.raises(ValueError, match="model.learn_sigma"):
        training_loss(FULL, lambda x_t, t, y: x_t, x, None, t, x)
    fixed = chain(DiffusionConfig(variance="fixed_large"))
    narrow = training_loss(fixed, lambda x_t, t, y: x_t, x, None, t, x)
    wide = training_loss(fixed, lambda x_t, t, y: torch.cat([x_t, 9 * x_t], dim=1), x, None, t, x)
    assert torch.equal(narrow, wide)


@pytest.mark.parametrize("field", ["schedule", "prediction", "variance", "loss"])
def test_unknown_settings_are_refused(field):
    with pytest.raises(ValueError, match=f"{field} must be one of .*'velocity'"):
        DiffusionConfig(**{field: "velocity"})


def test_the_bound_alone_trains_the_variance_and_mse_leaves_the_mean_to_itself():
    x, noise, t = draws(3, 2, 3, 3), draws(3, 2, 3, 3, seed=1), torch.tensor([0, 10, 700])
    gradients = {}
    for loss in ("mse", "kl"):
        diffusion, output = chain(DiffusionConfig(loss=loss)), draws(3, 4, 3, 3, seed=2).requires_grad_()
        diffusion.loss(output, x, diffusion.q_sample(x, t, noise), noise, t)["loss"].mean().backward()
        gradients[loss] = output.grad
    output = draws(3, 4, 3, 3, seed=2)
    torch.testing.assert_close(gradients["mse"][:, :2], 2 * (output[:, :2] - noise) / noise.numel())
    torch.testing.assert_close(gradients["mse"][:, 2:], gradients["kl"][:, 2:])


def test_the_bound_of_the_exact_model_is_the_entropy_of_the_data():
    """Data N(0, s^2). With the exact reverse chain the bound is H(x) + KL(q(x_T) || N(0, 1)), less the log of a bin.

    A chain of large steps: its likelihood at t = 0 is then much wider than a bin.
    """
    s, betas = 0.25, torch.linspace(0.02, 0.5, 12, dtype=torch.float64)
    diffusion = Diffusion(betas, config=DiffusionConfig(prediction="x", variance="learned"))

    def model(x_t, t):
        bar = diffusion.alphas_bar[t].item()
        gain, rest = bar**0.5 * s**2 / (bar * s**2 + 1 - bar), s**2 * (1 - bar) / (bar * s**2 + 1 - bar)
        variance = diffusion.posterior_variance[t] + diffusion.posterior_coef1[t] ** 2 * rest
        return torch.cat([gain * x_t, variance.log().float().expand_as(x_t)], dim=1)

    generator = torch.Generator().manual_seed(0)
    x = s * torch.randn(400, 1, 16, 16, generator=generator)
    terms = bits_per_dim(diffusion, model, x, lambda: torch.randn(x.shape, generator=generator), clip=False)
    bar = diffusion.alphas_bar[-1].item()
    end = bar * s**2 + 1 - bar
    prior = 0.5 * (end - 1 - math.log(end))
    expected = (0.5 * math.log(2 * math.pi * math.e * s**2) - math.log(2 / 255) + prior) / math.log(2)
    assert terms["total"].mean().item() == pytest.approx(expected, abs=0.01)
    prior_of_x = 0.5 * (bar * s**2 - bar - math.log(1 - bar)) / math.log(2)
    assert terms["prior"].mean().item() == pytest.approx(prior_of_x, rel=0.02)
    rest = s**2 * (1 - diffusion.alphas_bar) / (diffusion.alphas_bar * s**2 + 1 - diffusion.alphas_bar)
    torch.testing.assert_close(terms["x_mse"].mean(dim=0), rest.flip(0).float(), rtol=0.03, atol=0)
    noise_mse = rest * diffusion.alphas_bar / (1 - diffusion.alphas_bar)
    torch.testing.assert_close(terms["mse"].mean(dim=0), noise_mse.flip(0).float(), rtol=0.03, atol=0)
    fresh = lambda: torch.randn(x.shape, generator=generator)  # noqa: E731
    worse = bits_per_dim(diffusion, lambda x_t, t: 0.97 * model(x_t, t), x, fresh, clip=False)
    assert worse["total"].mean() > terms["total"].mean() + 0.01


def test_the_bound_asks_at_original_steps_from_noise_to_data_and_clips():
    diffusion, x, seen = chain(spacing="10"), draws(2, 1, 4, 4).clamp(-1, 1), []
    noise = draws(2, 1, 4, 4, seed=1)

    def model(x_t, t):
        seen.append(t.item())
        return torch.cat([-x_t, torch.zeros_like(x_t)], dim=1)

    terms = [bits_per_dim(diffusion, model, x, lambda: noise, clip=clip) for clip in (True, False)]
    assert seen == 2 * space_timesteps(1000, "10")[::-1]
    assert terms[0]["vb"].shape == (2, 10) and terms[0]["total"].shape == (2,)
    assert terms[0]["x_mse"].max() <= 4 < terms[1]["x_mse"].max()


def test_kl_of_gaussians_equals_torch():
    a, b, c, d = draws(4, 50)
    ours = gaussian_kl(a, b, c, d)
    normal = torch.distributions.Normal
    theirs = torch.distributions.kl_divergence(normal(a, (b / 2).exp()), normal(c, (d / 2).exp()))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_the_noise_at_the_end_hides_the_data():
    assert FULL.alphas_bar[-1].item() == pytest.approx(4.0358e-05, rel=1e-4)
