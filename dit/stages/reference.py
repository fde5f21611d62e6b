"""reference: what generated images are measured against. Two classifiers, and the real images' statistics.

The evaluator's classifier is fitted on training images and gives the feature space. The judge is fitted on held-out
images alone: the generator never saw what taught it.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dit import entry, runtime
from dit.checkpoint import save_tensors
from dit.features import BATCH, ReferenceConfig, accuracy, extract, fit_classifier, save_classifier, statistics
from dit.paths import Paths, file_sha256, publish, write_json
from dit.runtime import RunConfig
from dit.shards import load_split, read_manifest, stream_split
from dit.sources import DataConfig

MAX_FITTED = 20_000  # images that a classifier is fitted on: a small one learns nothing more from further ones
MAX_FEATURES = 10_000  # real images that precision, recall and KID see, as many as ADM's evaluator takes


def reference(data: DataConfig, reference: ReferenceConfig, run: RunConfig, *, paths: Paths) -> None:
    """Write artifacts/reference: classifier, judge, features.safetensors with statistics, reference.json."""
    runtime.start(run)
    shards = paths.artifacts / "shard"
    manifest = read_manifest(shards)
    images, labels = load_split(shards, "train", MAX_FITTED)
    heldout, heldout_labels = load_split(shards, "heldout", MAX_FITTED)
    if not len(heldout):
        raise ValueError("data.held_out_fraction: no image is held out, and the judge needs some: raise it")
    told = {
        "extractor": f"{data.name}_{'classifier' if data.num_classes else 'rotation'}",
        "data": manifest["digest"],
        "num_classes": data.num_classes,
    }
    everything = batches(image for _, _, image in stream_split(shards, "train"))
    with publish(paths.artifacts / "reference", paths.scratch) as folder:
        told = write_reference(folder, images, labels, heldout, heldout_labels, everything, told, reference)
    print(", ".join(f"{key} {value}" for key, value in told.items()))


def write_reference(
    folder: Path,
    images: np.ndarray,
    labels: np.ndarray,
    heldout: np.ndarray,
    heldout_labels: np.ndarray,
    everything: Iterable[np.ndarray],
    told: dict[str, Any],
    config: ReferenceConfig,
) -> dict[str, Any]:
    """Fit both classifiers and fill `folder`; what reference.json says is returned. `told` says `num_classes`.

    `everything` is all training images, in batches: the statistics are of them all. Of their features at most
    MAX_FEATURES are kept, evenly, for the metrics that compare image with image.
    """
    classes = told["num_classes"]
    classifier = fit_classifier(images, labels, classes, config, "evaluator")
    save_classifier(folder / "classifier.safetensors", classifier)
    if classes:
        judge = fit_classifier(heldout, heldout_labels, classes, config, "judge")
        save_classifier(folder / "judge.safetensors", judge)
        told |= {
            "classifier_accuracy_heldout": accuracy(classifier, heldout, heldout_labels),
            "judge_accuracy_train": accuracy(judge, images, labels),
        }
    features, tensors = extract(classifier, everything, layers=("hidden", "pooled")), {}
    told["num_images"] = len(features["hidden"])
    for layer in features:
        tensors[layer] = features[layer][:: max(1, -(-told["num_images"] // MAX_FEATURES))].float()
        for name, value in statistics(features[layer]).items():
            tensors[f"{layer}.{name}"] = torch.from_numpy(value)
    save_tensors(folder / "features.safetensors", tensors)
    told = {"digest": _digest(folder), **told}
    write_json(folder / "reference.json", told)
    return told


def batches(images: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Images (H, W, 3), one at a time, as batches (N, H, W, 3)."""
    images = iter(images)
    while batch := list(islice(images, BATCH)):
        yield np.stack(batch)


def _digest(folder: Path) -> str:
    content = [[file.name, file_sha256(file)] for file in sorted(folder.iterdir())]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


if __name__ == "__main__":
    entry.main(reference)
