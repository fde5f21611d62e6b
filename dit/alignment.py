"""Representation alignment (arXiv 2410.06940): while the network learns to denoise, the tokens in its middle also learn
to tell, through a small projector, what a feature extractor sees in the clean image.

The projector is trained with the network and thrown away after: it is part of the training, not of the model.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class AlignmentConfig:
    """The term `weight` (1 - cos), of the tokens after block number `block` (from 1); weight 0 = off."""

    weight: float = 0.0
    block: int = 1
    stop_step: int | None = None  # the first step without it; null = it stays to the end
    projector_size: int = 2048

    def __post_init__(self) -> None:
        if self.weight < 0:
            raise ValueError(f"weight must not be negative (0 = off), got {self.weight}")
        for name in ("block", "stop_step", "projector_size"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")

    def active_at(self, step: int) -> bool:
        """Whether the term is part of the loss of this step (0-based)."""
        return self.weight > 0 and (self.stop_step is None or step < self.stop_step)


def new_projector(hidden_size: int, config: AlignmentConfig, channels: int, seed: int) -> nn.Sequential:
    """The three-layer MLP of the paper, (..., D) -> (..., E); its first weights are a function of the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        width = config.projector_size
        return nn.Sequential(
            nn.Linear(hidden_size, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, channels)
        )


def require_alignment(
    config: AlignmentConfig, depth: int, shape: tuple[int, ...] | None, *, mirrored: bool = True
) -> None:
    """Raise ValueError where alignment is asked for and cannot be: `shape` (L, E) is that of each image's features.

    `mirrored` false: mirror images are trained on, and have no features but those of the image itself. A grid of them
    would tell of the other side.
    """
    if not config.weight:
        return
    if config.block > depth:
        raise ValueError(f"objective.alignment.block: {config.block} is more than the network's {depth} blocks")
    if shape is None:
        raise ValueError(
            "objective.alignment.weight: the latents carry no features to align with: "
            "set encode.features, or the weight to 0"
        )
    if math.isqrt(shape[0]) ** 2 != shape[0]:
        raise ValueError(
            f"objective.alignment.weight: {shape[0]} feature vectors an image are neither one nor a square grid: "
            "store one or a grid (encode.features), or set the weight to 0"
        )
    if shape[0] > 1 and not mirrored:
        raise ValueError(
            "encode.features: the file has no features_mirror for mirror images: add them, or set data.mirror to false"
        )


def alignment_loss(projector: nn.Module, tokens: Tensor, features: Tensor) -> Tensor:
    """1 - cos(projected token, its feature), averaged over the tokens: (N,), from 0 to 2. Equation 8 of the paper, plus
    the constant 1.

    tokens (N, T, D), a square grid row by row. features (N, L, E): a grid too, which is brought to the tokens' one by
    bilinear interpolation; or one for the whole image (L = 1), which is compared with the mean token.
    """
    if features.shape[1] == 1:
        tokens = tokens.mean(1, keepdim=True)
    target = to_grid(features.float(), tokens.shape[1])
    return 1 - F.cosine_similarity(projector(tokens).float(), target, dim=-1).mean(1)


def to_grid(features: Tensor, num_tokens: int) -> Tensor:
    """(N, L, E), a square grid row by row -> (N, T, E), the same picture in T squares."""
    N, L, E = features.shape
    if num_tokens == L:
        return features
    side, wanted = math.isqrt(L), math.isqrt(num_tokens)
    grid = features.transpose(1, 2).reshape(N, E, side, side)
    grid = F.interpolate(grid, size=(wanted, wanted), mode="bilinear", align_corners=False, antialias=wanted < side)
    return grid.flatten(2).transpose(1, 2)
