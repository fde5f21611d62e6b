"""reference: what generated images are measured against. The space they are compared in, and the real images in it.

The evaluator's classifier is fitted on training images and gives the feature space, unless `extractor` names another.
The judge is fitted on held-out images alone: the generator never saw what taught it.
"""

import hashlib
import json
import shutil
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dit import entry, runtime
from dit.checkpoint import save_tensors
from dit.classifier import BATCH, ReferenceConfig, accuracy, fit_classifier, save_classifier, shrunk
from dit.extractors import Extractor, classifier_extractor, open_extractor
from dit.features import collect, evenly
from dit.imagesets import ImageSet, from_shards
from dit.parallel import world
from dit.paths import Given, Paths, file_sha256, given_here, publish, write_json
from dit.progress import Progress
from dit.runtime import RunConfig
from dit.shards import read_manifest
from dit.sources import DataConfig

MAX_FITTED = 20_000  # images that a classifier is fitted on: a small one learns nothing more from further ones


def reference(data: DataConfig, reference: ReferenceConfig, run: RunConfig, *, paths: Paths) -> None:
    """Write artifacts/reference: judge, classifier, features.safetensors with statistics, reference.json."""
    device, here = runtime.start(run), world()
    shards = paths.artifacts / "shard"
    manifest = read_manifest(shards)
    if not any(shard["split"] == "heldout" for shard in manifest["shards"]):
        raise ValueError("data.held_out_fraction: no image is held out, and the judge needs some: raise it")
    train, heldout = from_shards(shards, "train"), from_shards(shards, "heldout")
    told = {"extractor": f"{data.name}_{'classifier' if data.num_classes else 'rotation'}"}
    told |= {"data": manifest["digest"], "num_classes": data.num_classes}
    with publish(paths.artifacts / "reference", paths.scratch) if here.main else nullcontext() as folder:
        told = write_reference(here.share(folder), train, heldout, told, reference, device, paths.given)
    if here.main:
        print(", ".join(f"{key} {value}" for key, value in told.items()))


def write_reference(
    folder: Path,
    train: ImageSet,
    heldout: ImageSet,
    told: dict[str, Any],
    config: ReferenceConfig,
    device: torch.device | str = "cpu",
    given: Given = given_here,
) -> dict[str, Any]:
    """Fit the classifiers that are needed, on `told["num_classes"]` classes, and fill `folder`.

    `told["extractor"]` is the classifier's name, which another extractor replaces by its own. Statistics are of all
    training images; the features of at most `config.max_features`, evenly spaced, are kept for metrics that compare
    image with image. What reference.json says is returned. `given` says where config.weights lie. Called by every
    process of `world()`; the main one writes.
    """
    here, told = world(), dict(told)
    if here.main:
        told |= _fit(folder, train, heldout, told["num_classes"], config)
    told = here.share(told)
    extractor = _extractor(folder, told, config, device, given)
    told |= {"extractor": extractor.name, "extractor_kind": config.extractor, "extractor_digest": extractor.digest}
    told |= {"weights": config.weights, "resize": extractor.resize, "count": train.count, "image_size": train.size[0]}
    scratch = Path(here.share(tempfile.mkdtemp(prefix=f"{folder.name}-", dir=folder.parent) if here.main else None))
    try:
        tensors = _tensors(extractor, train, config, scratch)
        if tensors is None:
            return told
        save_tensors(folder / "features.safetensors", tensors)
    finally:
        if here.main:
            shutil.rmtree(scratch, ignore_errors=True)
    told = {"digest": _digest(folder), **told, "kept": len(tensors["indices"])}
    write_json(folder / "reference.json", told)
    return told


def _fit(folder: Path, train: ImageSet, heldout: ImageSet, classes: int, config: ReferenceConfig) -> dict[str, float]:
    """The evaluator's classifier, where it is the extractor, and the judge, where there are classes, into `folder`."""
    found: dict[str, float] = {}
    own = config.extractor == "classifier"
    if not own and not classes:
        return found
    seen, unseen = _some(train), _some(heldout)
    if own:
        classifier = fit_classifier(*seen, classes, config, "evaluator")
        save_classifier(folder / "classifier.safetensors", classifier)
        if classes:
            found["classifier_accuracy_heldout"] = accuracy(classifier, *unseen)
    if classes:
        judge = fit_classifier(*unseen, classes, config, "judge")
        save_classifier(folder / "judge.safetensors", judge)
        found["judge_accuracy_train"] = accuracy(judge, *seen)
    return found


def _some(images: ImageSet) -> tuple[np.ndarray, np.ndarray]:
    """At most MAX_FITTED of the images, evenly spaced and no larger than a classifier sees them, with their labels
    (0 where there are none)."""
    indices = evenly(images.count, MAX_FITTED)
    labels = np.zeros(len(indices), np.int64) if images.labels is None else images.labels[indices]
    parts = [shrunk(images.take(indices[i : i + BATCH])) for i in range(0, len(indices), BATCH)]
    return np.concatenate(parts), labels


def _extractor(
    folder: Path,
    told: dict[str, Any],
    config: ReferenceConfig,
    device: torch.device | str,
    given: Given,
) -> Extractor:
    if config.extractor == "classifier":
        weights = folder / "classifier.safetensors"
        return classifier_extractor(told["extractor"], weights, bool(told["num_classes"]), device)
    return open_extractor(config.extractor, device=device, weights=given(config.weights) if config.weights else None)


def _tensors(
    extractor: Extractor, train: ImageSet, config: ReferenceConfig, scratch: Path
) -> dict[str, torch.Tensor] | None:
    """What features.safetensors holds: {layer}.mu, {layer}.sigma, and of the kept images features, indices and, if there
    are any, labels."""
    progress = Progress(f"reference, by {extractor.name}", train.count)
    kept = dict.fromkeys(extractor.kept, config.max_features)
    found = collect(extractor, train, keep=kept, folder=scratch, progress=progress)
    if found is None:
        return None
    tensors = {layer: features.clone() for layer, features in found.kept.items()}
    for layer, moments in found.moments.items():
        tensors |= {f"{layer}.mu": moments.mean, f"{layer}.sigma": moments.covariance}
    indices = found.indices[extractor.neighbours]
    labels = {} if train.labels is None else {"labels": torch.from_numpy(train.labels)[indices]}
    return tensors | {"indices": indices} | labels


def _digest(folder: Path) -> str:
    content = [[file.name, file_sha256(file)] for file in sorted(folder.iterdir())]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


if __name__ == "__main__":
    entry.main(reference, together=True)
