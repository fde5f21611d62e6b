"""evaluate: the metrics of each setting's samples, how far to trust them, and the two floors that tell what they mean.

The floor `heldout` is real images that the model never saw; `reconstruction` is the same images through the
autoencoder, which no model on its latents can be expected to beat. Samples are also searched for copies of training
images, held against how near held-out images come to those.
Several processes (`run.processes`, or one for each accelerator) share the reading of images.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from dit import copies, entry, runtime, tracking
from dit.evaluation import EvaluateConfig, Evaluation, evaluate_images, extractor_of, fewest_images, judge_of
from dit.grids import overview, shown
from dit.imagesets import ImageSet, from_shards, open_images
from dit.parallel import world
from dit.paths import Paths, publish, write_json
from dit.progress import Progress
from dit.references import read_reference
from dit.runtime import RunConfig
from dit.shards import read_manifest
from dit.vae import Autoencoder


class Found(NamedTuple):
    """What was copied, and the picture of it."""

    copies: copies.Copies
    picture: np.ndarray


MAX_HELDOUT = 10_000  # held-out images that the floors are measured on


def evaluate(evaluate: EvaluateConfig, run: RunConfig, *, paths: Paths) -> None:
    """Write artifacts/evaluate: metrics.json with the figures, details.json with their terms and intervals, pictures.

    The figures are mirrored to the model's MLflow run.
    """
    device = runtime.start(run)
    reference = read_reference(paths.artifacts / "reference")
    sets = {f.name: open_images(f / "samples.npz") for f in sorted((paths.artifacts / "sample").iterdir())}
    heldout = from_shards(paths.artifacts / "shard", "heldout", MAX_HELDOUT)
    real = {"heldout": heldout, "reconstruction": through(Autoencoder.load(paths.artifacts / "vae", device), heldout)}
    floors = real if heldout.count >= fewest_images(evaluate) else {}
    if not floors:
        print(f"no floors: {heldout.count} held-out images are too few to be measured: raise data.held_out_fraction")
    terms = {"reference": reference, "extractor": extractor_of(reference, device), "judge": judge_of(reference)}

    def measured(name: str, images: ImageSet, heavy: bool) -> Evaluation | None:
        with _workplace(paths.scratch / "evaluate") as folder:
            progress = Progress(f"evaluate {name}", images.count)
            return evaluate_images(
                images, config=evaluate, labels=images.labels, folder=folder, progress=progress, heavy=heavy, **terms
            )

    found = {f"floor: {name}": measured(name, images, heavy=False) for name, images in floors.items()}
    found |= {name: measured(name, images, heavy=True) for name, images in sets.items()}
    if not world().main:
        return
    copied = {name: _copies(paths, images, heldout, evaluate) for name, images in sets.items()}
    rows = {name: evaluation.values for name, evaluation in found.items()}
    told = {"extractor": reference.extractor, "reference": reference.digest}
    told |= {"num_images": next(iter(sets.values())).count}
    told |= {
        "floors": {name: rows[f"floor: {name}"] for name in floors},
        "settings": {name: rows[name] for name in sets},
    }
    details = {name: {**found[name].told(), "copies": copied[name] and copied[name].copies.record()} for name in sets}
    with publish(paths.artifacts / "evaluate", paths.scratch) as folder:
        write_json(folder / "metrics.json", told)
        write_json(
            folder / "details.json",
            {"settings": details, "classes": read_manifest(paths.artifacts / "shard")["classes"]},
        )
        for name, images in zip(("real", "reconstructed"), real.values(), strict=True):
            Image.fromarray(_sheet(images)).save(folder / f"{name}.png")
        for name in filter(copied.get, sets):
            Image.fromarray(copied[name].picture).save(folder / f"{name}-nearest.png")
    print(table(rows))
    for name in filter(copied.get, sets):
        print(f"{name}: {copied[name].copies.verdict}")
    with tracking.continue_run(paths, experiment=run.experiment) as mirror:
        mirror.metrics(told["settings"] | {f"floor_{name}": row for name, row in told["floors"].items()})
        for name in sets:
            mirror.artifact(f"samples/{name}.png", paths.artifacts / "sample" / name / "grid.png")
        mirror.artifact("evaluate/details.json", paths.artifacts / "evaluate" / "details.json")


def through(autoencoder: Autoencoder, images: ImageSet) -> ImageSet:
    """The images as the autoencoder gives them back, each read when it is asked for."""

    def read(start: int, stop: int) -> np.ndarray:
        return autoencoder.reconstruct(images.read(start, stop))

    told = f"{images.name} through the autoencoder"
    return replace(images, name=told, reader=read, digester=lambda: f"{images.digest}-{autoencoder.digest}")


def _copies(paths: Paths, generated: ImageSet, heldout: ImageSet, config: EvaluateConfig) -> Found | None:
    """What the samples copied, and a picture of the closest pairs; None where nobody asked, or there is too little."""
    if not config.training_images or min(generated.count, heldout.count) < copies.FEWEST:
        return None
    training = from_shards(paths.artifacts / "shard", "train")
    if training.count < copies.FEWEST:
        return None
    most = {"most_training": config.training_images}
    count = copies.num_looked_at(generated, training, heldout, **most)
    found = copies.check_copies(generated, training, heldout, **most, progress=Progress("copies", count))
    return Found(found, copies.picture(found, generated, training))


def _sheet(images: ImageSet) -> np.ndarray:
    labels = np.zeros(images.count, np.int64) if images.labels is None else images.labels
    picked = shown(labels)
    return overview(images.take(picked), labels[picked])


@contextmanager
def _workplace(folder: Path) -> Iterator[Path]:
    """An empty folder for all processes, which is gone afterwards, and after a killed stage when the next one comes.

    It is in scratch/ and not in /tmp, which may be memory: the features of 50,000 images are gigabytes.
    """
    if world().main:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    world().barrier()
    try:
        yield folder
        world().barrier()
    finally:
        if world().main:
            shutil.rmtree(folder, ignore_errors=True)


def table(rows: dict[str, dict[str, float]]) -> str:
    """Rows of metrics under common headings; the counts in the names are left out of the headings."""
    short = [{name.rpartition("_")[0]: value for name, value in row.items()} for row in rows.values()]
    names = list(dict.fromkeys(name for row in short for name in row))
    width = max(len(name) for name in names)
    head = " " * width + "".join(f"{name[:22]:>24}" for name in rows)
    lines = [f"{name:<{width}}" + "".join(f"{row.get(name, float('nan')):>24.4f}" for row in short) for name in names]
    return "\n".join([head, *lines])


if __name__ == "__main__":
    entry.main(evaluate, together=True)
