"""Samplers of ODEs, and guidance, as plain functions `(model, x, times, ...) -> x`.

`model(x, t)` takes x (N, C, H, W) and one time t for the whole batch, a scalar tensor; `guided` makes such a function
of a network and labels. `times` stay on the CPU, whatever device x is on: nothing that a step asks of its time makes the
host wait for the device then, and a scalar goes into a device's arithmetic from there.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Model = Callable[[Tensor, Tensor], Tensor]


def guided(
    network: Callable[[Tensor, Tensor, Tensor], Tensor],
    y: Tensor,
    null: Tensor | int,
    cfg_scale: float,
    *,
    channels: int | None = None,
    interval: tuple[float, float] = (0.0, 1.0),
    clock: Callable[[Tensor], Tensor] = lambda t: t,
) -> Model:
    """Classifier-free guidance (arXiv 2207.12598): uncond + cfg_scale (cond - uncond), for conditions y.

    y: labels (N,) or embeddings (N, L, E); null: what stands for no condition, shaped as y or one label for all. Both
    halves go through one call of twice the batch. `channels`: how many of x's channels are guided (all where None; the
    published code guides 3); the others, and variance channels, stay the conditional ones. `interval`: the times
    (arXiv 2404.07724), by `clock` from the sampler's to 0 (noise) to 1 (data), at which there is guidance; elsewhere,
    and with a scale of 1, the plain network is called, with N.
    """
    low, high = interval
    conditions = torch.cat([y, torch.as_tensor(null).to(y).expand_as(y)])

    def model(x: Tensor, t: Tensor) -> Tensor:
        everywhere = low <= 0 and high >= 1
        if cfg_scale == 1 or not (everywhere or low <= float(clock(t)) <= high):
            return network(x, for_all(t, x), y)
        both = torch.cat([x, x])
        cond, uncond = network(both, for_all(t, both), conditions).chunk(2)
        C = x.shape[1] if channels is None else channels
        return torch.cat([uncond[:, :C] + cfg_scale * (cond[:, :C] - uncond[:, :C]), cond[:, C:]], dim=1)

    return model


def for_all(t: Tensor, x: Tensor) -> Tensor:
    """One time (), of any device, as times (N,) beside x (N, ...)."""
    if t.device == x.device:
        return t.expand(len(x))
    return torch.full((len(x),), t.item(), dtype=t.dtype, device=x.device)  # a copy from the CPU would be waited for


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


def dopri5(
    velocity: Model,
    x: Tensor,
    t0: float,
    t1: float,
    rtol: float = 1e-3,
    atol: float = 1e-6,
    *,
    overshoot: bool = False,
) -> Tensor:
    """Dormand and Prince's method of order 5 for dx/dt = velocity(x, t) from t0 to t1, by torchdiffeq.

    Its steps are as long as the estimated error, a root mean square over the whole batch against atol + rtol |x|,
    allows: a sample depends, within these tolerances, on what it is drawn with, and evaluations are not known before.
    The last step lands on t1; with `overshoot` it runs past t1 and the state there is interpolated, as in the published
    code, which asks a network for times that it was not trained on (and on VP, past t = 1, for a root of less than 0).
    Its times are x's device's. Raises ValueError on Apple's GPU.
    """
    if x.device.type == "mps":
        raise ValueError("sampler dopri5 needs float64, which mps does not have: use heun, or set run.device to cpu")
    from torchdiffeq import odeint

    times = torch.tensor([t0, t1], dtype=x.dtype, device=x.device)
    options = {} if overshoot else {"step_t": times[1:].double()}
    return odeint(lambda t, x: velocity(x, t), x, times, method="dopri5", rtol=rtol, atol=atol, options=options)[-1]
