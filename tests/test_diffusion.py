import json

import numpy as np
import pytest
import torch
from conftest import GOLDEN
from hypothesis import given, settings
from hypothesis import strategies as st

from dit.diffusion import Diffusion, linear_betas, respace, space_timesteps, training_loss

FULL = Diffusion(linear_betas())


def chain(spec):
    return respace(FULL, space_timesteps(1000, spec))


def test_tables_equal_the_reference():
    reference = np.load(GOLDEN / "gaussian_tables.npz")
    ours = {
        "betas": "betas",
        "alphas_cumprod": "alphas_bar",
        "alphas_cumprod_prev": "alphas_bar_prev",
        "sqrt_alphas_cumprod": "sqrt_alphas_bar",
        "sqrt_one_minus_alphas_cumprod": "sqrt_one_minus_alphas_bar",
        "posterior_variance": "posterior_variance",
        "posterior_log_variance_clipped": "posterior_log_variance",
        "posterior_mean_coef1": "posterior_coef1",
        "posterior_mean_coef2": "posterior_coef2",
        "timestep_map": "timestep_map",
    }
    compared = 0
    for label, spec in {"full": "", "250": "250", "50": "50", "ddim25": "ddim25", "10_15_20": "10,15,20"}.items():
        diffusion = chain(spec)
        for theirs, name in ours.items():
            if f"{label}.{theirs}" in reference:
                actual = getattr(diffusion, name).numpy()
                np.testing.assert_allclose(
                    actual, reference[f"{label}.{theirs}"], rtol=1e-12, err_msg=f"{label}.{theirs}"
                )
                compared += 1
    assert compared >= 5 * 8


def test_respacing_equals_the_reference_to_the_letter():
    cases = json.loads((GOLDEN / "space_timesteps.json").read_text())
    assert len(cases) > 10
    for case, expected in cases.items():
        num_timesteps, spec = case.split("|")
        if expected == "ValueError":
            with pytest.raises(ValueError):
                space_timesteps(int(num_timesteps), spec)
        else:
            assert space_timesteps(int(num_timesteps), spec) == expected, case


@pytest.mark.parametrize("label", ["full", "250"])
def test_terms_equal_the_reference(golden, label):
    tensors, _ = golden("gaussian_terms")
    diffusion, g = chain("" if label == "full" else label), {k.removeprefix(f"{label}."): v for k, v in tensors.items()}
    x, noise, fake, t = g["x0"], g["noise"], g["fake8"], g["t"]
    close = {"rtol": 1e-5, "atol": 1e-6}
    x_t = diffusion.q_sample(x, t, noise)
    torch.testing.assert_close(x_t, g["q_sample"], **close)
    torch.testing.assert_close(diffusion.posterior_mean(x, x_t, t), g["q_posterior.mean"], **close)
    for clip in (0, 1):
        mean, log_variance, pred = diffusion.p_mean_log_variance(fake, x_t, t, bool(clip))
        torch.testing.assert_close(mean, g[f"p_mean_variance.clip{clip}.mean"], **close)
        torch.testing.assert_close(log_variance, g[f"p_mean_variance.clip{clip}.log_variance"], **close)
        torch.testing.assert_close(pred, g[f"p_mean_variance.clip{clip}.pred_xstart"], **close)
    for name in ("x0", "x0_clamped"):
        terms = diffusion.loss(fake, g[name], diffusion.q_sample(g[name], t, noise), noise, t)
        for key in ("loss", "mse", "vb"):
            torch.testing.assert_close(terms[key], g[f"loss.{name}.{key}"], **close)
    seen = []
    training_loss(diffusion, lambda x_t, t, y: seen.append(t) or fake, x, None, t, noise)
    assert torch.equal(seen[0], g["model_t_seen"])
    fake = fake.clone().requires_grad_()
    diffusion.loss(fake, x, x_t, noise, t)["loss"].mean().backward()
    torch.testing.assert_close(fake.grad, g["loss.grad_fake"], **close)


@settings(max_examples=25, deadline=None)
@given(count=st.integers(2, 200))
def test_a_respaced_chain_keeps_the_marginals(count):
    steps = space_timesteps(1000, str(count))
    diffusion = respace(FULL, steps)
    assert steps[0] == 0 and steps[-1] == 999 and len(steps) == count
    torch.testing.assert_close(diffusion.alphas_bar, FULL.alphas_bar[steps], rtol=1e-12, atol=0)


def test_the_noise_at_the_end_hides_the_data():
    assert FULL.alphas_bar[-1].item() == pytest.approx(4.0358e-05, rel=1e-4)
