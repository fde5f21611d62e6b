"""Discrete-time Gaussian diffusion (DDPM, arXiv 2006.11239; learned variances, arXiv 2102.09672): one chain's
distributions, what the network's output means in it, its losses and its bound.

Integer steps t = 0 (cleanest) .. T-1 (noisiest). A chain may be respaced to fewer steps; the network is then asked
at the original indices. Tables are float64; what is gathered from them is float32.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from dit.timesteps import NUM_TIMESTEPS, cosine_betas, linear_betas, space_timesteps

Schedule = Literal["linear", "cosine"]
Prediction = Literal["epsilon", "x", "v"]
Variance = Literal["learned_range", "learned", "fixed_large", "fixed_small"]
Loss = Literal["mse", "rescaled_mse", "kl", "rescaled_kl"]


@dataclass(frozen=True)
class DiffusionConfig:
    """What the network predicts, and how it is asked to. The defaults are DiT's.

    rescaled_mse is mse in every training here: the two differ on a respaced chain only, and the full one is trained on.
    """

    schedule: Schedule = "linear"
    prediction: Prediction = (
        "epsilon"  # the noise; the clean latents; v = sqrt(alpha_bar) noise - sqrt(1 - alpha_bar) x
    )
    variance: Variance = "learned_range"
    loss: Loss = "mse"

    def __post_init__(self) -> None:
        choices = {"schedule": Schedule, "prediction": Prediction, "variance": Variance, "loss": Loss}
        for name, choice in choices.items():
            if getattr(self, name) not in get_args(choice):
                raise ValueError(f"{name} must be one of {', '.join(get_args(choice))}, got {getattr(self, name)!r}")

    @property
    def learns_variance(self) -> bool:
        """Whether the network gives C more channels, for the variance."""
        return self.variance in ("learned_range", "learned")


class Diffusion:
    """The tables of one chain: `betas` (T,) float64, and `timestep_map` (T,), the original index of each step."""

    def __init__(
        self, betas: Tensor, timestep_map: Tensor | None = None, config: DiffusionConfig = DiffusionConfig()
    ) -> None:
        self.betas, self.config = betas, config
        self.num_timesteps = len(betas)
        self._on_device: dict[tuple[str, torch.device], Tensor] = {}
        self.timestep_map = torch.arange(self.num_timesteps) if timestep_map is None else timestep_map
        alphas = 1 - betas
        self.alphas_bar = alphas.cumprod(0)
        one = torch.ones(1, dtype=torch.float64)
        self.alphas_bar_prev = torch.cat([one, self.alphas_bar[:-1]])
        self.alphas_bar_next = torch.cat([self.alphas_bar[1:], 0 * one])
        self.sqrt_alphas_bar = self.alphas_bar.sqrt()
        self.sqrt_one_minus_alphas_bar = (1 - self.alphas_bar).sqrt()
        self.sqrt_reciprocal_alphas_bar = (1 / self.alphas_bar).sqrt()
        self.sqrt_reciprocal_alphas_bar_less_1 = (1 / self.alphas_bar - 1).sqrt()
        self.log_betas = betas.log()
        # q(x_{t-1} | x_t, x) = N(coef1 x + coef2 x_t, variance), DDPM equations 6 and 7
        self.posterior_variance = betas * (1 - self.alphas_bar_prev) / (1 - self.alphas_bar)
        second = self.posterior_variance[1:2]  # stands in for the first, which is 0 and has no log
        self.posterior_log_variance = torch.cat([second, self.posterior_variance[1:]]).log()
        self.large_log_variance = torch.cat([second, betas[1:]]).log()
        self.posterior_coef1 = betas * self.alphas_bar_prev.sqrt() / (1 - self.alphas_bar)
        self.posterior_coef2 = (1 - self.alphas_bar_prev) * alphas.sqrt() / (1 - self.alphas_bar)

    def at(self, name: str, t: Tensor) -> Tensor:
        """The table of this name at steps t (N,), as float32 (N, 1, 1, 1) on t's device."""
        # Kept per device: a copy at every use would make the host wait for the device.
        key = name, t.device
        if key not in self._on_device:
            self._on_device[key] = getattr(self, name).float().to(t.device)
        return self._on_device[key][t].view(-1, 1, 1, 1)

    def original(self, t: Tensor) -> Tensor:
        """The steps of the full chain that steps t (N,) of this one stand for: what the network is asked at."""
        return self.at("timestep_map", t).view(-1).long()

    def q_sample(self, x: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t given clean latents x: DDPM equation 4."""
        return self.at("sqrt_alphas_bar", t) * x + self.at("sqrt_one_minus_alphas_bar", t) * noise

    def posterior_mean(self, x: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The mean of q(x_{t-1} | x_t, x)."""
        return self.at("posterior_coef1", t) * x + self.at("posterior_coef2", t) * x_t

    def target(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the network should predict. v: arXiv 2202.00512, appendix D."""
        match self.config.prediction:
            case "epsilon":
                return noise
            case "x":
                return x
            case "v":
                return self.at("sqrt_alphas_bar", t) * noise - self.at("sqrt_one_minus_alphas_bar", t) * x

    def predict_x(self, x_t: Tensor, t: Tensor, prediction: Tensor) -> Tensor:
        """Clean latents from the network's prediction."""
        match self.config.prediction:
            case "epsilon":
                r, r_less_1 = self.at("sqrt_reciprocal_alphas_bar", t), self.at("sqrt_reciprocal_alphas_bar_less_1", t)
                return r * x_t - r_less_1 * prediction
            case "x":
                return prediction
            case "v":
                return self.at("sqrt_alphas_bar", t) * x_t - self.at("sqrt_one_minus_alphas_bar", t) * prediction

    def noise_between(self, x: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The noise that leads from clean latents x to x_t."""
        return (x_t - self.at("sqrt_alphas_bar", t) * x) / self.at("sqrt_one_minus_alphas_bar", t)

    def predict(self, output: Tensor, x_t: Tensor, t: Tensor, clip: bool = False) -> tuple[Tensor, Tensor]:
        """Clean latents and noise from the network's output; with `clip`, of latents held within [-1, 1]."""
        prediction = output[:, : x_t.shape[1]]
        x = self.predict_x(x_t, t, prediction)
        if clip:
            x = x.clamp(-1, 1)
        elif self.config.prediction == "epsilon":
            return x, prediction
        return x, self.noise_between(x, x_t, t)

    def log_variance(self, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """log of the variance of p(x_{t-1} | x_t), (N, C, H, W).

        learned_range interpolates between the posterior's (v = -1) and beta (v = +1): arXiv 2102.09672, equation 15.
        Raises ValueError where it is learned and the output has no channels for it.
        """
        if not self.config.learns_variance:
            name = "large_log_variance" if self.config.variance == "fixed_large" else "posterior_log_variance"
            return self.at(name, t).expand_as(x_t)
        v = require_variance(output, x_t.shape[1], self.config)[:, x_t.shape[1] :]
        if self.config.variance == "learned":
            return v
        fraction = (v + 1) / 2
        return fraction * self.at("log_betas", t) + (1 - fraction) * self.at("posterior_log_variance", t)

    def p_mean_log_variance(
        self, output: Tensor, x_t: Tensor, t: Tensor, clip: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """p(x_{t-1} | x_t) from the network's output: mean, log variance, predicted x, each (N, C, H, W).

        The output has 2C channels where the variance is learned; else its first C count.
        """
        log_variance = self.log_variance(output, x_t, t)
        x = self.predict_x(x_t, t, output[:, : x_t.shape[1]])
        if clip:
            x = x.clamp(-1, 1)
        return self.posterior_mean(x, x_t, t), log_variance, x

    def loss(self, output: Tensor, x: Tensor, x_t: Tensor, noise: Tensor, t: Tensor) -> dict[str, Tensor]:
        """The configured loss (N,) as `loss`, and its parts `mse` and `vb`, the bound's term in bits per dimension.

        mse: the squared error of the prediction and, where the variance is learned, the bound. It trains the variance
        alone: the mean's part is detached (arXiv 2102.09672, section 3.1), and it has weight 1, as DiT was trained,
        or T / 1000 (rescaled_mse: a respaced chain's bound weighs as the full one's does). kl: the bound alone, and
        rescaled_kl T times that, an estimate of the whole bound.
        """
        if self.config.loss in ("kl", "rescaled_kl"):
            vb = self.bits(output, x, x_t, t)
            return {"loss": vb * self.num_timesteps if self.config.loss == "rescaled_kl" else vb, "vb": vb}
        C = x.shape[1]
        prediction = output[:, :C]
        mse = (self.target(x, noise, t) - prediction).square().mean(dim=(1, 2, 3))
        if not self.config.learns_variance:
            return {"loss": mse, "mse": mse}
        vb = self.bits(torch.cat([prediction.detach(), output[:, C:]], dim=1), x, x_t, t)
        if self.config.loss == "rescaled_mse":
            vb = vb * (self.num_timesteps / 1000)
        return {"loss": mse + vb, "mse": mse, "vb": vb}

    def bits(self, output: Tensor, x: Tensor, x_t: Tensor, t: Tensor, clip: bool = False) -> Tensor:
        """One term of the variational bound, (N,) bits per dimension: a KL for t > 0, a likelihood at t = 0."""
        mean, log_variance, _ = self.p_mean_log_variance(output, x_t, t, clip)
        true_mean, true_log_variance = self.posterior_mean(x, x_t, t), self.at("posterior_log_variance", t)
        kl = gaussian_kl(true_mean, true_log_variance, mean, log_variance)
        nll = -discretized_gaussian_log_likelihood(x, mean, 0.5 * log_variance)
        return torch.where(t == 0, nll.mean(dim=(1, 2, 3)), kl.mean(dim=(1, 2, 3))) / math.log(2)

    def prior_bits(self, x: Tensor) -> Tensor:
        """KL(q(x_{T-1} | x) || N(0, 1)), (N,) bits per dimension: the bound's term that no network changes."""
        t = torch.full((len(x),), self.num_timesteps - 1, device=x.device)
        log_variance = (1 - self.at("alphas_bar", t)).log()
        kl = gaussian_kl(self.at("sqrt_alphas_bar", t) * x, log_variance, torch.zeros_like(x), torch.zeros_like(x))
        return kl.mean(dim=(1, 2, 3)) / math.log(2)


def require_variance(output: Tensor, channels: int, config: DiffusionConfig) -> Tensor:
    """The output, if it has the channels for a learned variance. Raises ValueError if not."""
    if output.shape[1] != 2 * channels:
        raise ValueError(
            f"objective.diffusion.variance {config.variance!r} needs {2 * channels} output channels and the network has "
            f"{output.shape[1]}: set model.learn_sigma to true, or the variance to fixed_large or fixed_small"
        )
    return output


def gaussian_kl(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """KL(N(mean1, variance1) || N(mean2, variance2)) per element, in nats."""
    return 0.5 * (
        log_variance2
        - log_variance1
        + (log_variance1 - log_variance2).exp()
        + (mean1 - mean2).square() * (-log_variance2).exp()
        - 1
    )


def discretized_gaussian_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Log of the mass of a bin of half-width 1/255 around x, per element, in nats; the outer bins are open-ended."""
    inverse = (-log_scale).exp()
    upper = _normal_cdf(inverse * (x - mean + 1 / 255))
    lower = _normal_cdf(inverse * (x - mean - 1 / 255))
    mass = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1 - lower, upper - lower))
    return mass.clamp(min=1e-12).log()


def _normal_cdf(x: Tensor) -> Tensor:
    # The tanh approximation, not erf: the published bound was computed with it.
    return 0.5 * (1 + (math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)).tanh())


def respace(diffusion: Diffusion, steps: Iterable[int]) -> Diffusion:
    """The chain that visits only `steps` of `diffusion`, with the same marginals there."""
    kept = torch.tensor(sorted(steps))
    alphas_bar = diffusion.alphas_bar[kept]
    previous = torch.cat([torch.ones(1, dtype=torch.float64), alphas_bar[:-1]])
    return Diffusion(1 - alphas_bar / previous, diffusion.timestep_map[kept], diffusion.config)


def chain(config: DiffusionConfig = DiffusionConfig(), spacing: str = "") -> Diffusion:
    """The chain of this configuration, of all 1000 steps or those that `spacing` keeps (see `space_timesteps`)."""
    betas = linear_betas() if config.schedule == "linear" else cosine_betas()
    full = Diffusion(betas, config=config)
    return respace(full, space_timesteps(NUM_TIMESTEPS, spacing)) if spacing else full


def training_loss(
    diffusion: Diffusion,
    model: Callable[[Tensor, Tensor, Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    t: Tensor,
    noise: Tensor,
) -> Tensor:
    """Loss (N,) of the network at steps t (N,) for clean latents x (N, C, H, W) and conditions y (N, ...)."""
    x_t = diffusion.q_sample(x, t, noise)
    output = model(x_t, diffusion.original(t), y)
    return diffusion.loss(output.float(), x, x_t, noise, t)["loss"]


@torch.no_grad()
def bits_per_dim(
    diffusion: Diffusion,
    model: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    noise: Callable[[], Tensor],
    clip: bool = True,
) -> dict[str, Tensor]:
    """The variational bound of clean latents x (N, C, H, W), in bits per dimension: DDPM equation 5.

    `model(x_t, t)` takes one original step t for the whole batch, a scalar tensor on the CPU; `noise()` gives standard normal
    like x, once a step, from the noisiest to the cleanest. Returns `total` (N,) = `prior` (N,) + the sum of `vb`
    (N, T), and the mean squared errors of the predicted latents, `x_mse`, and noise, `mse` (N, T): column j is of step
    t = T-1-j. The network's term at t = 0 takes x for an image of 8 bits within [-1, 1]: for latents the number
    compares models of the same latents, and nothing else.
    """
    terms: dict[str, list[Tensor]] = {"vb": [], "x_mse": [], "mse": []}
    for step in reversed(range(diffusion.num_timesteps)):
        t = torch.full((len(x),), step, device=x.device)
        eps = noise()
        x_t = diffusion.q_sample(x, t, eps)
        output = model(x_t, diffusion.timestep_map[step]).float()
        predicted_x, predicted_noise = diffusion.predict(output, x_t, t, clip)
        terms["vb"].append(diffusion.bits(output, x, x_t, t, clip))
        terms["x_mse"].append((predicted_x - x).square().mean(dim=(1, 2, 3)))
        terms["mse"].append((predicted_noise - eps).square().mean(dim=(1, 2, 3)))
    columns = {name: torch.stack(values, dim=1) for name, values in terms.items()}
    prior = diffusion.prior_bits(x)
    return {"total": prior + columns["vb"].sum(dim=1), "prior": prior, **columns}
