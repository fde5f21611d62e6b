"""Which classes fail: the distance of each class's images to the same class's real ones, and how many are read as it.

A class has few images, often fewer than the features have dimensions. The distance is then computed from the features
themselves, not from covariances of which most directions are empty.
"""

from typing import TypedDict

import torch
from torch import Tensor

LEAST = 20  # images; a distance of fewer says more about their number than about the class


class ClassScore(TypedDict):
    """One class: its distance (None: too few images), how many there are, the share that is read as this class."""

    fid: float | None
    num_images: int
    num_real: int
    agreement: float | None


def per_class(
    features: Tensor,
    labels: Tensor,
    real_features: Tensor,
    real_labels: Tensor,
    read: Tensor | None = None,
    *,
    least: int = LEAST,
) -> dict[int, ClassScore]:
    """Every class's score, from features (N, D) and labels (N,) of the generated images and (M, D), (M,) of the real.

    `read` (N,) are the labels that a judge gives the generated images; without it there is no agreement. Labels below 0
    are no class. Distances of few images are biased upwards: compare classes of one table, of like counts, and no two
    sets of different counts. Raises ValueError for unequal dimensions or counts, and features that are not finite.
    """
    if features.shape[1] != real_features.shape[1]:
        raise ValueError(
            f"features of {features.shape[1]} and of {real_features.shape[1]} dimensions cannot be compared: "
            "use the extractor that the reference was made with"
        )
    told = [len(features), len(labels), len(labels if read is None else read)]
    if len(set(told)) > 1 or len(real_features) != len(real_labels):
        raise ValueError(
            f"features and labels differ in number: {told[0]} and {told[1:]} generated, "
            f"{len(real_features)} and {len(real_labels)} real: give one label for each image"
        )
    table = {}
    for label in sorted(label for label in {*labels.tolist(), *real_labels.tolist()} if label >= 0):
        ours, real = (labels == label).nonzero().flatten(), (real_labels == label).nonzero().flatten()
        enough = min(len(ours), len(real)) >= max(least, 2)
        table[label] = ClassScore(
            fid=distance_of(features[ours], real_features[real]) if enough else None,
            num_images=len(ours),
            num_real=len(real),
            agreement=None if read is None or not len(ours) else float((read[ours] == label).double().mean()),
        )
    return table


def worst(table: dict[int, ClassScore], num_classes: int) -> list[tuple[int, ClassScore]]:
    """The classes that fail most: by distance, then (where there is none) by agreement; classes without images never."""

    def failing(item: tuple[int, ClassScore]) -> tuple[float, float]:
        fid, agreement = item[1]["fid"], item[1]["agreement"]
        return (float("-inf") if fid is None else fid, 0.0 if agreement is None else -agreement)

    scored = [item for item in table.items() if item[1]["fid"] is not None or item[1]["agreement"] is not None]
    return sorted(scored, key=failing, reverse=True)[:num_classes]


def distance_of(features: Tensor, others: Tensor) -> float:
    """Frechet distance (arXiv 1706.08500, equation 6) of features (n, D) and (m, D) by their unbiased covariances.

    With covariances `A'A` and `B'B` of the centred features, `tr (A'A B'B)^(1/2)` is the sum of the singular values of
    `A B'`: n x m numbers instead of D x D, right for fewer images than dimensions. Raises ValueError for features that
    are not finite.
    """
    (mean, A), (other, B) = _centred(features), _centred(others)
    distance = (mean - other).square().sum() + A.square().sum() + B.square().sum()
    return max(float(distance - 2 * torch.linalg.svdvals(A @ B.T).sum()), 0.0)


def _centred(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (D,) and a matrix A of D columns with `A'A` the covariance, no higher than it is wide."""
    values = features.double()
    mean = values.mean(dim=0)
    if not torch.isfinite(mean).all():
        raise ValueError("the features hold values that are not finite (NaN or infinite): extract them again")
    A = (values - mean) / (len(values) - 1) ** 0.5
    return mean, torch.linalg.qr(A, mode="r").R if len(A) > A.shape[1] else A
