"""Samplers of a diffusion chain, as plain functions `(model, x, chain, ...) -> x`: ancestral and DDIM.

`model(x, t)` takes x (N, C, H, W) and one time t for the whole batch: a scalar tensor on the CPU, whatever device x is
on, the step of the full chain.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from dit.diffusion import Diffusion

Model = Callable[[Tensor, Tensor], Tensor]


def ancestral(model: Model, x: Tensor, chain: Diffusion, noise: Callable[[], Tensor], clip: bool = False) -> Tensor:
    """DDPM's sampler: x_{t-1} drawn from p(x_{t-1} | x_t), from the chain's last step to its first.

    `noise()` gives standard normal (N, C, H, W); it is called at every step, the last (where it has weight 0) too.
    `clip` holds each step's predicted latents within [-1, 1].
    """
    for step in reversed(range(chain.num_timesteps)):
        t = torch.full((len(x),), step, device=x.device)
        output = model(x, chain.timestep_map[step]).float()
        mean, log_variance, _ = chain.p_mean_log_variance(output, x, t, clip)
        x = mean + (step != 0) * (0.5 * log_variance).exp() * noise()
    return x


def ddim(
    model: Model,
    x: Tensor,
    chain: Diffusion,
    *,
    eta: float = 0.0,
    noise: Callable[[], Tensor] | None = None,
    clip: bool = False,
) -> Tensor:
    """DDIM's sampler: arXiv 2010.02502, equations 12 and 16.

    `eta` 0 is deterministic and needs no noise; 1 is as random as the posterior. Raises ValueError where eta is not
    within [0, 1] or lacks its noise, which is called at every step as in `ancestral`.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must be 0 (deterministic) to 1 (as random as the posterior), got {eta}")
    if eta and noise is None:
        raise ValueError(f"eta {eta} draws noise at every step: give `noise`, or eta 0")
    for step in reversed(range(chain.num_timesteps)):
        t = torch.full((len(x),), step, device=x.device)
        clean, eps = chain.predict(model(x, chain.timestep_map[step]).float(), x, t, clip)
        bar, previous = chain.at("alphas_bar", t), chain.at("alphas_bar_prev", t)
        sigma = eta * ((1 - previous) / (1 - bar)).sqrt() * (1 - bar / previous).sqrt()
        # at eta 1 of few steps sigma^2 is all but 1 - previous, and by rounding more
        x = previous.sqrt() * clean + (1 - previous - sigma**2).clamp(min=0).sqrt() * eps
        if eta and noise is not None:
            x = x + sigma * noise()  # sigma is 0 at the last step
    return x


def ddim_reverse(
    model: Model, x: Tensor, chain: Diffusion, *, num_steps: int | None = None, clip: bool = False
) -> Tensor:
    """The noise that deterministic DDIM would lead to clean latents x: its equation, run from data to noise.

    It goes `num_steps` of the chain's T steps up; None is all, and the last of them ends at pure noise (alpha_bar 0).
    T - 1 ends at the noise level where `ddim` starts, so that the two undo each other as the steps grow.
    """
    for step in range(chain.num_timesteps if num_steps is None else num_steps):
        t = torch.full((len(x),), step, device=x.device)
        clean, eps = chain.predict(model(x, chain.timestep_map[step]).float(), x, t, clip)
        following = chain.at("alphas_bar_next", t)
        x = following.sqrt() * clean + (1 - following).sqrt() * eps
    return x
