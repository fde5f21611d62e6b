"""A small classifier fitted on the data set itself: its hidden layers are a feature space, its answers a judgement.

Two layers serve as features: `hidden` (the last hidden layer, which class proportions dominate) and `pooled` (the
last convolution averaged over space). Where there are no labels the classifier learns which of four rotations it is
shown instead. How features become statistics and distances is told elsewhere: this page knows of images and labels alone.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dit.checkpoint import load_tensors, save_tensors
from dit.randomness import generator

LAYERS = ("hidden", "pooled", "logits")
MAX_SIDE = 64  # larger images are averaged down to this side first
BATCH = 256
ROTATIONS = 4


@dataclass(frozen=True)
class ReferenceConfig:
    """The space that images are compared in, and how the two classifiers are fitted: one on training images, which is
    that space unless another is named, and the judge on held-out ones."""

    extractor: str = "classifier"  # or inception, random, or the name of one that torch-fidelity has
    weights: str | None = None  # inception's file, where it does not lie in torch's folder
    max_features: int = 10_000  # real images that precision, recall and KID see: as many as ADM's evaluator takes
    max_steps: int = 600
    global_batch_size: int = 64
    lr: float = 2e-3
    max_shift_pixels: int = 2  # pixels, random at each look
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_steps < 1 or self.global_batch_size < 1 or not self.lr > 0 or self.max_shift_pixels < 0:
            raise ValueError("max_steps, global_batch_size and lr must be above 0, max_shift_pixels at least 0")
        if self.weights is not None and self.extractor != "inception":
            raise ValueError(f"weights are inception's, and extractor is {self.extractor!r}: set weights to null")
        if self.max_features < 2:
            raise ValueError(f"max_features must be at least 2, got {self.max_features}")


class Classifier(nn.Module):
    """uint8 images (N, 3, S, S) -> features by layer: hidden (N, 64), pooled (N, 64), logits (N, classes)."""

    def __init__(self, num_classes: int):
        super().__init__()
        layers = []
        for inputs, outputs in ((3, 16), (16, 32), (32, 64)):
            layers += [nn.Conv2d(inputs, outputs, 3, stride=2, padding=1), nn.GroupNorm(4, outputs), nn.ReLU()]
        self.convolutions = nn.Sequential(*layers)
        self.dropout = nn.Dropout(0.2)
        self.hidden = nn.Linear(64 * 4 * 4, 64)
        self.logits = nn.Linear(64, num_classes)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        x = images.float() / 127.5 - 1
        if x.shape[-1] > MAX_SIDE:
            x = F.interpolate(x, size=(MAX_SIDE, MAX_SIDE), mode="area")
        x = self.convolutions(x)
        hidden = F.relu(self.hidden(self.dropout(F.adaptive_avg_pool2d(x, 4).flatten(1))))
        return {"hidden": hidden, "pooled": x.mean(dim=(2, 3)), "logits": self.logits(hidden)}


def fit_classifier(
    images: np.ndarray, labels: np.ndarray, num_classes: int, config: ReferenceConfig, what: str
) -> Classifier:
    """Fit a classifier on uint8 images (N, S, S, 3); with num_classes 0, on their four rotations."""
    draws = generator(config.seed, "classifier", what)
    torch.manual_seed(int(torch.randint(2**31, (), generator=draws)))
    classifier = Classifier(num_classes or ROTATIONS)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=config.lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.lr, config.max_steps, pct_start=0.1)
    pixels, targets = to_channels_first(images), torch.from_numpy(labels)
    for _ in range(config.max_steps):
        picked = torch.randint(len(pixels), (config.global_batch_size,), generator=draws)
        shown, wanted = pixels[picked], targets[picked]
        if not num_classes:
            wanted = torch.randint(ROTATIONS, (len(shown),), generator=draws)
            shown = torch.stack([torch.rot90(x, int(k), (1, 2)) for x, k in zip(shown, wanted, strict=True)])
        shift = torch.randint(-config.max_shift_pixels, config.max_shift_pixels + 1, (2,), generator=draws).tolist()
        # Smoothed labels keep the logits, and with them the hidden layer, from growing without end: distances in it
        # then say more about the images than about how long the classifier was fitted.
        loss = F.cross_entropy(classifier(shifted(shown, *shift))["logits"], wanted, label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return classifier.eval().requires_grad_(False)


def shifted(images: Tensor, down: int, right: int) -> Tensor:
    """Images (N, C, H, W) moved by whole pixels; the border is repeated where they came from."""
    margin = max(abs(down), abs(right))
    padded = F.pad(images.float(), (margin,) * 4, mode="replicate") if margin else images
    H, W = images.shape[2:]
    return padded[:, :, margin - down : margin - down + H, margin - right : margin - right + W]


def shrunk(images: np.ndarray) -> np.ndarray:
    """uint8 images (N, H, W, 3) averaged down to MAX_SIDE where they are larger, as a classifier does it itself."""
    if images.shape[2] <= MAX_SIDE:
        return images
    small = F.interpolate(to_channels_first(images).float(), size=(MAX_SIDE, MAX_SIDE), mode="area")
    return small.round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def to_channels_first(images: np.ndarray) -> Tensor:
    """uint8 (N, H, W, 3) -> uint8 (N, 3, H, W)."""
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2)


@torch.no_grad()
def extract(
    classifier: Callable[[Tensor], dict[str, Tensor]],
    images: np.ndarray | Iterable[np.ndarray],
    layers: Sequence[str] = LAYERS,
) -> dict[str, Tensor]:
    """Features of uint8 images (N, H, W, 3), or of batches of them, by layer: each (N, width) float64."""
    whole = isinstance(images, np.ndarray)
    batches = (images[i : i + BATCH] for i in range(0, len(images), BATCH)) if whole else images
    parts: dict[str, list[Tensor]] = {layer: [] for layer in layers}
    for batch in batches:
        features = classifier(to_channels_first(batch))
        for layer in layers:
            parts[layer].append(features[layer])
    return {layer: torch.cat(part).double() for layer, part in parts.items()}


def accuracy(classifier: Classifier, images: np.ndarray, labels: np.ndarray) -> float:
    """The fraction of images that the classifier reads as their label."""
    read = extract(classifier, images)["logits"].argmax(dim=1).numpy()
    return float((read == labels).mean())


def save_classifier(path: Path, classifier: Classifier) -> None:
    save_tensors(path, classifier.state_dict())


def load_classifier(path: Path) -> Classifier:
    """Raises ValueError where the file is missing or torn."""
    tensors = load_tensors(path)
    classifier = Classifier(len(tensors["logits.weight"]))
    classifier.load_state_dict(tensors)
    return classifier.eval().requires_grad_(False)
