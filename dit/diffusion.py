"""Discrete-time Gaussian diffusion (DDPM, arXiv 2006.11239; learned range of variances, arXiv 2102.09672).

Integer steps t = 0 (cleanest) .. T-1 (noisiest). A chain may be respaced to fewer steps; the network is then asked
at the original indices. Tables are float64; what is gathered from them is float32.
"""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

NUM_TIMESTEPS = 1000


def linear_betas(num_timesteps: int = NUM_TIMESTEPS) -> Tensor:
    """The linear schedule of DDPM, scaled so that any number of steps ends at about the same noise; float64."""
    scale = 1000 / num_timesteps
    return torch.linspace(scale * 1e-4, scale * 0.02, num_timesteps, dtype=torch.float64)


class Diffusion:
    """The tables of one chain: `betas` (T,) float64, and `timestep_map` (T,), the original index of each step."""

    def __init__(self, betas: Tensor, timestep_map: Tensor | None = None):
        self.betas = betas
        self.num_timesteps = len(betas)
        self._on_device: dict[tuple[str, torch.device], Tensor] = {}
        self.timestep_map = torch.arange(self.num_timesteps) if timestep_map is None else timestep_map
        alphas = 1 - betas
        self.alphas_bar = alphas.cumprod(0)
        one = torch.ones(1, dtype=torch.float64)
        self.alphas_bar_prev = torch.cat([one, self.alphas_bar[:-1]])
        self.sqrt_alphas_bar = self.alphas_bar.sqrt()
        self.sqrt_one_minus_alphas_bar = (1 - self.alphas_bar).sqrt()
        self.sqrt_reciprocal_alphas_bar = (1 / self.alphas_bar).sqrt()
        self.sqrt_reciprocal_alphas_bar_less_1 = (1 / self.alphas_bar - 1).sqrt()
        self.log_betas = betas.log()
        # q(x_{t-1} | x_t, x) = N(coef1 x + coef2 x_t, variance), DDPM equations 6 and 7
        self.posterior_variance = betas * (1 - self.alphas_bar_prev) / (1 - self.alphas_bar)
        clipped = torch.cat([self.posterior_variance[1:2], self.posterior_variance[1:]])  # the first is 0: no log
        self.posterior_log_variance = clipped.log()
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

    def predict_x(self, x_t: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """Clean latents from predicted noise."""
        return self.at("sqrt_reciprocal_alphas_bar", t) * x_t - self.at("sqrt_reciprocal_alphas_bar_less_1", t) * eps

    def p_mean_log_variance(
        self, output: Tensor, x_t: Tensor, t: Tensor, clip: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """p(x_{t-1} | x_t) from the network's 2C channels: mean, log variance, predicted x, each (N, C, H, W).

        The log variance is interpolated between those of the posterior (v = -1) and beta (v = +1): arXiv 2102.09672,
        equation 15.
        """
        eps, v = output.chunk(2, dim=1)
        fraction = (v + 1) / 2
        log_variance = fraction * self.at("log_betas", t) + (1 - fraction) * self.at("posterior_log_variance", t)
        x = self.predict_x(x_t, t, eps)
        if clip:
            x = x.clamp(-1, 1)
        return self.posterior_mean(x, x_t, t), log_variance, x

    def loss(self, output: Tensor, x: Tensor, x_t: Tensor, noise: Tensor, t: Tensor) -> dict[str, Tensor]:
        """MSE on the noise plus the variational bound in bits per dimension, each (N,); their sum is `loss`.

        The bound trains the variance alone: the mean's part is detached (arXiv 2102.09672, section 3.1), and it has
        weight 1, as DiT was trained.
        """
        eps, v = output.chunk(2, dim=1)
        mse = (noise - eps).square().mean(dim=(1, 2, 3))
        vb = self.bits(torch.cat([eps.detach(), v], dim=1), x, x_t, t)
        return {"loss": mse + vb, "mse": mse, "vb": vb}

    def bits(self, output: Tensor, x: Tensor, x_t: Tensor, t: Tensor, clip: bool = False) -> Tensor:
        """One term of the variational bound, (N,) bits per dimension: a KL for t > 0, a likelihood at t = 0."""
        mean, log_variance, _ = self.p_mean_log_variance(output, x_t, t, clip)
        true_mean, true_log_variance = self.posterior_mean(x, x_t, t), self.at("posterior_log_variance", t)
        kl = gaussian_kl(true_mean, true_log_variance, mean, log_variance)
        nll = -discretized_gaussian_log_likelihood(x, mean, 0.5 * log_variance)
        return torch.where(t == 0, nll.mean(dim=(1, 2, 3)), kl.mean(dim=(1, 2, 3))) / math.log(2)


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


def space_timesteps(num_timesteps: int, spec: str) -> list[int]:
    """The steps that a respaced chain keeps, sorted.

    `spec`: "" (all), "250" (one section of 250), "10,15,20" (sections of equal length, so many steps of each), or
    "ddim25" (a constant integer stride from 0). Raises ValueError where a section is too short or no stride fits.
    """
    if not spec:
        return list(range(num_timesteps))
    if spec.startswith("ddim"):
        count = int(spec.removeprefix("ddim"))
        for stride in range(1, num_timesteps + 1):
            if len(range(0, num_timesteps, stride)) == count:
                return list(range(0, num_timesteps, stride))
        raise ValueError(f"no whole stride gives {count} of {num_timesteps} steps")
    counts = [int(part) for part in spec.split(",")]
    size, extra = divmod(num_timesteps, len(counts))
    steps, start = set(), 0
    for section, count in enumerate(counts):
        length = size + (section < extra)
        if count > length:
            raise ValueError(f"a section of {length} steps cannot give {count}")
        stride = 1.0 if count <= 1 else (length - 1) / (count - 1)
        position = 0.0
        for _ in range(count):
            steps.add(start + round(position))
            position += stride  # added up and not multiplied: the rounding of published chains depends on it
        start += length
    return sorted(steps)


def respace(diffusion: Diffusion, steps: Iterable[int]) -> Diffusion:
    """The chain that visits only `steps` of `diffusion`, with the same marginals there."""
    kept = torch.tensor(sorted(steps))
    alphas_bar = diffusion.alphas_bar[kept]
    previous = torch.cat([torch.ones(1, dtype=torch.float64), alphas_bar[:-1]])
    return Diffusion(1 - alphas_bar / previous, diffusion.timestep_map[kept])


def training_loss(
    diffusion: Diffusion,
    model: Callable[[Tensor, Tensor, Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    t: Tensor,
    noise: Tensor,
) -> Tensor:
    """Loss (N,) of the network at steps t (N,) for clean latents x (N, C, H, W) and labels y (N,)."""
    x_t = diffusion.q_sample(x, t, noise)
    output = model(x_t, diffusion.original(t), y)
    return diffusion.loss(output.float(), x, x_t, noise, t)["loss"]
