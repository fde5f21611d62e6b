"""How far a metric of N images can be trusted: the bias of a small sample, and the spread that another draw would have.

A Frechet distance is biased upwards by about c / N, since the fewer the images the worse their covariance is known
(arXiv 1911.07023). The same features in smaller parts show c, and a line in 1 / N leads to the distance of infinitely
many images. The bias of the reference's own finite count stays in it. The spread comes from the bootstrap: the same
features with random weights. Features are read in blocks, so that they may lie in a memory-mapped file.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor

from dit.randomness import generator, permutation

Distance = Callable[[Tensor, Tensor], float]  # of a mean (D,) and a covariance (D, D) to the reference's
BLOCK = 4096  # features at a time
NORMAL = 1.959964  # standard deviations on either side that hold 95% of a normal distribution
FRACTIONS = (Fraction(1), Fraction(2, 3), Fraction(1, 2), Fraction(1, 4))
LEAST_PER_DIMENSION = 5000 / 2048  # the paper's smallest part, of Inception's features: below, the bias is not c / n


class Interval(NamedTuple):
    """Where 95% of such estimates would lie, `low` to `high`, and the standard error behind it."""

    standard_error: float
    low: float
    high: float


def moments(features: Tensor, weights: Tensor, device: torch.device | str | None = None) -> tuple[Tensor, Tensor]:
    """Mean (D,) and unbiased covariance (D, D), float64, of features (N, D) of which each counts `weights` (N,) times.

    Rows of weight 0 are not looked at, and no row is copied for being there twice. The work is done on `device`, by
    default the features' own. Raises ValueError for features that are not finite.
    """
    device = device or features.device
    weights = weights.to(features.device, torch.float64)
    mean = torch.zeros(features.shape[1], dtype=torch.float64, device=device)
    for rows, weight in _counted(features, weights, device):
        mean += weight @ rows
    count = float(weights.sum())
    mean /= count
    if not torch.isfinite(mean).all():
        raise ValueError("the features hold values that are not finite (NaN or infinite): extract them again")
    scatter = torch.zeros(len(mean), len(mean), dtype=torch.float64, device=device)
    for rows, weight in _counted(features, weights, device):
        centred = (rows - mean) * weight.sqrt()[:, None]
        scatter.addmm_(centred.T, centred)
    return mean, scatter / (count - 1)


def default_sizes(count: int, width: int) -> list[int]:
    """The part sizes from which `count` features of `width` dimensions may be extrapolated, largest first.

    Empty where the count is too small for the bias to be c / N: there is then no honest extrapolation.
    """
    sizes = [int(count * fraction) for fraction in FRACTIONS]
    kept = [size for size in sizes if size >= max(LEAST_PER_DIMENSION * width, 2)]
    return kept if len(kept) >= 3 else []


def at_sizes(
    features: Tensor,
    to_reference: Distance,
    sizes: Iterable[int],
    seed: int,
    device: torch.device | str | None = None,
) -> list[tuple[int, float]]:
    """(n, mean distance of parts of n features) for each of the sizes, of features (N, D).

    For n = p/q of N (to the nearest fraction of up to eighths) the parts are q windows of a random cyclic order, in
    which each feature stands equally often. What is lucky in the whole sample is so in all sizes alike, and the line
    through them keeps the whole sample's spread instead of multiplying it, as independent parts would.
    """
    count, points = len(features), []
    order = permutation(count, seed, "sizes").repeat(2)
    for size in sizes:
        if not 2 <= size <= count:
            raise ValueError(f"sizes must be 2 to the {count} images that there are, got {size}")
        windows = max(Fraction(size, count).limit_denominator(8).denominator, 1)
        starts = [round(i * count / windows) for i in range(windows)]
        parts = [torch.bincount(order[start : start + size], minlength=count) for start in starts]
        points.append((size, sum(to_reference(*moments(features, part, device)) for part in parts) / windows))
    return points


def infinity(points: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """Limit of the distance for infinitely many images, and the fit's standard error (arXiv 1911.07023, section 4).

    Least squares of `distance = limit + c / n` over points (n, distance), weighted by n: the smaller parts scatter more,
    and lie off the line first. The standard error says how well the points lie on it; the sample's own spread comes on
    top (`bootstrap`), and the limit may be below 0 by it. Raises ValueError for fewer than three sizes.
    """
    if len({size for size, _ in points}) < 3:
        raise ValueError(f"an extrapolation needs distances at three sizes or more, got {len(points)}")
    n, y = torch.tensor(points, dtype=torch.float64).T
    X = torch.stack([torch.ones_like(n), 1 / n], dim=1)
    inverse = torch.linalg.inv(X.T @ (n[:, None] * X))
    line = inverse @ X.T @ (n * y)
    variance = (n * (y - X @ line).square()).sum() / (len(n) - 2)
    return float(line[0]), float((variance * inverse[0, 0]).sqrt())


def bootstrap(
    features: Tensor,
    to_reference: Distance,
    replicas: int,
    seed: int,
    device: torch.device | str | None = None,
) -> Interval:
    """95% interval of the distance of features (N, D), as other draws of N images would have it (Efron 1979).

    Each replica draws N of the N features with replacement, as whole-number weights. A resampled set is poorer than the
    set itself, its distances are biased upwards a second time: only their spread is taken, and the interval is centred
    on the estimate, `estimate -+ 1.96 standard errors`, not below 0. It holds for the distance at this N, bias
    included. It is wider than it need be where images are few: 1.2 times at 20 images per dimension, twice at 3. Raises
    ValueError for fewer than 2 replicas or features.
    """
    count = len(features)
    if replicas < 2 or count < 2:
        raise ValueError(f"a bootstrap needs 2 replicas and 2 images or more, got {replicas} and {count}")
    distances = []
    for replica in range(replicas):
        drawn = torch.randint(count, (count,), generator=generator(seed, "bootstrap", replica))
        distances.append(to_reference(*moments(features, torch.bincount(drawn, minlength=count), device)))
    error = float(torch.tensor(distances, dtype=torch.float64).std())
    estimate = to_reference(*moments(features, torch.ones(count), device))
    return Interval(error, max(estimate - NORMAL * error, 0.0), estimate + NORMAL * error)


def share_interval(share: float, count: int, others: int | None = None) -> Interval:
    """95% interval of a share of `count` images: Wilson's (1927), within 0 to 1 and not shrinking to nothing at an end.

    Where the spheres of `others` images decide the share, as in precision and recall, another draw of those moves it
    too. The count is then n m / (n + m), a rule of thumb: of simulated sets that lie close, 85% of such intervals and
    more hold (by their own count alone, 60%); of sets so far apart that few spheres decide, it can be half.
    """
    if count < 1 or (others is not None and others < 1) or not 0 <= share <= 1:
        raise ValueError(f"a share must be 0 to 1, of 1 image or more, got {share} of {count} against {others}")
    n = count if others is None else count * others / (count + others)
    scale = 1 + NORMAL**2 / n
    centre = (share + NORMAL**2 / (2 * n)) / scale
    half = NORMAL / scale * (share * (1 - share) / n + NORMAL**2 / (4 * n**2)) ** 0.5
    return Interval((share * (1 - share) / n) ** 0.5, max(centre - half, 0.0), min(centre + half, 1.0))


def splits_interval(mean: float, deviation: float, splits: int) -> Interval:
    """95% interval of a mean of `splits` parts that share no image, such as the Inception Score's; `deviation` is theirs.

    By Student's distribution (1908), since ten parts know their deviation badly. One part knows none: infinite.
    """
    if splits < 2:
        return Interval(math.inf, -math.inf, math.inf)
    error = deviation / (splits - 1) ** 0.5  # np.std divides by the number of parts
    return Interval(error, mean - student(splits - 1) * error, mean + student(splits - 1) * error)


def subsets_interval(mean: float, deviation: float, subsets: int, subset_size: int, count: int) -> Interval:
    """95% interval of a mean of random subsets of `count` images, such as KID's; `deviation` is that of the subsets.

    Subsets of one set share images: they differ less than sets would, by the share f = size / count that each holds of
    it, and their mean is no better known than the whole set's. If a set's variance falls as 1 / count, it is
    `deviation^2 / (1 - f) (f + (1 - f) / subsets)`. A subset that is the whole set says nothing: infinite.
    """
    share = subset_size / count
    if subsets < 2 or share >= 1:
        return Interval(math.inf, -math.inf, math.inf)
    error = deviation * ((share / (1 - share) + 1 / subsets) * subsets / (subsets - 1)) ** 0.5
    return Interval(error, mean - NORMAL * error, mean + NORMAL * error)


def student(freedom: int) -> float:
    """Student's 97.5% quantile."""
    from scipy.special import stdtrit

    return float(stdtrit(freedom, 0.975))


def _counted(features: Tensor, weights: Tensor, device: torch.device | str) -> Iterable[tuple[Tensor, Tensor]]:
    """Blocks of the rows that count: features (n, D) and weights (n,), float64."""
    for start in range(0, len(features), BLOCK):
        weight = weights[start : start + BLOCK]
        rows = features[start : start + BLOCK]
        chosen = weight > 0
        yield (rows if chosen.all() else rows[chosen]).to(device).double(), weight[chosen].to(device)
