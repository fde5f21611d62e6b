"""reference: what generated images are measured against. Two classifiers, and the real images' statistics.

The evaluator's classifier is fitted on training images and gives the feature space. The judge is fitted on held-out
images alone: the generator never saw what taught it.
"""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dit import entry, runtime
from dit.checkpoint import save_tensors
from dit.features import ReferenceConfig, accuracy, extract, fit_classifier, save_classifier, statistics
from dit.paths import Paths, publish, write_json
from dit.runtime import RunConfig
from dit.shards import load_split, read_manifest
from dit.sources import DataConfig


def reference(data: DataConfig, reference: ReferenceConfig, run: RunConfig, *, paths: Paths) -> None:
    """Write artifacts/reference: classifier, judge, features.safetensors with statistics, reference.json."""
    runtime.start(run)
    shards = paths.artifacts / "shard"
    manifest = read_manifest(shards)
    images, labels = load_split(shards, "train")
    heldout, heldout_labels = load_split(shards, "heldout")
    if not len(heldout):
        raise ValueError("data.held_out_fraction: no image is held out, and the judge needs some: raise it")
    told = {
        "extractor": f"{data.name}_{'classifier' if data.num_classes else 'rotation'}",
        "data": manifest["digest"],
        "num_images": len(images),
        "num_classes": data.num_classes,
    }
    with publish(paths.artifacts / "reference", paths.scratch) as folder:
        told = write_reference(folder, images, labels, heldout, heldout_labels, told, reference)
    print(", ".join(f"{key} {value}" for key, value in told.items()))


def write_reference(
    folder: Path,
    images: np.ndarray,
    labels: np.ndarray,
    heldout: np.ndarray,
    heldout_labels: np.ndarray,
    told: dict[str, Any],
    config: ReferenceConfig,
) -> dict[str, Any]:
    """Fit both classifiers and fill `folder`; what reference.json says is returned. `told` says `num_classes`."""
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
    features, tensors = extract(classifier, images), {}
    for layer in ("hidden", "pooled"):
        tensors[layer] = features[layer].float()
        for name, value in statistics(features[layer]).items():
            tensors[f"{layer}.{name}"] = torch.from_numpy(value)
    save_tensors(folder / "features.safetensors", tensors)
    told = {"digest": _digest(folder), **told}
    write_json(folder / "reference.json", told)
    return told


def _digest(folder: Path) -> str:
    sha = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        sha.update(file.name.encode() + file.read_bytes())
    return sha.hexdigest()


if __name__ == "__main__":
    entry.main(reference)
