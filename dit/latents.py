"""Latents on disk and in training: posterior moments in safetensors shards, and batches as a function of the step.

A shard holds `mean` and `std` (n, C, h, w) float16 and `label` (n,), and, where images may be mirrored, `mean_mirror`
and `std_mirror` of each mirror image. Where `encode.features` asks for it, it holds `features` (n, L, E) float16 too,
L vectors of E numbers for each image (see `dit.embeddings`), and `features_mirror` where the mirror image has others.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class EncodeConfig:
    """How raw latents are brought to unit scale (by the autoencoder's one factor, or channel by channel), and what is
    kept beside them of each image: a file of features, or the name of an extractor."""

    normalization: Literal["scale", "channel"] = "scale"
    features: str | None = None

    def __post_init__(self) -> None:
        if self.features is not None and not self.features.strip():
            raise ValueError("features must be a file, an extractor's name or null, got an empty text")


def read_index(folder: Path) -> dict[str, Any]:
    """index.json of an encode folder. Raises ValueError where there is none."""
    try:
        return json.loads((folder / "index.json").read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        raise ValueError(f"{folder} holds no latents (index.json is missing or torn): run the stage `encode`") from None


def index_digest(index: dict[str, Any]) -> str:
    """sha256 over what training sees: the training shards' content (features too, not where they are from), the scale,
    the classes."""
    seen = [s["sha256"] for s in index["shards"] if s["split"] == "train"]
    return hashlib.sha256(json.dumps([seen, index["normalization"], index["classes"]]).encode()).hexdigest()


def require_autoencoder(index_or_config: dict[str, Any], digest: str, what: str) -> None:
    """Raise ValueError unless latents or a model belong to the autoencoder with this digest.

    Imported weights may not know theirs (None): then any is taken on trust.
    """
    theirs = index_or_config["autoencoder"]
    if theirs is not None and theirs != digest:
        raise ValueError(
            f"{what} belong to another autoencoder ({theirs[:12]}) than the one given ({digest[:12]}): "
            f"their numbers mean nothing to it; run `dvc repro` so that both come from the same one"
        )


def draw(batch: dict[str, Tensor], shift: Tensor, scale: Tensor, noise: Tensor, mirror: Tensor | None) -> Tensor:
    """Latents sampled from their posterior and normalised: (mean + std noise - shift) / scale, (N, C, h, w).

    `mirror` (N,) bool picks the mirror image's moments.
    """
    mean, std = batch["mean"].float(), batch["std"].float()
    if mirror is not None:
        pick = mirror.view(-1, 1, 1, 1)
        mean = torch.where(pick, batch["mean_mirror"].float(), mean)
        std = torch.where(pick, batch["std_mirror"].float(), std)
    return (mean + std * noise - shift) / scale


def pick_features(batch: dict[str, Tensor], mirror: Tensor | None) -> Tensor:
    """A batch's features (N, L, E), float32; the mirror image's where `mirror` (N,) bool says so and it has its own."""
    features = batch["features"].float()
    if mirror is None or "features_mirror" not in batch:
        return features
    return torch.where(mirror.view(-1, 1, 1), batch["features_mirror"].float(), features)


class Statistics:
    """Running mean and standard deviation of latents per channel, posterior spread included; float64, mergeable."""

    def __init__(self, channels: int):
        self.count = 0
        self.sum = torch.zeros(channels, dtype=torch.float64)
        self.squares = torch.zeros(channels, dtype=torch.float64)

    def add(self, mean: Tensor, std: Tensor) -> None:
        """Moments (N, C, h, w) of N more images."""
        mean, std = mean.double(), std.double()
        self.count += mean.numel() // mean.shape[1]
        self.sum += mean.sum(dim=(0, 2, 3))
        self.squares += (mean.square() + std.square()).sum(dim=(0, 2, 3))

    def __iter__(self) -> Iterator[list[float]]:
        """mean, std."""
        mean = self.sum / self.count
        yield mean.tolist()
        yield (self.squares / self.count - mean.square()).clamp(min=0).sqrt().tolist()
