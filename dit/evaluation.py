"""One set of images against a reference: every metric, and the terms on which each figure was come by.

A figure's name carries extractor and count, `fid_inception_50k`: it is comparable with figures of the same name and
reference, and with nothing else. Its record adds what a name cannot hold: the digests of extractor and reference, how
many real images there were, and how far another draw of as many images would be expected to lie.
"""

import math
import re
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dit import metrics, perclass, uncertainty
from dit.classifier import Classifier, load_classifier
from dit.extractors import Extractor, open_extractor
from dit.features import Collected, collect
from dit.imagesets import ImageSet
from dit.metrics import short_count
from dit.paths import given_here
from dit.references import Reference, kind_of, read_reference, real_features, require_match
from dit.sources import DataConfig
from dit.uncertainty import Interval
from dit.weights import INCEPTION

ONE_BY_ONE = ("precision", "recall", "density", "coverage", "kid")  # metrics that compare image with image
READ = "read"  # the layer of what the judge reads an image as


@dataclass(frozen=True)
class EvaluateConfig:
    """Settings of the metrics, and of what tells how far to trust them."""

    nearest_k: int = 3
    is_splits: int = 10
    kid_subsets: int = 50
    kid_subset_size: int = 100
    seed: int = 2020
    bootstrap: int = 20  # resamplings behind each interval; 0 = none, and no estimate of the bias either
    training_images: int = 50_000  # at most so many are looked at for copies; 0 = no such check

    def __post_init__(self) -> None:
        for name, least in (("nearest_k", 1), ("is_splits", 1), ("kid_subsets", 1), ("kid_subset_size", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be 0 to {2**32 - 1}, got {self.seed}")
        if self.bootstrap < 0 or self.bootstrap == 1:
            raise ValueError(f"bootstrap must be 0 (none) or at least 2, got {self.bootstrap}")
        if self.training_images < 0:
            raise ValueError(f"training_images must be at least 0 (none), got {self.training_images}")

    @property
    def terms(self) -> dict[str, int]:
        """What decides the figures themselves; the rest tells how far to trust them."""
        return {name: value for name, value in asdict(self).items() if name not in ("bootstrap", "training_images")}


@dataclass(frozen=True)
class Evaluation:
    """What was found. `records` tell of each figure of `values` on what terms it was come by."""

    values: dict[str, float]
    records: list[dict[str, Any]]
    infinity: dict[str, Any] | None = None  # FID at several sizes, and what it tends to
    classes: dict[int, dict[str, Any]] = field(default_factory=dict)  # by label; see perclass.py

    def told(self) -> dict[str, Any]:
        """All but the bare figures, as JSON has it."""
        return {"records": self.records, "infinity": self.infinity, "classes": self.classes}


def evaluate_images(
    images: ImageSet,
    reference: Reference,
    extractor: Extractor,
    config: EvaluateConfig,
    *,
    folder: Path,
    progress: Callable[[int], None] = lambda count: None,
    labels: np.ndarray | None = None,
    judge: Callable[[Tensor], dict[str, Tensor]] | None = None,
    heavy: bool = True,
) -> Evaluation | None:
    """All metrics of `images`; None at every process but the main one.

    `labels` (N,) are what the images were drawn for, -1 = nothing; the `judge`, a classifier of uint8 images
    (N, 3, H, W), then says how many of them can be read as that. Features go into `folder` and may be deleted
    afterwards. Without `heavy` there are figures only: no interval, no bias, no classes.

    Raises ValueError where there are too few images for the settings, or their features are not finite.
    """
    require_enough(images, config)
    require_match(reference, extractor, images)
    judged = labels is not None and judge is not None and bool((labels >= 0).all())
    keep = dict.fromkeys(extractor.kept)
    keep |= {extractor.scores: None} if extractor.scores else {}
    keep |= {READ: None} if judged else {}
    network = with_judge(extractor, judge) if judged else extractor
    found = collect(network, images, keep=keep, folder=folder, progress=progress)
    real = real_features(reference, extractor, folder)
    if found is None:
        return None
    values, spread = _figures(found, reference, real, extractor, config)
    count = short_count(images.count)
    if judged:
        read = found.kept[READ].flatten().long().numpy()
        name = f"class_agreement_{count}"
        values[name] = metrics.class_agreement(read, labels)
        spread[name] = uncertainty.share_interval(values[name], images.count)
    infinity, classes = None, {}
    if heavy and config.bootstrap:
        infinity = _trust(found, reference, extractor, config, count, spread)
    primary = extractor.frechet[""]
    if heavy and labels is not None and reference.labels is not None and primary in real:
        shown = torch.from_numpy(read) if judged else None
        wanted = torch.from_numpy(labels)
        classes = perclass.per_class(found.kept[primary], wanted, real[primary], reference.labels, shown)
    one_by_one = len(real[extractor.neighbours]) if extractor.neighbours in real else 0
    return Evaluation(
        values, _records(values, spread, images, reference, extractor, config, one_by_one), infinity, classes
    )


def require_enough(images: ImageSet, config: EvaluateConfig) -> None:
    """Raise ValueError where there are too few images for the metrics."""
    if images.count < (least := fewest_images(config)):
        raise ValueError(f"{images.name}: these metrics need at least {least} images, got {images.count}: give more")


def fewest_images(config: EvaluateConfig) -> int:
    """So many images have all the metrics; fewer have none."""
    return max(config.nearest_k + 1, 2)


def score(
    images: ImageSet,
    reference: Path,
    config: EvaluateConfig,
    device: torch.device | str = "cpu",
    *,
    place: Path | None = None,
    progress: Callable[[int], None] = lambda count: None,
) -> dict[str, float]:
    """The bare figures of `images`, by name, against a reference of the pipeline's in the folder `reference`; of one
    process. Their labels are what they were drawn for. Features lie in `place` meanwhile, by default among temporary
    files."""
    known = read_reference(reference)
    terms = {"labels": images.labels, "judge": judge_of(known), "heavy": False, "progress": progress}
    with tempfile.TemporaryDirectory(prefix="features-", dir=place) as folder:
        return evaluate_images(images, known, extractor_of(known, device), config, folder=Path(folder), **terms).values


def extractor_of(reference: Reference, device: torch.device | str = "cpu") -> Extractor:
    """The extractor that a reference of the pipeline's was made with. Raises ValueError where it is not to be had."""
    weights = given_here(reference.weights) if reference.weights else None
    if reference.extractor == "inception_custom" and weights is None:
        raise ValueError(f"{reference.folder} was made with weights of one's own: name their file (--weights)")
    return open_extractor(kind_of(reference), device=device, weights=weights, folder=reference.folder)


def judge_of(reference: Reference) -> Classifier | None:
    """The classifier that learned from held-out images alone; None where a reference has none."""
    file = reference.folder / "judge.safetensors" if reference.folder else None
    return load_classifier(file) if file and file.is_file() else None


def with_judge(extractor: Extractor, judge: Callable[[Tensor], dict[str, Tensor]]) -> Extractor:
    """The extractor with one layer more: what the judge reads each image as. The images are then read once."""

    def both(images: Tensor) -> dict[str, Tensor]:
        return {**extractor(images), READ: judge(images.cpu())["logits"].argmax(dim=1, keepdim=True).float()}

    return replace(extractor, network=both, widths={**extractor.widths, READ: 1})


def _figures(
    found: Collected, reference: Reference, real: dict[str, Tensor], extractor: Extractor, config: EvaluateConfig
) -> tuple[dict[str, float], dict[str, Interval]]:
    """The metrics of features, and the intervals of those that have one for nothing."""
    space, count = extractor.name, short_count(found.count)
    values, spread = {}, {}
    distances = {f"fid_{space}{infix}_{count}": layer for infix, layer in extractor.frechet.items()}
    distances |= {f"sfid_{space}_{count}": extractor.spatial} if extractor.spatial else {}
    for name, layer in distances.items():
        if layer in reference.moments:  # statistics made elsewhere may lack a layer
            moments = found.moments[layer]
            values[name] = metrics.frechet_distance(moments.mean, moments.covariance, *reference.moments[layer])
    infix, layer = extractor.kernel
    if layer in real:
        size, name = min(config.kid_subset_size, found.count, len(real[layer])), f"kid_{space}{infix}_{count}"
        values[name], deviation = metrics.kernel_distance(
            found.kept[layer], real[layer], subsets=config.kid_subsets, subset_size=size, seed=config.seed
        )
        images = min(found.count, len(real[layer]))
        spread[name] = uncertainty.subsets_interval(values[name], deviation, config.kid_subsets, size, images)
    if (layer := extractor.neighbours) in real:
        near = metrics.neighbourhoods(real[layer], found.kept[layer], config.nearest_k, device=_exact(extractor.device))
        ours, theirs = (found.count, len(real[layer])), (len(real[layer]), found.count)
        counts = {"precision": ours, "recall": theirs, "density": None, "coverage": theirs}
        for kind, sizes in counts.items():
            name = f"{kind}_{space}_{count}"
            values[name] = getattr(near, kind)
            if sizes:
                spread[name] = uncertainty.share_interval(values[name], *sizes)
    if extractor.scores:  # a rotation's classes are none: then there is no such layer
        logits = found.kept[extractor.scores]
        orders = {"inception_score": "shuffled"}
        orders |= {"inception_score_file_order": "adm"} if extractor.spatial else {}  # ADM's, of Inception's logits
        for kind, order in orders.items():
            name = f"{kind}_{space}_{count}"
            splits = _splits(name, found.count, config)
            values[name], deviation = metrics.inception_score(logits, splits, order=order, seed=config.seed)
            spread[name] = uncertainty.splits_interval(values[name], deviation, splits)
    return {name: float(value) for name, value in values.items()}, spread


def _trust(
    found: Collected,
    reference: Reference,
    extractor: Extractor,
    config: EvaluateConfig,
    count: str,
    spread: dict[str, Interval],
) -> dict[str, Any] | None:
    """Intervals of the Fréchet distances into `spread`; how the first of them depends on the number of images."""
    told, where = None, _exact(extractor.device)
    for infix, layer in extractor.frechet.items():
        if layer not in reference.moments:
            continue
        mean, covariance = (part.to(where) for part in reference.moments[layer])
        features, distance = found.kept[layer], metrics.frechet_to(mean, covariance)
        name = f"fid_{extractor.name}{infix}_{count}"
        spread[name] = uncertainty.bootstrap(features, distance, config.bootstrap, config.seed, where)
        sizes = uncertainty.default_sizes(*features.shape)
        if infix == "" and len(sizes) > 1:
            points = uncertainty.at_sizes(features, distance, sizes, config.seed, where)
            limit, error = uncertainty.infinity(points)
            told = {"metric": name, "points": points, "limit": limit, "standard_error": error}
    return told


def _records(
    values: dict[str, float],
    spread: dict[str, Interval],
    images: ImageSet,
    reference: Reference,
    extractor: Extractor,
    config: EvaluateConfig,
    one_by_one: int,
) -> list[dict[str, Any]]:
    terms = {"count": images.count, "image_size": images.side, "extractor": extractor.name}
    terms |= {"extractor_digest": extractor.digest, "extractor_official": extractor.official}
    terms |= {"resize": extractor.resize, "reference": reference.digest, "reference_form": reference.form}
    terms |= {"reference_image_size": reference.image_size}
    records = []
    for name, value in values.items():
        seen = one_by_one if name.startswith(ONE_BY_ONE) else reference.count
        record = {"metric": name, "value": value, **terms, "reference_count": seen}
        if name in spread and math.isfinite(spread[name].standard_error):
            error, low, high = spread[name]
            record |= {"standard_error": error, "interval": [low, high]}
        if name.startswith("inception_score"):
            splits = _splits(name, images.count, config)
            deviation = spread[name].standard_error * math.sqrt(splits - 1) if splits > 1 else 0.0
            record |= {"splits": splits, "deviation_of_splits": deviation}
        records.append(record)
    return records


def _exact(device: torch.device) -> torch.device:
    """Where float64 is to be had: Apple's accelerators have none."""
    return torch.device("cpu") if device.type == "mps" else device


def _splits(metric: str, count: int, config: EvaluateConfig) -> int:
    adm = metric.startswith("inception_score_file_order")
    return math.ceil(count / metrics.ADM_SPLIT) if adm else min(config.is_splits, count)


def metric_names(classes: bool, *, extractor: str = "classifier", conditional: bool = True) -> tuple[str, ...]:
    """The metrics that there will be, without extractor and count, where the images have classes or have none.

    A model that is not `conditional` on anything is not asked for a class, so there is none to agree with.
    """
    own, inception = extractor == "classifier", extractor in INCEPTION
    names = ("fid", "fid_pooled", "kid_pooled") if own else ("fid", "kid")
    names += ("sfid",) if inception else ()
    names += ("precision", "recall", "density", "coverage")
    names += ("inception_score",) if inception or (own and classes) else ()
    names += ("inception_score_file_order",) if inception else ()
    return (*names, "class_agreement") if classes and conditional else names


def full_names(metrics: Iterable[str], extractor: str, data: DataConfig, count: int) -> set[str]:
    """What metrics.json calls these metrics of `metric_names`, of so many images.

    Inception's have two names each: the one is of weights other than the published ones.
    """
    own = f"{data.name}_{'classifier' if data.num_classes else 'rotation'}"
    spaces = {"classifier": (own,), **dict.fromkeys(INCEPTION, ("inception", "inception_custom"))}
    found = set()
    for space in spaces.get(extractor, (re.sub(r"\W", "_", extractor),)):
        for metric in metrics:
            kind, pooled, _ = metric.partition("_pooled")
            whole = metric if metric == "class_agreement" else f"{kind}_{space}{pooled}"
            found.add(f"{whole}_{short_count(count)}")
    return found
