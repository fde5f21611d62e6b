"""The steps of a diffusion chain: how much noise each one adds, and which ones a shorter chain keeps.

A schedule is its betas (T,), float64, from the cleanest step to the noisiest.
"""

import math

import torch
from torch import Tensor

NUM_TIMESTEPS = 1000


def linear_betas(num_timesteps: int = NUM_TIMESTEPS) -> Tensor:
    """The linear schedule of DDPM, scaled so that any number of steps ends at about the same noise; float64."""
    scale = 1000 / num_timesteps
    return torch.linspace(scale * 1e-4, scale * 0.02, num_timesteps, dtype=torch.float64)


def cosine_betas(num_timesteps: int = NUM_TIMESTEPS) -> Tensor:
    """The cosine schedule of arXiv 2102.09672, equation 17, with betas of at most 0.999; float64."""

    def alpha_bar(u: Tensor) -> Tensor:
        return ((u + 0.008) / 1.008 * math.pi / 2).cos().square()

    step = torch.arange(num_timesteps, dtype=torch.float64)
    return (1 - alpha_bar((step + 1) / num_timesteps) / alpha_bar(step / num_timesteps)).clamp(max=0.999)


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
