"""The exact likelihood of a flow (FFJORD, arXiv 1810.01367): how probable a picture is under the ODE that draws them."""

from collections.abc import Callable
from math import log, pi

import torch
from torch import Tensor

from dit.sampling import Model, heun


def rademacher(x: Tensor, generator: torch.Generator | None = None) -> Callable[[], Tensor]:
    """A source of random signs, -1 or 1, of x's shape and type, new at every call; drawn where the generator is, else
    where x is."""
    device = x.device if generator is None else generator.device
    return lambda: (torch.randint(2, x.shape, generator=generator, device=device) * 2 - 1).to(x)


def standard_normal(z: Tensor) -> Tensor:
    """log N(z; 0, I) of z (N, ...), (N,), in nats."""
    return -(z.square() + log(2 * pi)).flatten(1).sum(1) / 2


def divergence(velocity: Model, x: Tensor, t: Tensor, signs: Tensor) -> tuple[Tensor, Tensor]:
    """velocity(x, t), and Hutchinson's estimate (N,) of its divergence, signs . J signs: exact in expectation."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        v = velocity(x, t)
        (gradient,) = torch.autograd.grad((v * signs).sum(), x)
    return v.detach(), (gradient * signs).flatten(1).sum(1)


def log_likelihood(
    velocity: Model,
    x: Tensor,
    times: Tensor,
    signs: Callable[[], Tensor],
    solver: Callable[[Model, Tensor, Tensor], Tensor] = heun,
) -> Tensor:
    """log p(x), (N,), in nats for all dimensions of x (N, ...) together, of the distribution that the ODE draws from.

    log p(x) = log N(z) - integral of div velocity dt, along the solution from x back to noise z (SiT's
    equation of continuity); x and the integral are one state of `solver`. `times` runs from data to noise, 1 to 0.
    `signs()` is called at every evaluation, and redrawn as the published code does; a source that repeats itself is
    what an adaptive solver needs. Works under no_grad and without (the published code needs no_grad); gives no gradient.
    """

    def rate(state: Tensor, t: Tensor) -> Tensor:
        v, div = divergence(velocity, state[:, :-1].view_as(x), t, signs())
        return torch.cat([v.flatten(1), div[:, None]], dim=1)

    start = torch.cat([x.detach().flatten(1), x.new_zeros(len(x), 1)], dim=1)
    end = solver(rate, start, times)
    return standard_normal(end[:, :-1]) + end[:, -1]
