"""Precision, recall, density and coverage: whose neighbourhoods the other set's images lie in.

An image's neighbourhood is the closed ball around its features that reaches its k-th nearest fellow. Of n real and m
generated images that makes three matrices of distances, of which none is ever whole in memory: blocks of them are
multiplied once in float32, and because such a product is known only to within its rounding, every pair whose answer
that rounding could change is decided again from the differences themselves in float64. So the answer is float64's, at
float32's price.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from dit import onednn

BLOCK = {"cpu": 1024, "cuda": 4096}  # rows and columns that are multiplied at a time
MANY = 1 / 64  # above this share of undecided ones, products in float64 are cheaper than pair by pair
SPARE = 3  # neighbours kept beyond the k-th, so that rounding seldom makes the k-th one doubtful


class Neighbourhoods(NamedTuple):
    """Each is a share of images in 0..1, but for density, which can exceed 1."""

    precision: float
    recall: float
    density: float
    coverage: float


def neighbourhoods(
    real: Tensor, generated: Tensor, k: int = 3, *, device: torch.device | str | None = None, block: int | None = None
) -> Neighbourhoods:
    """How two sets of features (n, D) and (m, D) lie in each other's neighbourhoods, in one pass over their blocks.

    precision: the share of generated images in any real image's neighbourhood; recall: the share of real images in any
    generated image's (arXiv 1904.06991, eq. 1 and 2). density: in how many real neighbourhoods a generated image lies,
    divided by k; coverage: the share of real neighbourhoods with any generated image in them (arXiv 2002.09797, eq. 3
    and 4). Balls are closed: an image at just the radius is inside.

    The features may be memory-mapped; on another `device` than theirs they are copied there whole. Work memory is a
    few blocks of `block` x max(`block`, D) numbers. Raises ValueError for features that are not finite, of unequal
    dimensions, or of fewer than k + 1 images.
    """
    for name, features in (("real", real), ("generated", generated)):
        if features.ndim != 2 or len(features) < k + 1:
            raise ValueError(
                f"precision and recall with k = {k} neighbours need at least {k + 1} {name} images, got features of "
                f"shape {tuple(features.shape)}: give more images or a smaller k"
            )
    if real.shape[1] != generated.shape[1]:
        raise ValueError(
            f"the real images' features have {real.shape[1]} dimensions and the generated ones' {generated.shape[1]}: "
            "both must come from the same extractor"
        )
    if device is not None:
        real, generated = real.to(device), generated.to(device)
    block = block or BLOCK.get(real.device.type, min(BLOCK.values()))
    check_finite(real, "the real images'")
    check_finite(generated, "the generated images'")
    with _full_float32():
        radii = squared_radii(real, k, block), squared_radii(generated, k, block)
        hit_real = torch.zeros(len(real), 2, dtype=torch.bool, device=real.device)  # [coverage, recall]
        hit_generated = torch.zeros(len(generated), dtype=torch.bool, device=real.device)
        inside = 0
        for rows, columns, (in_real, in_generated) in _memberships(real, generated, radii, block):
            hit_generated[columns.start + in_real[:, 1]] = True
            hit_real[rows.start + in_real[:, 0], 0] = True
            hit_real[rows.start + in_generated[:, 0], 1] = True
            inside += len(in_real)
    coverage, recall = hit_real.double().mean(dim=0).tolist()
    return Neighbourhoods(hit_generated.double().mean().item(), recall, inside / (k * len(generated)), coverage)


def squared_radii(features: Tensor, k: int, block: int) -> Tensor:
    """Each row's squared distance to its k-th nearest other row, float64 (n,), from features (n, D)."""
    n = len(features)
    keep = min(k + SPARE, n - 1)
    for dtype in (torch.float32, torch.float64):
        bounds, others = _nearest_bounds(features, keep, block, dtype)
        rows = torch.arange(n, device=features.device).repeat_interleave(keep)
        distances = squared_distances(features, features, rows, others.flatten()).view(n, keep)
        radii = distances.sort(dim=1).values[:, k - 1]
        # Whoever was not kept is at least as far as the last bound. No distance is below 0, so that needs no other.
        doubtful = (radii > bounds[:, -1]) & (radii > 0) if keep < n - 1 else torch.zeros_like(radii, dtype=torch.bool)
        if doubtful.sum() <= MANY * n:
            break
    for row in doubtful.nonzero().flatten().tolist():
        others = torch.arange(n, device=features.device)
        others = others[others != row]
        distances = squared_distances(features, features, torch.full_like(others, row), others)
        radii[row] = distances.kthvalue(k).values
    return radii


def squared_distances(a: Tensor, b: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """|a[rows] - b[columns]|^2 of pairs, from their differences in float64: equal rows are at exactly 0.

    Halves are added until one number is left, and not by `sum`, whose order depends on where a row lies: so a pair's
    distance is the same number whenever it is asked for, and an image at just the radius is always inside.
    """
    size = max(1, min(256, 2**19 // a.shape[1]))
    result = torch.empty(len(rows), dtype=torch.float64, device=a.device)
    for start in range(0, len(rows), size):
        terms = a[rows[start : start + size]].double()
        terms.sub_(b[columns[start : start + size]].double()).square_()
        while (width := terms.shape[1]) > 1:
            terms[:, : width // 2] += terms[:, (width + 1) // 2 :]
            terms = terms[:, : (width + 1) // 2]
        result[start : start + size] = terms[:, 0]
    return result


def check_finite(features: Tensor, whose: str) -> None:
    """Raise ValueError where features (n, D) hold NaN or infinity, naming the first such row."""
    for rows in _ranges(len(features), 4096):
        part = features[rows.start : rows.stop]
        if part.sum().isfinite():  # in one look, for nearly everything
            continue
        finite = part.isfinite().all(dim=1)
        if not finite.all():
            first = rows.start + int((~finite).nonzero()[0])
            raise ValueError(f"{whose} features are not finite (row {first}): the extractor or its weights are broken")


class _Scaled(NamedTuple):
    """Features about a centre and in a unit in which the largest has length 1 or less: the least rounding, no overflow."""

    features: Tensor
    centre: Tensor  # (D,)
    unit: float  # a power of two: dividing by it rounds nothing
    lengths: Tensor  # squared, (n,) float64

    def block(self, rows: range, dtype: torch.dtype) -> "_Block":
        part = self.features[rows.start : rows.stop]
        centred = (part.to(torch.promote_types(part.dtype, dtype)) - self.centre).div_(self.unit)
        lengths = self.lengths[rows.start : rows.stop] / self.unit**2
        # A dot product of D rounded numbers errs by at most (D + 2) roundings of |a||b| <= (|a|^2 + |b|^2) / 2, whatever
        # the order of its sums; the rest is for the additions that follow, and for numbers too small to have digits.
        margins = (part.shape[1] + 16) * (torch.finfo(dtype).eps / 2) * lengths + 1e-30
        return _Block(centred.to(dtype), (lengths - margins).to(dtype), margins)


class _Block(NamedTuple):
    """Rows as products take them (b, D); their squared lengths less a margin (b,), which so bound from below; the margins."""

    rows: Tensor
    lengths: Tensor
    margins: Tensor


def _scaled(features: Tensor, centre: Tensor | None = None) -> _Scaled:
    """About the mean, or a given centre."""
    blocks = [features[rows.start : rows.stop] for rows in _ranges(len(features), 1024)]
    if centre is None:
        total = sum(part.sum(dim=0, dtype=torch.float64) for part in blocks)
        centre = (total / len(features)).to(torch.promote_types(features.dtype, torch.float32))
    lengths = torch.cat([(part.double() - centre).square_().sum(dim=1) for part in blocks])
    return _Scaled(features, centre, 2.0 ** math.ceil(math.log2(float(lengths.max()) or 1.0) / 2), lengths)


def _bounds(a: _Block, b: _Block) -> Tensor:
    """Squared distances from below: |a|^2 + |b|^2 - 2ab, less both margins."""
    if a.rows.dtype == torch.float32 and a.rows.device.type == "cpu" and onednn.available():
        return onednn.linear(-2 * a.rows, b.rows, b.lengths).add_(a.lengths[:, None])
    return torch.addmm(b.lengths, a.rows, b.rows.T, alpha=-2).add_(a.lengths[:, None])


def _nearest_bounds(features: Tensor, keep: int, block: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Each row's `keep` nearest others by lower bounds of the squared distance: bounds (n, keep) rising, and who.

    The matrix is symmetric: only blocks on and above its diagonal are multiplied.
    """
    scaled = _scaled(features)
    bounds = torch.full((len(features), keep), torch.inf, dtype=dtype, device=features.device)
    others = torch.zeros(len(features), keep, dtype=torch.long, device=features.device)

    def take(rows: range, columns: range, found: Tensor) -> None:
        values, where = found.topk(min(keep, found.shape[1]), dim=1, largest=False, sorted=False)
        here = slice(rows.start, rows.stop)
        values = torch.cat([bounds[here], values], dim=1)
        where = torch.cat([others[here], where + columns.start], dim=1)
        bounds[here], best = values.topk(keep, dim=1, largest=False)
        others[here] = where.gather(1, best)

    for rows in _ranges(len(features), block):
        a = scaled.block(rows, dtype)
        for columns in _ranges(len(features), block, rows.start):
            found = _bounds(a, a if columns == rows else scaled.block(columns, dtype))
            if columns == rows:
                found.fill_diagonal_(torch.inf)
            else:
                take(columns, rows, found.T.contiguous())
            take(rows, columns, found)
    return bounds.double() * scaled.unit**2, others


def _memberships(
    real: Tensor, generated: Tensor, radii: tuple[Tensor, Tensor], block: int
) -> Iterator[tuple[range, range, list[Tensor]]]:
    """Blocks of the pairs real x generated, each with the pairs (p, 2) within the real's, and the generated's radius."""
    a = _scaled(real)
    b = _scaled(generated, a.centre)
    unit = max(a.unit, b.unit)
    a, b = a._replace(unit=unit), b._replace(unit=unit)
    for rows in _ranges(len(real), block):
        first = a.block(rows, torch.float32)
        for columns in _ranges(len(generated), block):
            limits = radii[0][rows.start : rows.stop, None], radii[1][None, columns.start : columns.stop]

            def distances(pairs: Tensor, row: int = rows.start, column: int = columns.start) -> Tensor:
                return squared_distances(real, generated, row + pairs[:, 0], column + pairs[:, 1])

            for dtype in (torch.float32, torch.float64):
                blocks = first if dtype == torch.float32 else a.block(rows, dtype), b.block(columns, dtype)
                bounds = _bounds(*blocks)
                decided = [_Decided.of(bounds, blocks, limit, unit) for limit in limits]
                if sum(len(found.doubtful) for found in decided) <= MANY * bounds.numel():
                    break
            yield rows, columns, [found.settled(distances) for found in decided]


class _Decided(NamedTuple):
    """Pairs (p, 2) that are within a radius for certain, and those that rounding leaves in doubt, with their limits."""

    certain: Tensor
    doubtful: Tensor
    limits: Tensor

    @classmethod
    def of(cls, bounds: Tensor, blocks: tuple[_Block, _Block], limits: Tensor, unit: float) -> "_Decided":
        scaled = limits / unit**2
        upper = (scaled * (1 + 4 * torch.finfo(bounds.dtype).eps)).to(bounds.dtype)
        pairs = (bounds <= upper).nonzero()
        i, j = pairs.T
        most = bounds[i, j].double() + 2 * (blocks[0].margins[i] + blocks[1].margins[j])
        limits = limits.expand(bounds.shape)[i, j]
        certain = most <= limits / unit**2
        return cls(pairs[certain], pairs[~certain], limits[~certain])

    def settled(self, distances: Callable[[Tensor], Tensor]) -> Tensor:
        """All pairs within the radius."""
        return torch.cat([self.certain, self.doubtful[distances(self.doubtful) <= self.limits]])


@contextmanager
def _full_float32() -> Iterator[None]:
    """Products of float32 keep all its digits here, whatever is allowed elsewhere (TensorFloat-32, bfloat16)."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _ranges(count: int, block: int, start: int = 0) -> list[range]:
    return [range(first, min(first + block, count)) for first in range(start, count, block)]
