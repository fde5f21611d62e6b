"""From images to what metrics need of them: features stream by, and their moments and a part of them stay.

Mean and covariance are gathered block by block in float64 and merged exactly (Chan, Golub and LeVeque 1979), so that
memory does not grow with the number of images and several processes share the work.
"""

import errno
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor

from dit.classifier import to_channels_first
from dit.extractors import Extractor
from dit.imagesets import ImageSet
from dit.parallel import world

BLOCK = 256  # images; the last is shorter
TILE = 512  # columns of a covariance that are multiplied together


@dataclass
class Moments:
    """What is known of features seen so far: their count, mean (D,) and scatter (D, D) about it, float64.

    scatter = sum of (x - mean) (x - mean)^T, of which the covariance is the (count - 1)-th part.
    """

    count: int
    mean: Tensor
    scatter: Tensor

    @classmethod
    def of(cls, features: Tensor) -> "Moments":
        """Of features (n, D), n at least 1."""
        x = (features.cpu() if features.device.type == "mps" else features).double()  # Apple's has no float64
        mean = x.mean(dim=0)
        centred = x - mean
        return cls(len(x), mean, _gram(centred))

    def merge(self, other: "Moments") -> "Moments":
        """The moments of both together (Chan, Golub and LeVeque, eq. 2.1)."""
        if self.mean.shape != other.mean.shape:
            raise ValueError(f"features of {len(self.mean)} and of {len(other.mean)} dimensions cannot be merged")
        count = self.count + other.count
        step = other.mean - self.mean
        mean = self.mean + step * (other.count / count)
        scatter = (self.scatter + other.scatter).addr_(step, step, alpha=self.count * other.count / count)
        return Moments(count, mean, scatter)

    def update(self, features: Tensor) -> "Moments":
        """These, and features (n, D) that came later."""
        return self.merge(Moments.of(features)) if len(features) else self

    @property
    def covariance(self) -> Tensor:
        """Unbiased, (D, D). Raises ValueError for a single image."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 images, got {self.count}: take more")
        return self.scatter / (self.count - 1)

    def cpu(self) -> "Moments":
        return Moments(self.count, self.mean.cpu(), self.scatter.cpu())


def _gram(x: Tensor) -> Tensor:
    """x^T x (D, D), of which the tiles below the diagonal are not multiplied but mirrored."""
    gram = x.new_empty(x.shape[1], x.shape[1])
    for start in range(0, x.shape[1], TILE):
        strip = x[:, start : start + TILE].T @ x[:, start:]
        gram[start : start + TILE, start:] = strip
        gram[start:, start : start + TILE] = strip.T
    return gram


def merged(moments: Iterable[Moments]) -> Moments:
    """All of them together; at least one."""
    return reduce(Moments.merge, moments)


@dataclass
class Collected:
    """What `collect` brings of `count` images.

    `kept` are features (m, D) float32 by layer, in files; `indices` says by layer which images (m,) int64 those are of.
    """

    count: int
    moments: dict[str, Moments]
    kept: dict[str, Tensor] = field(default_factory=dict)
    indices: dict[str, Tensor] = field(default_factory=dict)


def evenly(count: int, most: int | None) -> np.ndarray:
    """The numbers of at most `most` of `count` images, int64, evenly spaced: images are often sorted by class."""
    taken = count if most is None else min(most, count)
    return np.arange(taken, dtype=np.int64) * count // max(taken, 1)


def collect(
    extractor: Extractor,
    images: ImageSet,
    *,
    keep: Mapping[str, int | None] = {},
    moments_of: Sequence[str] | None = None,
    folder: Path,
    progress: Callable[[int], None] = lambda count: None,
    block: int = BLOCK,
) -> Collected | None:
    """Send all images through the extractor, each of `world()`'s processes its own blocks.

    The main process is given everything, the others None. `keep` says by layer how many images' features stay, evenly
    spaced (None = all), in files in `folder`, which all processes must see; `moments_of` which layers' moments are
    gathered, by default those that the extractor names. `progress` is called in the main process with the number of
    images done, the others' too, as if they were as fast.
    Raises ValueError where a feature is not finite, naming the image.
    """
    here, moments_of = world(), extractor.moments_of if moments_of is None else moments_of
    indices = {layer: evenly(images.count, most) for layer, most in keep.items()}
    if here.main:
        folder.mkdir(parents=True, exist_ok=True)
        for layer, index in indices.items():
            _file(folder, layer).unlink(missing_ok=True)  # what an earlier call kept here may still be in use
            with open(_file(folder, layer), "xb") as file:
                _reserve(file, 4 * len(index) * extractor.widths[layer])
    here.barrier()
    kept = {layer: _mapped(folder, layer, len(index), extractor.widths[layer]) for layer, index in indices.items()}
    moments: dict[str, Moments] = {}
    blocks = images.blocks(block)
    for number, (place, batch) in enumerate(_read(images, here.mine(blocks))):
        features = extractor(to_channels_first(batch))
        _require_finite({layer: features[layer] for layer in (*moments_of, *keep)}, images.name, place.start)
        for layer in moments_of:
            new = Moments.of(features[layer])
            moments[layer] = moments[layer].merge(new) if layer in moments else new
        for layer, index in indices.items():
            first, last = np.searchsorted(index, (place.start, place.stop))
            kept[layer][first:last] = features[layer][index[first:last] - place.start].cpu()
        if here.main:
            progress(sum(map(len, blocks[number * here.size : (number + 1) * here.size])))
    parts = here.gather({layer: found.cpu() for layer, found in moments.items()})
    if parts is None:
        return None
    together = {layer: merged(part[layer] for part in parts if layer in part) for layer in moments_of}
    return Collected(images.count, together, kept, {layer: torch.from_numpy(i) for layer, i in indices.items()})


def _read(images: ImageSet, blocks: Sequence[range]) -> Iterable[tuple[range, np.ndarray]]:
    """Blocks with their images; the next one is read while the last is worked on."""
    with ThreadPoolExecutor(1) as reader:
        waiting = None
        for block in blocks:
            following = (block, reader.submit(images.read, block.start, block.stop))
            if waiting:
                yield waiting[0], waiting[1].result()
            waiting = following
        if waiting:
            yield waiting[0], waiting[1].result()


def _reserve(file: IO[bytes], num_bytes: int) -> None:
    """Give the file its size and its place: a disk that is full later would kill whoever writes into its memory."""
    if num_bytes and hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(file.fileno(), 0, num_bytes)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise OSError(error.errno, f"{error.strerror}: features take {num_bytes:,} bytes", file.name) from None
    file.truncate(num_bytes)  # also where a file system cannot reserve


def _file(folder: Path, layer: str) -> Path:
    return folder / f"{layer}.float32"


def _mapped(folder: Path, layer: str, count: int, width: int) -> Tensor:
    file = str(_file(folder, layer))
    return torch.from_file(file, shared=True, size=count * width, dtype=torch.float32).view(count, width)


def _require_finite(features: Mapping[str, Tensor], name: str, first: int) -> None:
    for layer, values in features.items():
        if not torch.isfinite(values).all():
            bad = int((~torch.isfinite(values)).any(dim=1).nonzero()[0])
            raise ValueError(
                f"{name}: image {first + bad} has features ({layer}) that are not finite: "
                "the extractor's weights are broken"
            )
