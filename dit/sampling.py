"""Samplers and guidance, as plain functions `(model, x, times, ...) -> x`.

`model(x, t)` takes x (N, C, H, W) and one time t for the whole batch, a scalar tensor; `guided` makes such a function
of a network and labels.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from dit.diffusion import Diffusion

Model = Callable[[Tensor, Tensor], Tensor]


def guided(network: Callable[[Tensor, Tensor, Tensor], Tensor], y: Tensor, null_label: int, cfg_scale: float) -> Model:
    """Classifier-free guidance (arXiv 2207.12598): uncond + cfg_scale (cond - uncond), on the C predicted channels.

    A scale of 1 is the plain network. Else both halves go through one call of twice the batch; variance channels,
    where the network has them, stay the conditional ones.
    """
    if cfg_scale == 1:
        return lambda x, t: network(x, t.expand(len(x)), y)
    labels = torch.cat([y, torch.full_like(y, null_label)])

    def model(x: Tensor, t: Tensor) -> Tensor:
        cond, uncond = network(torch.cat([x, x]), t.expand(2 * len(x)), labels).chunk(2)
        C = x.shape[1]
        return torch.cat([uncond[:, :C] + cfg_scale * (cond[:, :C] - uncond[:, :C]), cond[:, C:]], dim=1)

    return model


def euler(velocity: Model, x: Tensor, times: Tensor) -> Tensor:
    """Euler's method for dx/dt = velocity(x, t), along `times` (steps + 1,): one network evaluation a step."""
    for t, t_next in zip(times[:-1], times[1:], strict=True):
        x = x + (t_next - t) * velocity(x, t)
    return x


def heun(velocity: Model, x: Tensor, times: Tensor) -> Tensor:
    """Heun's second-order method (trapezoid rule with an Euler predictor): two evaluations a step."""
    for t, t_next in zip(times[:-1], times[1:], strict=True):
        h = t_next - t
        k1 = velocity(x, t)
        k2 = velocity(x + h * k1, t_next)
        x = x + h * (k1 + k2) / 2
    return x


def ancestral(model: Model, x: Tensor, diffusion: Diffusion, noise: Callable[[], Tensor], clip: bool = False) -> Tensor:
    """DDPM's sampler: x_{t-1} drawn from p(x_{t-1} | x_t), from the chain's last step to its first.

    `noise()` gives standard normal (N, C, H, W); it is called at every step, the last (where it has weight 0) too.
    """
    for step in reversed(range(diffusion.num_timesteps)):
        t = torch.full((len(x),), step, device=x.device)
        output = model(x, diffusion.original(t)[0]).float()
        mean, log_variance, _ = diffusion.p_mean_log_variance(output, x, t, clip)
        x = mean + (step != 0) * (0.5 * log_variance).exp() * noise()
    return x


def ddim(model: Model, x: Tensor, diffusion: Diffusion, clip: bool = False) -> Tensor:
    """DDIM's deterministic sampler (arXiv 2010.02502, equation 12 with eta = 0)."""
    for step in reversed(range(diffusion.num_timesteps)):
        t = torch.full((len(x),), step, device=x.device)
        eps = model(x, diffusion.original(t)[0]).float()[:, : x.shape[1]]
        clean = diffusion.predict_x(x, t, eps)
        if clip:  # the noise that leads from the clipped prediction to x_t
            clean = clean.clamp(-1, 1)
            eps = (x - diffusion.at("sqrt_alphas_bar", t) * clean) / diffusion.at("sqrt_one_minus_alphas_bar", t)
        previous = diffusion.at("alphas_bar_prev", t)
        x = previous.sqrt() * clean + (1 - previous).sqrt() * eps
    return x
