"""Stochastic interpolants (SiT, arXiv 2401.08740): the linear path, learned through its velocity.

Time t in [0, 1]: t = 0 is noise, t = 1 is data, x_t = alpha_t x + sigma_t noise. (The paper's text runs the other way.)
"""

from collections.abc import Callable

import torch
from torch import Tensor


def linear_path(t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """alpha_t, sigma_t, d_alpha_t, d_sigma_t of the linear path, each of t's shape."""
    return t, 1 - t, torch.ones_like(t), -torch.ones_like(t)


def interpolate(x: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """x_t and its velocity d x_t / dt for clean latents x (N, C, H, W) and times t (N,)."""
    alpha_t, sigma_t, d_alpha_t, d_sigma_t = linear_path(t.view(-1, 1, 1, 1))
    return alpha_t * x + sigma_t * noise, d_alpha_t * x + d_sigma_t * noise


def velocity(output: Tensor, channels: int) -> Tensor:
    """The velocity in a network's output: a network with learned sigma predicts twice the channels; half is unused."""
    return output[:, :channels]


def training_loss(
    model: Callable[[Tensor, Tensor, Tensor], Tensor], x: Tensor, y: Tensor, t: Tensor, noise: Tensor
) -> Tensor:
    """Squared error of the velocity, (N,), at times t (N,) for clean latents x (N, C, H, W) and labels y (N,)."""
    x_t, target = interpolate(x, noise, t)
    output = velocity(model(x_t, t, y), x.shape[1])
    return (output.float() - target).square().mean(dim=(1, 2, 3))
