"""How near images come to each other: small pictures, their nearest others, and whether one set comes nearer.

The base may be far larger than memory: it comes in blocks. The two tests at the end ask whether what distinguishes two
sets could be chance; both count, and assume nothing of how distances are distributed.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

SIDE = 32  # pixels of the small pictures
NEIGHBOURS = 50  # the nearest images whose mean distance is what is usual around an image


class Nearness(NamedTuple):
    """Of each of n images: its nearest image in another set."""

    distance: Tensor  # (n,) root mean square difference in grey levels
    relative: Tensor  # (n,) that distance, of the mean distance to the nearest NEIGHBOURS
    index: Tensor  # (n,) which one it is


def nearness(queries: Tensor, blocks: Iterable[tuple[int, Tensor]], count: int, *, own: bool = False) -> Nearness:
    """The nearest of `count` others, of thumbnails (n, d); arguments are those of `nearest`."""
    distance, index = nearest(queries, blocks, max(min(NEIGHBOURS, count // 4), 1), own=own)
    usual = distance.mean(dim=1)
    relative = torch.where(usual > 0, distance[:, 0] / usual, 0)  # nothing but copies around it: surely one itself
    return Nearness(distance[:, 0].cpu() / queries.shape[1] ** 0.5, relative.cpu(), index[:, 0].cpu())


def thumbnails(images: np.ndarray) -> Tensor:
    """Images (n, H, W, 3) uint8 averaged over areas to at most 32 x 32: (n, d) float32 in grey levels.

    The distance of two rows, divided by sqrt(d), is the root mean square difference in grey levels.
    """
    parts = torch.from_numpy(np.ascontiguousarray(images)).split(32)  # so that large images are few at a time as floats
    side = thumbnail_size(images.shape[1:3])
    return torch.cat([F.adaptive_avg_pool2d(part.permute(0, 3, 1, 2).float(), side).flatten(1) for part in parts])


def thumbnail_size(size: tuple[int, ...]) -> tuple[int, int]:
    """Height and width of the small pictures of images of this height and width."""
    return min(size[0], SIDE), min(size[1], SIDE)


def nearest(
    queries: Tensor, base_blocks: Iterable[tuple[int, Tensor]], k: int = 1, *, own: bool = False
) -> tuple[Tensor, Tensor]:
    """Euclidean distances (n, k) and numbers (n, k) of the k nearest rows of a base, nearest first, for queries (n, d).

    The base comes in blocks, (number of the first row, rows (m, d)), of which one is in memory at a time; with `own` the
    base is the queries themselves, and a row is not its own neighbour. The nearest row's distance is exact, the others'
    are float32 products'. Where the base has fewer than k rows, distances are infinite.
    """
    distance = torch.full((len(queries), k), float("inf"), device=queries.device)
    index = torch.full((len(queries), k), -1, device=queries.device)
    centre = queries.mean(dim=0)  # small numbers lose less in the products
    centred, every = queries - centre, torch.arange(len(queries), device=queries.device)
    for start, base in base_blocks:
        base = base.to(queries.device)
        moved = base - centre
        squared = centred.square().sum(1)[:, None] + moved.square().sum(1) - 2 * centred @ moved.T
        if own:
            mine = every[start : start + len(base)]
            squared[mine, mine - start] = float("inf")
        found, place = squared.topk(min(k, len(base)), largest=False)
        found = found.clamp(min=0).sqrt()
        found[:, 0] = torch.where(found[:, 0].isinf(), found[:, 0], (queries - base[place[:, 0]]).norm(dim=1))
        distance, order = torch.cat([distance, found], dim=1).sort(dim=1, stable=True)
        index = torch.cat([index, place + start], dim=1).gather(1, order)[:, :k]
        distance = distance[:, :k]
    return distance, index


def mann_whitney(ours: Tensor, others: Tensor) -> tuple[float, float]:
    """z and share of the rank test (Mann and Whitney 1947) of ours (n,) against others (m,), with its correction for ties.

    The share is that of all pairs in which ours is the smaller (0.5 if they are alike); z is below 0 where it is larger.
    """
    n, m = len(ours), len(others)
    ranked = others.sort().values.contiguous()
    larger = (torch.searchsorted(ranked, ours) + torch.searchsorted(ranked, ours, right=True)).double().sum() / 2
    ties = torch.cat([ours, others]).unique(return_counts=True)[1].double()
    variance = n * m / 12 * (n + m + 1 - (ties**3 - ties).sum() / ((n + m) * (n + m - 1)))
    z = float((larger - n * m / 2) / variance.sqrt()) if variance > 0 else 0.0
    return z, float(1 - larger / (n * m))


def fisher(ours: int, n: int, others: int, m: int) -> float:
    """Fisher's exact test (1922): the chance that of `ours + others`, drawn from n + m alike, `ours` or more are of the n."""
    from scipy.stats import hypergeom

    return float(hypergeom.sf(ours - 1, n + m, n, ours + others))
