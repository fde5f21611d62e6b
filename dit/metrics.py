"""Metrics from features: how far a set of images is from the reference. Features in, figures out; nothing is read.

Features are tensors (n, D) of float32 or float64, which may be memory-mapped files: they are read in blocks. What is
summed is summed in float64. Precision and recall, which compare every image with every other, have a page of their own
(`neighbourhoods`).
"""

import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from dit.neighbourhoods import Neighbourhoods as Neighbourhoods
from dit.neighbourhoods import check_finite
from dit.neighbourhoods import neighbourhoods as neighbourhoods

LOWER_IS_BETTER = ("fid", "sfid", "kid")
ADM_SPLIT = 5000  # images in each of its Inception Scores
BLOCK = 4096  # rows that are looked at together
ROUNDING = torch.finfo(torch.float64).eps


def frechet_distance(mean_a: Tensor, covariance_a: Tensor, mean_b: Tensor, covariance_b: Tensor) -> float:
    """Squared Frechet distance of two Gaussians, |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)).

    FID, sFID and any other FD are this distance of features' means (D,) and unbiased covariances (D, D) (arXiv
    1706.08500, eq. 6). Right to 1e-6 of itself (and 1e-9 of the traces, where it nearly vanishes), for covariances of
    any rank. Raises ValueError for unequal dimensions and numbers that are not finite.
    """
    return frechet_to(mean_b, covariance_b)(mean_a, covariance_a)


def frechet_to(mean: Tensor, covariance: Tensor) -> Callable[[Tensor, Tensor], float]:
    """The squared Frechet distance to one Gaussian, as a function of the other's mean and covariance.

    Of this one a factor is found once, C = R R^T. The trace of (C C')^(1/2) is then that of (R^T C' R)^(1/2), whose
    matrix is symmetric: the sum of the roots of its eigenvalues. Rounding moves an eigenvalue by some 1e-16 of the
    largest, and so the root of a vanishing one by 1e-8. Where that could be seen in the distance, the other covariance
    is factored too, C' = S S^T: the same roots are the singular values of R^T S, which rounding moves by 1e-16 only.
    """
    mean, covariance = _gaussian(mean, covariance)
    factor = _factor(covariance)

    def distance(other_mean: Tensor, other_covariance: Tensor) -> float:
        other_mean, other_covariance = _gaussian(other_mean, other_covariance)
        if other_mean.shape != mean.shape:
            raise ValueError(
                f"features of {len(other_mean)} dimensions have no distance to features of {len(mean)}: both must come "
                "from the same layer of the same extractor"
            )
        other_mean, other_covariance = other_mean.to(mean.device), other_covariance.to(mean.device)
        traces = covariance.trace() + other_covariance.trace()
        rest = (mean - other_mean).square().sum() + traces
        eigenvalues = torch.linalg.eigvalsh(factor.T @ other_covariance @ factor).clamp(min=0)
        root_trace = eigenvalues.sqrt().sum()
        if _roots_error(eigenvalues) > 1e-7 * (rest - 2 * root_trace) + 1e-10 * traces:
            root_trace = torch.linalg.svdvals(factor.T @ _factor(other_covariance)).sum()
        return max(float(rest - 2 * root_trace), 0.0)

    return distance


def _gaussian(mean: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor]:
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise ValueError(
            f"a mean (D,) needs a covariance (D, D), got {tuple(mean.shape)} and {tuple(covariance.shape)}: these are "
            "no statistics of features"
        )
    if not (mean.isfinite().all() and covariance.isfinite().all()):
        raise ValueError("mean or covariance is not finite: the features they were made of are broken, or too few")
    return mean.double(), covariance.double()


def _factor(covariance: Tensor) -> Tensor:
    """R (D, rank) with R R^T = covariance: Cholesky's where the rank is full, else from the eigenvalues."""
    lower, failed = torch.linalg.cholesky_ex(covariance)
    steps = lower.diagonal().square()
    least = len(covariance) * ROUNDING  # of the largest: what is below is rounding, not variance
    if not failed and steps.min() > least * steps.max():
        return lower
    values, vectors = torch.linalg.eigh(covariance)
    real = values > least * values[-1]
    return vectors[:, real] * values[real].sqrt()


def _roots_error(eigenvalues: Tensor) -> Tensor:
    """By how much the sum of the roots may be off, if each eigenvalue is off by a few roundings of the largest."""
    error = 8 * ROUNDING * eigenvalues.max() if len(eigenvalues) else eigenvalues.new_zeros(())
    return torch.minimum(error / eigenvalues.sqrt(), error.sqrt()).nan_to_num(0).square().sum().sqrt()


def inception_score(
    logits: Tensor, splits: int = 10, *, order: Literal["shuffled", "file", "adm"] = "shuffled", seed: int = 2020
) -> tuple[float, float]:
    """exp E_x KL(p(y|x) || p(y)) of a classifier's logits (n, C) (arXiv 1606.03498, sec. 4): mean and deviation of splits.

    Of each split, p(y) is its own. "shuffled" draws the splits at random (as torch-fidelity does, from `seed`), "file"
    takes them one after the other: images that lie in order of class then score far lower. So does "adm", in parts of
    5,000 images however many there are (the last may be shorter), as ADM's evaluator: of 50,000 that is "file".
    Raises ValueError for fewer images than splits and logits that are not finite.
    """
    n = len(logits)
    if not 1 <= (1 if order == "adm" else splits) <= n:
        raise ValueError(f"an inception score of {splits} splits needs at least as many images, got {n}")
    if order not in ("shuffled", "file", "adm"):
        raise ValueError(f"order must be shuffled, file or adm, got {order!r}")
    check_finite(logits, "the images' class")
    images = (
        None if order != "shuffled" else torch.from_numpy(np.random.RandomState(seed).permutation(n)).to(logits.device)
    )
    scores = []
    bounds = [*range(0, n, ADM_SPLIT), n] if order == "adm" else [split * n // splits for split in range(splits + 1)]
    for first, last in pairwise(bounds):
        marginal = torch.zeros(logits.shape[1], dtype=torch.float64, device=logits.device)
        negative_entropy = 0.0
        for rows in _blocks(first, last):
            log_p = (logits[rows] if images is None else logits[images[rows]]).double().log_softmax(dim=1)
            p = log_p.exp()
            marginal += p.sum(dim=0)
            negative_entropy += float((p * log_p).sum())
        marginal /= last - first
        scores.append(math.exp(negative_entropy / (last - first) - float(torch.xlogy(marginal, marginal).sum())))
    return float(np.mean(scores)), float(np.std(scores))


def kernel_distance(
    generated: Tensor, real: Tensor, *, subsets: int, subset_size: int, seed: int
) -> tuple[float, float]:
    """KID: the unbiased squared MMD of k(a, b) = (a.b / D + 1)^3 (arXiv 1801.01401, sec. 4): mean, deviation of subsets.

    Subsets are drawn as torch-fidelity draws them, without replacement, from features (n, D) and (m, D). The mean may
    be slightly below 0. Raises ValueError for subsets larger than either set or smaller than 2, for unequal dimensions,
    and for features that are not finite.
    """
    if generated.shape[1] != real.shape[1]:
        raise ValueError(
            f"the generated images' features have {generated.shape[1]} dimensions and the real ones' {real.shape[1]}: "
            "both must come from the same extractor"
        )
    if not 2 <= subset_size <= min(len(generated), len(real)):
        raise ValueError(
            f"KID's subset size must be at least 2 and at most the images that there are ({len(generated)} generated, "
            f"{len(real)} real), got {subset_size}"
        )
    check_finite(generated, "the generated images'")
    check_finite(real, "the real images'")
    random = np.random.RandomState(seed)
    distances = []
    for _ in range(subsets):
        x, y = (
            features[torch.from_numpy(random.choice(len(features), subset_size, replace=False)).to(features.device)]
            for features in (generated, real)
        )
        distances.append(_unbiased_mmd(x.double(), y.double().to(x.device)))
    return float(np.mean(distances)), float(np.std(distances))


def _unbiased_mmd(x: Tensor, y: Tensor) -> float:
    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / a.shape[1] + 1) ** 3

    def among_others(a: Tensor) -> Tensor:
        matrix = kernel(a, a)
        return (matrix.sum() - matrix.trace()) / (len(a) * (len(a) - 1))

    return float(among_others(x) + among_others(y) - 2 * kernel(x, y).mean())


def class_agreement(read: Tensor | np.ndarray, labels: Tensor | np.ndarray) -> float:
    """The share of images that a judge reads (n,) as the classes (n,) that they were drawn for."""
    if len(read) != len(labels) or len(read) == 0:
        raise ValueError(
            f"{len(read)} images were read and {len(labels)} labels given: they must be as many, at least 1"
        )
    return float((np.asarray(read) == np.asarray(labels)).mean())


def short_count(count: int) -> str:
    """1000 -> 1k, 50000 -> 50k, 360 -> 360."""
    return f"{count // 1000}k" if count >= 1000 and count % 1000 == 0 else str(count)


def lower_is_better(metric: str) -> bool:
    """Whether a smaller figure of this name is the better one."""
    return metric.startswith(LOWER_IS_BETTER)


def _blocks(first: int, last: int) -> Iterator[slice]:
    for start in range(first, last, BLOCK):
        yield slice(start, min(start + BLOCK, last))
