"""Metrics from features: how far a set of images is from the reference, each named for how it was made.

FID (arXiv 1706.08500), Inception Score (arXiv 1606.03498), KID (arXiv 1801.01401), precision and recall (arXiv
1904.06991), computed by torch-fidelity in the feature space of the classifier that the `reference` stage fitted.
Names carry extractor and count, `fid_digits_classifier_1k`: such a figure is comparable with figures of the same name
and reference, and with no paper's.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dit import torchvision_cpu
from dit.checkpoint import load_tensors
from dit.features import extract, load_classifier, registered_extractor, statistics

LOWER_IS_BETTER = ("fid", "kid")


@dataclass(frozen=True)
class EvaluateConfig:
    """Settings of the metrics, as torch-fidelity names them."""

    nearest_k: int = 3
    is_splits: int = 10
    kid_subsets: int = 50
    kid_subset_size: int = 100
    seed: int = 2020

    def __post_init__(self) -> None:
        for name in ("nearest_k", "is_splits", "kid_subsets", "kid_subset_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be 0 to {2**32 - 1}, got {self.seed}")


@dataclass(frozen=True)
class Reference:
    """The real images as the evaluator knows them (artifacts/reference)."""

    folder: Path
    extractor: str  # name, e.g. digits_classifier
    digest: str
    num_classes: int

    @classmethod
    def load(cls, folder: Path) -> "Reference":
        """Raises ValueError where the folder is no reference."""
        try:
            told = json.loads((folder / "reference.json").read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            raise ValueError(
                f"{folder} holds no reference (reference.json is missing or torn): run the stage `reference`"
            ) from None
        return cls(folder, told["extractor"], told["digest"], told["num_classes"])


def score(images: np.ndarray, labels: np.ndarray, reference: Path, evaluate: EvaluateConfig) -> dict[str, float]:
    """All metrics of uint8 images (N, H, W, 3) and the labels (N,) that they were drawn for (-1 = none), by name.

    Raises ValueError for too few images: N must exceed the neighbours and splits that the settings ask for.
    """
    torchvision_cpu.prepare()
    from torch_fidelity.metric_fid import fid_statistics_to_metric
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    least = max(evaluate.nearest_k + 1, 2)
    if len(images) < least:
        raise ValueError(f"sample.num_images must be at least {least} for these metrics, got {len(images)}")
    known = Reference.load(reference)
    space, count = known.extractor, short_count(len(images))
    features = extract(registered_extractor(space, reference / "classifier.safetensors"), images)
    real = load_tensors(reference / "features.safetensors")
    if not all(torch.isfinite(feature).all() for feature in features.values()):
        raise ValueError("the images' features are not finite: the classifier of artifacts/reference is broken")
    result = {}
    for layer, infix in (("hidden", ""), ("pooled", "_pooled")):
        distance = fid_statistics_to_metric(statistics(features[layer]), _statistics(real, layer), False)
        result[f"fid_{space}{infix}_{count}"] = distance["frechet_inception_distance"]
    subset = min(evaluate.kid_subset_size, len(images), len(real["pooled"]))
    kid = kid_features_to_metric(
        features["pooled"],
        real["pooled"].double(),
        kid_subsets=evaluate.kid_subsets,
        kid_subset_size=subset,
        rng_seed=evaluate.seed,
        verbose=False,
    )
    result[f"kid_{space}_pooled_{count}"] = kid["kernel_inception_distance_mean"]
    prc = prc_features_to_metric(
        features["hidden"],
        real["hidden"].double(),
        prc_neighborhood=evaluate.nearest_k,
        prc_batch_size=2000,
        save_cpu_ram=True,  # never the whole matrix of distances
        verbose=False,
    )
    result[f"precision_{space}_{count}"] = prc["precision"]
    result[f"recall_{space}_{count}"] = prc["recall"]
    if known.num_classes:  # without classes the score has no meaning, and there is nothing to agree with
        splits = min(evaluate.is_splits, len(images))
        isc = isc_features_to_metric(features["logits"], splits=splits, shuffle=True, rng_seed=evaluate.seed)
        result[f"inception_score_{space}_{count}"] = isc["inception_score_mean"]
    if known.num_classes and (labels >= 0).all():
        judge = extract(load_classifier(reference / "judge.safetensors"), images)["logits"].argmax(dim=1)
        result[f"class_agreement_{count}"] = float((judge.numpy() == labels).mean())
    return {name: float(value) for name, value in result.items()}


def metric_names(classes: bool, *, conditional: bool = True) -> tuple[str, ...]:
    """The metrics that `score` gives, without extractor and count, where the images have classes or have none.

    A model that is not `conditional` on anything is not asked for a class, so there is none to agree with.
    """
    names = ("fid", "fid_pooled", "kid_pooled", "precision", "recall")
    names += ("inception_score",) if classes else ()
    return (*names, "class_agreement") if classes and conditional else names


def short_count(count: int) -> str:
    """1000 -> 1k, 50000 -> 50k, 360 -> 360."""
    return f"{count // 1000}k" if count >= 1000 and count % 1000 == 0 else str(count)


def lower_is_better(metric: str) -> bool:
    """Whether a smaller figure of this name is the better one."""
    return metric.startswith(LOWER_IS_BETTER)


def _statistics(real: dict[str, Any], layer: str) -> dict[str, np.ndarray]:
    return {"mu": real[f"{layer}.mu"].numpy(), "sigma": real[f"{layer}.sigma"].numpy()}
