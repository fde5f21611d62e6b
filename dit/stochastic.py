"""Drawing by a stochastic differential equation (SiT, arXiv 2401.08740): any diffusion coefficient, one learned network.

dx = (velocity + w_t score) dt + sqrt(2 w_t) dW has the same marginals p_t as the ODE dx = velocity dt, for every
w_t >= 0: noise is added, and the score takes it away again, so that a sampler forgets its earlier errors. (The paper's
text writes w_t for what is 2 w_t here, as in the published code.)
"""

from collections.abc import Callable
from math import pi
from typing import Literal

import torch
from torch import Tensor

from dit.transport import PATHS, SMALL_TIME, Model, TransportConfig, at, interval, score_gain, to_score, to_velocity

Form = Literal["constant", "sbdm", "sigma", "linear", "decreasing", "increasing_decreasing", "kl", "kl_eta"]
LastStep = Literal["mean", "euler", "tweedie", "none"]


def diffusion_coefficient(form: Form, t: Tensor, path: str, norm: float = 1.0) -> Tensor:
    """w_t of a form, of t's shape, `norm` times (but see decreasing and kl_eta).

    sbdm: a score-based diffusion model's own noise, beta_t / 2 on VP. kl: the coefficient that minimises the upper bound
    of the divergence from the data (SiT, section 2.4: w^KL = 2 gain); on every path it is the same function as sbdm.
    Both are infinite at t = 0 on linear and GVP, so that a first step is far too long for them unless steps are many.
    kl_eta minimises that bound plus eta times the coefficient's integral, w^KL / sqrt(1 + 2 eta (w^KL)^2 / L_t), and is
    finite. There `norm` is eta in units of the training loss L_t, taken as constant in time: the paper gives neither.
    With a float `norm`, the published form `constant` fails, and `increasing_decreasing` is misspelt there.
    """
    if form == "constant":
        return torch.full_like(t, norm)
    if form == "sigma":
        return norm * PATHS[path](t)[1]
    if form == "linear":
        return norm * (1 - t)
    if form == "decreasing":
        return (norm * torch.cos(pi * t) + 1).square() / 4
    if form == "increasing_decreasing":
        return norm * torch.sin(pi * t).square()
    gain = score_gain(path, t)
    # the paper's coefficient halved, written so that an infinite gain is allowed
    return (gain.pow(-2) + 8 * norm).rsqrt() if form == "kl_eta" else norm * gain


def sde(
    model: Model, config: TransportConfig, channels: int, form: Form = "sigma", norm: float = 1.0
) -> tuple[Model, Callable[[Tensor], Tensor]]:
    """(drift(x, t), diffusion(t)) of a network's SDE: velocity + w_t score from one evaluation, and w_t."""

    def diffusion(t: Tensor) -> Tensor:
        return diffusion_coefficient(form, t, config.path, norm)

    def drift(x: Tensor, t: Tensor) -> Tensor:
        output = model(x, t)[:, :channels]
        return to_velocity(output, x, t, config) + diffusion(t) * to_score(output, x, t, config)

    return drift, diffusion


def sde_interval(
    config: TransportConfig,
    *,
    form: Form = "sigma",
    norm: float = 1.0,
    last_step_size: float = 0.04,
    method: Literal["euler", "heun"] = "euler",
) -> tuple[float, float]:
    """The times that noisy steps are taken over; what remains, `last_step_size`, is the last step's.

    A coefficient that is infinite at t = 0 starts a little later (the published code starts at 0 with it and gets NaN).
    Heun's method evaluates the score at the end, so that it stops short of sigma_t = 0.
    """
    t0, t1 = interval(config)
    infinite = form in ("sbdm", "kl") or (form == "kl_eta" and norm == 0)
    if infinite and config.path != "vp":
        t0 = SMALL_TIME
    if last_step_size:
        t1 = 1 - last_step_size
    elif method == "heun":
        t1 = 1 - SMALL_TIME
    return t0, t1


def sde_times(
    config: TransportConfig,
    num_steps: int,
    *,
    form: Form = "sigma",
    norm: float = 1.0,
    last_step: LastStep = "mean",
    last_step_size: float = 0.04,
    method: Literal["euler", "heun"] = "euler",
) -> Tensor:
    """The times of the noisy steps, such that they and the last step are `num_steps` in all.

    So `num_steps` is the number of network evaluations of Euler-Maruyama; Heun's method needs two a noisy step.
    Raises ValueError where a last step has no size, or where it leaves no time or step for the noisy ones.
    """
    if last_step == "none":
        last_step_size, noisy = 0.0, num_steps
    elif not 0 < last_step_size < 1:
        raise ValueError(f"last_step_size must be between 0 and 1 with last_step {last_step!r}, got {last_step_size}")
    else:
        noisy = num_steps - 1
    if noisy < 1:
        least = 1 if last_step == "none" else 2
        raise ValueError(f"num_steps must be at least {least} with last_step {last_step!r}, got {num_steps}")
    t0, t1 = sde_interval(config, form=form, norm=norm, last_step_size=last_step_size, method=method)
    return torch.linspace(t0, t1, noisy + 1)


def sde_euler(
    drift: Model, diffusion: Callable[[Tensor], Tensor], x: Tensor, times: Tensor, noise: Callable[[], Tensor]
) -> Tensor:
    """Euler-Maruyama along `times` (steps + 1,): one network evaluation and one call of noise() a step."""
    for t, t_next in zip(times[:-1], times[1:], strict=True):
        h = t_next - t
        x = x + h * drift(x, t) + (2 * diffusion(t) * h).sqrt() * noise()
    return x


def sde_heun(
    drift: Model, diffusion: Callable[[Tensor], Tensor], x: Tensor, times: Tensor, noise: Callable[[], Tensor]
) -> Tensor:
    """Heun's method: the step's noise first, then a trapezoid step of the drift; two evaluations a step."""
    for t, t_next in zip(times[:-1], times[1:], strict=True):
        h = t_next - t
        x = x + (2 * diffusion(t) * h).sqrt() * noise()
        k1 = drift(x, t)
        k2 = drift(x + h * k1, t_next)
        x = x + h * (k1 + k2) / 2
    return x


def last_step(
    kind: LastStep, model: Model, config: TransportConfig, channels: int, form: Form = "sigma", norm: float = 1.0
) -> Callable[[Tensor, Tensor, float], Tensor]:
    """The noiseless step f(x, t, size) from the end of the noisy ones to data: one network evaluation, or none.

    mean: a step of the SDE's drift. euler: of the velocity. tweedie: the data's expectation given x,
    (x + sigma_t^2 score) / alpha_t, whatever the size. none: x.
    """

    def step(x: Tensor, t: Tensor, size: float) -> Tensor:
        if kind == "none":
            return x
        output = model(x, t)[:, :channels]
        if kind == "tweedie":
            alpha_t, sigma_t, _, _ = at(config.path, t, x)
            return (x + sigma_t.square() * to_score(output, x, t, config)) / alpha_t
        change = to_velocity(output, x, t, config)
        if kind == "mean":
            w_t = diffusion_coefficient(form, t, config.path, norm)
            change = change + w_t * to_score(output, x, t, config)
        return x + size * change

    return step
