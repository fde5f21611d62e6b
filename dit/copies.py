"""Does a model copy? How near its images come to training images, against how near held-out images come.

Images are compared as small pictures, by root mean square difference in grey levels. Held-out images are real and were
never trained on: they show how near a new image of this kind comes by chance. A model whose images come nearer copies
(arXiv 2004.05675), unless they are only smoother, and so nearer to all images: a copy is near to one training image and
far from the next ones (arXiv 2301.13188, section 4.2). Both must hold before anyone is warned. Training images count
mirrored too, for all alike: where a model is shown mirror images, that is how it may copy.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from hashlib import blake2b
from math import ceil
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dit.features import evenly
from dit.grids import grid
from dit.imagesets import ImageSet
from dit.nearest import Nearness, fisher, mann_whitney, nearness, thumbnail_size, thumbnails

QUANTILE = 0.01  # of the held-out images are as near to a training image as the limit
# Worth a warning, if it is no chance: this share of images nearer than the limit, ...
SHARE = 0.05
CLOSE = 0.5  # ... any images nearer than this much of the limit, ...
NEARER = 0.65  # ... or this share of all pairs in which the generated image is nearer, seen from its surroundings.
CHANCE, SIGMAS = 1e-3, -4.0  # what is no chance
FEWEST = 10  # held-out and training images, to say anything
READ = 256  # images at a time
MOST_GENERATED, MOST_TRAINING = 5_000, 100_000  # images that are looked at, unless more are asked for


class Pair(NamedTuple):
    """A generated image and the training image nearest to it, by their numbers in their sets."""

    generated: int
    training: int
    distance: float  # grey levels
    exact: bool  # the same in every pixel
    mirrored: bool  # it is the training image's mirror image that is meant


@dataclass(frozen=True)
class Copies:
    """What was found. Distances are root mean square differences in grey levels."""

    num_generated: int  # looked at, ...
    of_generated: int  # ... of so many
    num_training: int
    of_training: int
    num_heldout: int
    of_heldout: int
    distance_generated: float  # to the nearest training image, median
    distance_heldout: float
    z: float  # of these distances, below 0 where generated images are nearer (Mann-Whitney)
    limit: float  # 1% of held-out images are as near to a training image as this
    share_closer: float  # of the generated images that are; 0.01 by chance
    share_copied: float  # of the generated images that are, and as near to it in comparison with the next ones
    num_close: int  # of the generated images nearer than half of that, by both measures
    num_close_heldout: int
    share_nearer: float  # of all pairs in which the generated image is the nearer in that comparison; 0.5 by chance
    exact: int  # generated images that are a training image or its mirror image, pixel by pixel
    exact_heldout: int
    share_alike: float  # of the generated images far nearer to another generated one than held-out ones are
    exact_alike: int  # generated images that are an earlier one, pixel by pixel
    pairs: tuple[Pair, ...]  # the closest, closest first
    copies: bool  # it copies training images
    repeats: bool  # it draws the same images again and again

    @property
    def warning(self) -> bool:
        """Whether a person should look at the picture."""
        return self.copies or self.repeats

    @property
    def verdict(self) -> str:
        """One line: what was found, and in how many images."""
        nearer = f"{self.share_copied:.1%} nearer to one than all but {QUANTILE:.0%} of held-out images come"
        found = []
        if self.copies:
            found.append(f"the model copies training images ({self.exact:,} exactly, {nearer})")
        if self.repeats:
            found.append(f"the model repeats itself ({self.share_alike:.1%} of its images resemble another)")
        remarks = ""
        if self.z < SIGMAS and not self.copies:
            remarks += ", nearer to many alike: smoother, not copied"
        if self.num_close:
            remarks += f"; {self.num_close:,} of them are so near that the closest pairs should be looked at"
        if self.exact_heldout:
            remarks += f"; {self.exact_heldout:,} held-out images are training images, so these limits are too low"
        return (
            f"{' and '.join(found) or 'no proof of copying'}: its images lie {self.distance_generated:.1f} grey levels "
            f"from their nearest training images, held-out ones {self.distance_heldout:.1f} (medians){remarks}; looked at "
            f"{self.num_generated:,} of {self.of_generated:,} generated, {self.num_training:,} of {self.of_training:,} "
            f"training and {self.num_heldout:,} of {self.of_heldout:,} held-out images"
        )

    def record(self) -> dict[str, Any]:
        """All of it, as JSON takes it."""
        told = asdict(self) | {"pairs": [pair._asdict() for pair in self.pairs]}
        return told | {"warning": self.warning, "verdict": self.verdict}


def check_copies(
    generated: ImageSet,
    training: ImageSet,
    heldout: ImageSet,
    *,
    most_generated: int = MOST_GENERATED,
    most_training: int = MOST_TRAINING,
    most_pairs: int = 16,
    device: torch.device | str = "cpu",
    progress: Callable[[int], None] = lambda count: None,
) -> Copies:
    """Compare generated with training images, at most so many of each, evenly spread (held-out: as many as generated).

    `progress` hears of the images read, `num_looked_at` of them altogether. Exact copies are found among images of equal
    size only. Raises ValueError, one line, for fewer than 10 held-out or training images, 2 generated ones, and for
    sizes of which the small pictures differ.
    """
    require_alike(generated, training, heldout)
    ours, held = (_Looked(images, most_generated, progress) for images in (generated, heldout))
    known = _Looked(training, most_training, progress)
    mirrors = ((2 * start, _with_mirrors(block, generated.size)) for start, block in known.blocks())
    queries = torch.cat([block for images in (ours, held) for _, block in images.blocks()]).to(device)
    near = nearness(queries, mirrors, 2 * len(known.numbers))
    n, m = len(ours.numbers), len(held.numbers)
    near_ours, near_held = (Nearness(*(values[part] for values in near)) for part in (slice(n), slice(n, None)))
    equal = min(n, m)  # the more images, the nearer the nearest: as many are compared with as many
    few = torch.from_numpy(evenly(n, equal)), n + torch.from_numpy(evenly(m, equal))
    own_ours, own_held = (nearness(queries[part], [(0, queries[part])], equal - 1, own=True) for part in few)
    alike = [int((own.distance <= CLOSE * _quantile(own_held.distance)).sum()) for own in (own_ours, own_held)]
    exact, found_heldout = _exact(ours, known), _exact(held, known)
    num_exact, exact_heldout = n - exact.count(None), m - found_heldout.count(None)
    z, _ = mann_whitney(near_ours.distance, near_held.distance)
    z_relative, share_nearer = mann_whitney(near_ours.relative, near_held.relative)
    copied, copied_held = _both(near_ours, near_held, 1.0)
    close, close_held = _both(near_ours, near_held, CLOSE)
    return Copies(
        num_generated=n,
        of_generated=generated.count,
        num_training=len(known.numbers),
        of_training=training.count,
        num_heldout=m,
        of_heldout=heldout.count,
        distance_generated=float(near_ours.distance.median()),
        distance_heldout=float(near_held.distance.median()),
        z=z,
        limit=_quantile(near_held.distance),
        share_closer=float((near_ours.distance <= _quantile(near_held.distance)).double().mean()),
        share_copied=copied / n,
        num_close=close,
        num_close_heldout=close_held,
        share_nearer=share_nearer,
        exact=num_exact,
        exact_heldout=exact_heldout,
        share_alike=alike[0] / equal,
        exact_alike=n - len({digest for digest, _ in ours.digests}),
        pairs=tuple(_pairs(ours, known, near_ours, exact)[:most_pairs]),
        copies=(max(z, z_relative) < SIGMAS and share_nearer > NEARER)
        or (copied / n > SHARE and _beyond_chance(copied, max(copied_held, _rank(m)), n, m))
        or _beyond_chance(close, close_held, n, m)
        or (num_exact > 0 and (not exact_heldout or _beyond_chance(num_exact, exact_heldout, n, m))),
        repeats=_beyond_chance(*alike, equal, equal),
    )


def num_looked_at(
    generated: ImageSet,
    training: ImageSet,
    heldout: ImageSet,
    most_generated: int = MOST_GENERATED,
    most_training: int = MOST_TRAINING,
) -> int:
    """How many images `check_copies` reads."""
    return sum(min(images.count, most_generated) for images in (generated, heldout)) + min(
        training.count, most_training
    )


def picture(copies: Copies, generated: ImageSet, training: ImageSet, columns: int = 8) -> np.ndarray:
    """The closest pairs as one uint8 picture: a row of generated images above the training images nearest to them, which
    are shown mirrored where they are nearest so."""
    H, W = generated.size
    down, across = (np.arange(new) * old // new for new, old in zip((H, W), training.size, strict=True))
    columns = min(columns, len(copies.pairs))
    blank, cells = np.full((H, W, 3), 255, np.uint8), []
    for start in range(0, len(copies.pairs), columns):
        pairs = copies.pairs[start : start + columns]
        empty = [blank] * (columns - len(pairs))
        cells += [*(generated.take([pair.generated])[0] for pair in pairs), *empty]
        below = (training.take([pair.training])[0][down][:, across] for pair in pairs)
        cells += [*(one[:, ::-1] if pair.mirrored else one for pair, one in zip(pairs, below, strict=True)), *empty]
    return grid(np.stack(cells), columns)


class _Looked:
    """The images of a set that are looked at, at most `most`: their numbers and, once they are read, their digests."""

    def __init__(self, images: ImageSet, most: int, progress: Callable[[int], None]):
        self.images, self.progress = images, progress
        self.numbers, self.digests = evenly(images.count, most), list[tuple[bytes, bytes]]()  # its mirror image's too

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        """(place of the first, thumbnails), as `nearest` takes them; once."""
        for start in range(0, len(self.numbers), READ):
            pixels = self.images.take(self.numbers[start : start + READ])
            self.digests += [(_digest(image), _digest(image[:, ::-1])) for image in pixels]
            yield start, thumbnails(pixels)
            self.progress(len(pixels))


def require_alike(generated: ImageSet, training: ImageSet, heldout: ImageSet) -> None:
    """Raise ValueError where there are too few images to look for copies, or their small pictures differ in size."""
    for images, least in ((generated, 2), (training, FEWEST), (heldout, FEWEST)):
        if images.count < least:
            raise ValueError(f"{images.name}: {least} images or more are needed to look for copies, got {images.count}")
        if thumbnail_size(images.size) != thumbnail_size(generated.size):
            raise ValueError(
                f"{images.name} holds images of {images.size[0]} x {images.size[1]} pixels, {generated.name} of "
                f"{generated.size[0]} x {generated.size[1]}: to look for copies, give images of one size"
            )


def _with_mirrors(block: Tensor, size: tuple[int, int]) -> Tensor:
    """Thumbnails (n, d) -> (2n, d), each with its mirror image behind it."""
    mirrored = block.view(len(block), 3, *thumbnail_size(size)).flip(3).flatten(1)
    return torch.stack([block, mirrored], dim=1).flatten(0, 1)


def _digest(image: np.ndarray) -> bytes:
    return blake2b(image.tobytes(), digest_size=16).digest()


def _exact(images: _Looked, known: _Looked) -> list[int | None]:
    """Of each image: its equal among the training images and their mirror images, numbered as by `_with_mirrors`."""
    place = {digest: 2 * i for i, (digest, _) in reversed(list(enumerate(known.digests)))}
    mirrors = ((place.get(own), place.get(mirrored)) for own, mirrored in images.digests)
    return [own if own is not None else None if mirrored is None else mirrored + 1 for own, mirrored in mirrors]


def _pairs(ours: _Looked, known: _Looked, near: Nearness, exact: list[int | None]) -> list[Pair]:
    """Every generated image with its nearest training image, closest first."""
    pairs = []
    for number, found, index, distance in zip(ours.numbers, exact, near.index, near.distance, strict=True):
        same = found is not None
        place, mirrored = divmod(found if same else int(index), 2)
        pairs.append(
            Pair(int(number), int(known.numbers[place]), 0.0 if same else float(distance), same, bool(mirrored))
        )
    return sorted(pairs, key=lambda pair: (not pair.exact, pair.distance))


def _both(ours: Nearness, held: Nearness, part: float) -> tuple[int, int]:
    """How many of ours and of the held-out are nearer than that part of the limit by both measures."""
    distance, relative = part * _quantile(held.distance), part * _quantile(held.relative)
    ours, held = (int(((near.distance <= distance) & (near.relative <= relative)).sum()) for near in (ours, held))
    return ours, held


def _beyond_chance(ours: int, held: int, n: int, m: int) -> bool:
    return fisher(ours, n, held, m) < CHANCE


def _rank(count: int) -> int:
    return ceil(QUANTILE * count)


def _quantile(values: Tensor) -> float:
    """The smallest value that 1% of the values do not exceed."""
    return float(values.sort().values[_rank(len(values)) - 1])
