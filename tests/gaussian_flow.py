"""Gaussian data, one mean and spread a channel: velocity, score and noise on any path are known, and so is every law."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dit.transport import PATHS, TransportConfig

MEANS, SPREADS = (1.5, -0.7), (0.6, 1.4)


@dataclass(frozen=True)
class GaussianFlow:
    """Data N(mean_c, spread_c^2); answers as a perfect network of any prediction would, in float64."""

    path: str
    means: tuple[float, ...] = MEANS
    spreads: tuple[float, ...] = SPREADS

    def moments(self, t: Tensor | float) -> tuple[Tensor, Tensor]:
        """Mean and variance (C, 1, 1) of x_t at one time."""
        alpha_t, sigma_t, _, _ = PATHS[self.path](torch.as_tensor(t, dtype=torch.float64))
        mean, spread = (torch.tensor(v, dtype=torch.float64)[:, None, None] for v in (self.means, self.spreads))
        return alpha_t * mean, (alpha_t * spread) ** 2 + sigma_t**2

    def answer(self, prediction: str, x: Tensor, t: Tensor) -> Tensor:
        """The expectation of the velocity or the noise given x_t = x (N, C, 1, 1), or the score there."""
        alpha_t, sigma_t, d_alpha_t, d_sigma_t = PATHS[self.path](t.double())
        mean_t, variance_t = self.moments(t)
        mean, spread = (torch.tensor(v, dtype=torch.float64)[:, None, None] for v in (self.means, self.spreads))
        noise = sigma_t * (x - mean_t) / variance_t
        data = mean + alpha_t * spread**2 * (x - mean_t) / variance_t
        return {
            "velocity": d_alpha_t * data + d_sigma_t * noise,
            "score": -(x - mean_t) / variance_t,
            "noise": noise,
        }[prediction]

    def network(self, prediction: str):
        return lambda x, t: self.answer(prediction, x, t)

    def config(self, prediction: str) -> TransportConfig:
        return TransportConfig(self.path, prediction)
