"""Stochastic interpolants (SiT, arXiv 2401.08740): three paths from noise to data, three things to learn on them.

Time t in [0, 1]: t = 0 is noise, t = 1 is data, x_t = alpha_t x + sigma_t noise. (The paper's text runs the other way.)
A network learns the path's velocity d x_t / dt, the score (the gradient of log p_t), or the noise. Each gives the other
two, so that a sampler asks for `velocity_of` or `score_of` a network, whatever it learned.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import pi
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Model = Callable[[Tensor, Tensor], Tensor]

SMALL_TIME = 1e-3  # how far from t = 0 and t = 1 a formula that divides by alpha_t or sigma_t is kept
BETA_MIN, BETA_MAX = 0.1, 20.0  # of the VP path
# A vector shorter than this has no direction yet. The network begins by predicting 0, where the gradient of a cosine has
# no bound: Adam's second moment would remember the first steps for thousands.
SMALL_NORM = 0.1


@dataclass(frozen=True)
class TransportConfig:
    """What is learned, where: defaults are the published SiT's.

    path: alpha_t and sigma_t. prediction: what the network's first C channels are. weighting: of the squared error in
    time, for score and noise (a velocity's error is the weighted one already). times: how often each time is trained
    on; logit_mean and logit_std are the logit-normal law's. direction_weight: of 1 - cos(output, target).
    """

    path: Literal["linear", "gvp", "vp"] = "linear"
    prediction: Literal["velocity", "score", "noise"] = "velocity"
    weighting: Literal["uniform", "velocity", "likelihood"] = "uniform"
    times: Literal["uniform", "logit_normal"] = "uniform"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    direction_weight: float = 0.0

    def __post_init__(self) -> None:
        if self.prediction == "velocity" and self.weighting != "uniform":
            raise ValueError(
                f"weighting {self.weighting!r} is for prediction score or noise: use uniform with prediction velocity"
            )
        if self.prediction != "velocity" and self.direction_weight:
            raise ValueError(f"direction_weight needs prediction velocity, got {self.prediction!r}: set it to 0")
        if self.direction_weight < 0:
            raise ValueError(f"direction_weight must be 0 or more, got {self.direction_weight}")
        if not self.logit_std > 0:
            raise ValueError(f"logit_std must be positive, got {self.logit_std}")
        if self.times == "uniform" and (self.logit_mean, self.logit_std) != (0.0, 1.0):
            raise ValueError("logit_mean and logit_std are for times logit_normal: leave them at 0 and 1 with uniform")


def linear_path(t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """alpha_t, sigma_t, d_alpha_t, d_sigma_t of the linear path, each of t's shape."""
    return t, 1 - t, torch.ones_like(t), -torch.ones_like(t)


def gvp_path(t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same of the generalised variance preserving path: a quarter of a circle."""
    angle = t * pi / 2
    return angle.sin(), angle.cos(), angle.cos() * pi / 2, -angle.sin() * pi / 2


def vp_path(t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same of the variance preserving path (arXiv 2011.13456, equation 29): alpha_0 is 0.0066, not 0.

    log alpha_t is minus half of the integral of beta from t to 1, with beta falling linearly from 20 to 0.1.
    """
    u, slope = 1 - t, BETA_MAX - BETA_MIN
    log_alpha = -u.square() * slope / 4 - u * BETA_MIN / 2
    d_log_alpha = u * slope / 2 + BETA_MIN / 2
    alpha_t, sigma_t = log_alpha.exp(), (-torch.expm1(2 * log_alpha)).sqrt()
    return alpha_t, sigma_t, alpha_t * d_log_alpha, -alpha_t.square() * d_log_alpha / sigma_t


PATHS = {"linear": linear_path, "gvp": gvp_path, "vp": vp_path}


def at(path: str, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """alpha_t, sigma_t, d_alpha_t, d_sigma_t at times t, () or (N,), shaped to multiply x (N, ...).

    Those of one time () are scalars, of t's device: one on the CPU multiplies an x of any device.
    """
    return PATHS[path](t.reshape(-1, *[1] * (x.dim() - 1)) if t.dim() else t)


def interpolate(x: Tensor, noise: Tensor, t: Tensor, path: str = "linear") -> tuple[Tensor, Tensor]:
    """x_t and its velocity d x_t / dt for clean latents x (N, C, H, W) and times t (N,)."""
    alpha_t, sigma_t, d_alpha_t, d_sigma_t = at(path, t, x)
    return alpha_t * x + sigma_t * noise, d_alpha_t * x + d_sigma_t * noise


def score_gain(path: str, t: Tensor) -> Tensor:
    """sigma_t (sigma_t alpha'_t / alpha_t - sigma'_t), of t's shape: velocity = alpha'_t / alpha_t x + gain score.

    It is (1 - t) / t on the linear path, infinite at t = 0; pi/2 cot(pi t / 2) on GVP; beta_t / 2 on VP.
    """
    alpha_t, sigma_t, d_alpha_t, d_sigma_t = PATHS[path](t)
    return sigma_t * (d_alpha_t / alpha_t * sigma_t - d_sigma_t)


def velocity_from_score(score: Tensor, x_t: Tensor, t: Tensor, path: str) -> Tensor:
    """alpha'/alpha x_t + gain score (SiT, section 2.2). Infinite where alpha_t is 0 (t = 0 on linear and GVP)."""
    alpha_t, sigma_t, d_alpha_t, d_sigma_t = at(path, t, x_t)
    rate = d_alpha_t / alpha_t
    return rate * x_t + sigma_t * (rate * sigma_t - d_sigma_t) * score


def score_from_velocity(velocity: Tensor, x_t: Tensor, t: Tensor, path: str) -> Tensor:
    """(alpha/alpha' v - x_t) / (sigma^2 - alpha/alpha' sigma sigma'), the inverse. Infinite where sigma_t is 0."""
    alpha_t, sigma_t, d_alpha_t, d_sigma_t = at(path, t, x_t)
    reciprocal = alpha_t / d_alpha_t
    return (reciprocal * velocity - x_t) / (sigma_t * (sigma_t - reciprocal * d_sigma_t))


def noise_from_velocity(velocity: Tensor, x_t: Tensor, t: Tensor, path: str) -> Tensor:
    """(alpha/alpha' v - x_t) / (alpha/alpha' sigma' - sigma): finite everywhere on linear and GVP."""
    alpha_t, sigma_t, d_alpha_t, d_sigma_t = at(path, t, x_t)
    reciprocal = alpha_t / d_alpha_t
    return (reciprocal * velocity - x_t) / (reciprocal * d_sigma_t - sigma_t)


def score_from_noise(noise: Tensor, t: Tensor, path: str) -> Tensor:
    """score = -noise / sigma_t, infinite where sigma_t is 0."""
    return -noise / at(path, t, noise)[1]


def to_velocity(output: Tensor, x_t: Tensor, t: Tensor, config: TransportConfig) -> Tensor:
    """The velocity that a network's prediction (N, C, ...) at x_t and t means."""
    if config.prediction == "velocity":
        return output
    score = output if config.prediction == "score" else score_from_noise(output, t, config.path)
    return velocity_from_score(score, x_t, t, config.path)


def to_score(output: Tensor, x_t: Tensor, t: Tensor, config: TransportConfig) -> Tensor:
    """The score that a network's prediction (N, C, ...) at x_t and t means."""
    if config.prediction == "score":
        return output
    if config.prediction == "noise":
        return score_from_noise(output, t, config.path)
    return score_from_velocity(output, x_t, t, config.path)


def velocity_of(model: Model, config: TransportConfig, channels: int) -> Model:
    """The velocity f(x, t) of a network: its first `channels` outputs (learned sigma, the other half, is unused)."""
    return lambda x, t: to_velocity(model(x, t)[:, :channels], x, t, config)


def score_of(model: Model, config: TransportConfig, channels: int) -> Model:
    """The score f(x, t) of a network, from its first `channels` outputs."""
    return lambda x, t: to_score(model(x, t)[:, :channels], x, t, config)


def training_interval(config: TransportConfig) -> tuple[float, float]:
    """The times that are trained on. Score and noise stay off the ends, where their velocity is infinite.

    As the published code has them; it also takes an argument `train_eps`, which it forgets for some settings.
    """
    if config.path == "vp":
        return 0.0, 1 - 1e-5
    return (0.0, 1.0) if config.prediction == "velocity" else (SMALL_TIME, 1 - SMALL_TIME)


def interval(config: TransportConfig) -> tuple[float, float]:
    """The times that an ODE is solved over, from noise to data; (t1, t0) encodes data as noise.

    The published code's `reverse` mirrors the interval instead, (1 - t0, 1 - t1): the same on the linear and GVP paths,
    but on VP, whose interval is not symmetric, it begins where sigma_t is 0 and stops short of the noise. Its
    `sample_eps` is dropped, or becomes None, unless `train_eps` is given too; here there are no such arguments.
    """
    if config.path == "vp":
        return 0.0, 1 - SMALL_TIME
    return training_interval(config)


def sample_times(uniform: Tensor, config: TransportConfig = TransportConfig()) -> Tensor:
    """Training times (N,) from uniforms (N,) of [0, 1): one draw a time, whatever the law.

    The logit-normal law (arXiv 2403.03206, section 3.1) by its inverse: t = sigmoid(mean + std Phi^-1(u)).
    """
    t0, t1 = training_interval(config)
    if config.times == "logit_normal":
        uniform = torch.sigmoid(config.logit_mean + config.logit_std * torch.special.ndtri(uniform))
    return uniform * (t1 - t0) + t0


def weight(config: TransportConfig, t: Tensor) -> Tensor:
    """The weight of the squared error of the noise (sigma_t times the score's), of t's shape.

    velocity: (gain / sigma_t)^2, which makes it the velocity's squared error; likelihood: gain / sigma_t^2, which
    makes it a bound of the log-likelihood (arXiv 2101.09258, theorem 1).
    """
    if config.weighting == "uniform":
        return torch.ones_like(t)
    gain, sigma_t = score_gain(config.path, t), PATHS[config.path](t)[1]
    return (gain / sigma_t).square() if config.weighting == "velocity" else gain / sigma_t.square()


def training_loss(
    model: Callable[[Tensor, Tensor, Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    t: Tensor,
    noise: Tensor,
    config: TransportConfig = TransportConfig(),
) -> Tensor:
    """The squared error of what `config` predicts, (N,), at times t (N,) for clean latents x (N, C, H, W) and labels y.

    With a direction weight, 1 - cos of the angle between a position's channels (C,) as predicted and as they should
    be, averaged over positions, is added (arXiv 2501.01423).
    """
    x_t, target = interpolate(x, noise, t, config.path)
    output = model(x_t, t, y)[:, : x.shape[1]].float()
    if config.prediction == "velocity":
        loss = (output - target).square().mean(dim=(1, 2, 3))
        if config.direction_weight:
            cosine = F.cosine_similarity(output, target, dim=1, eps=SMALL_NORM)
            loss = loss + config.direction_weight * (1 - cosine).mean(dim=(1, 2))
        return loss
    sigma_t = at(config.path, t, x)[1]
    error = output - noise if config.prediction == "noise" else sigma_t * output + noise
    return weight(config, t) * error.square().mean(dim=(1, 2, 3))
