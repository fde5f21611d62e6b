"""evaluate: the metrics of each setting's samples, and the two floors that tell what they mean.

The floor `heldout` is real images that the model never saw; `reconstruction` is the same images through the
autoencoder, which no model on its latents can be expected to beat.
"""

import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

from dit import entry, runtime, tracking
from dit.grids import overview
from dit.metrics import EvaluateConfig, Reference, score
from dit.paths import Paths, publish, write_json
from dit.runtime import RunConfig
from dit.shards import load_split
from dit.vae import Autoencoder

MAX_HELDOUT = 10_000  # held-out images that the floors are measured on


def evaluate(evaluate: EvaluateConfig, run: RunConfig, *, paths: Paths) -> None:
    """Write artifacts/evaluate/metrics.json, and mirror it to the model's MLflow run."""
    device = runtime.start(run)
    reference = Reference.load(paths.artifacts / "reference")
    autoencoder = Autoencoder.load(paths.artifacts / "vae", device)
    heldout, heldout_labels = load_split(paths.artifacts / "shard", "heldout", MAX_HELDOUT)
    reconstructed = autoencoder.reconstruct(heldout)
    floors = {
        "heldout": score(heldout, heldout_labels, reference.folder, evaluate),
        "reconstruction": score(reconstructed, heldout_labels, reference.folder, evaluate),
    }
    settings, count = {}, 0
    for folder in sorted((paths.artifacts / "sample").iterdir()):
        images, labels = read_samples(folder / "samples.npz")
        count = len(images)
        settings[folder.name] = score(images, labels, reference.folder, evaluate)
    told = {"extractor": reference.extractor, "reference": reference.digest, "num_images": count}
    told |= {"floors": floors, "settings": settings}
    with publish(paths.artifacts / "evaluate", paths.scratch) as folder:
        write_json(folder / "metrics.json", told)
        Image.fromarray(overview(heldout, heldout_labels)).save(folder / "real.png")
        Image.fromarray(overview(reconstructed, heldout_labels)).save(folder / "reconstructed.png")
    print(table({**{f"floor: {name}": row for name, row in floors.items()}, **settings}))
    with tracking.continue_run(paths, experiment=run.experiment) as mirror:
        mirror.metrics(settings | {f"floor_{name}": row for name, row in floors.items()})
        for name in settings:
            mirror.artifact(f"samples/{name}.png", paths.artifacts / "sample" / name / "grid.png")


def read_samples(file: Path) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 (N, H, W, 3) and labels (N,) of a samples.npz. Raises ValueError where it is damaged."""
    try:
        with np.load(file) as content:
            return content["arr_0"], content["labels"]
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"{file} is damaged ({error}): run the stage `sample`") from None


def table(rows: dict[str, dict[str, float]]) -> str:
    """Rows of metrics under common headings; the counts in the names are left out of the headings."""
    short = [{name.rpartition("_")[0]: value for name, value in row.items()} for row in rows.values()]
    names = list(dict.fromkeys(name for row in short for name in row))
    width = max(len(name) for name in names)
    head = " " * width + "".join(f"{name[:22]:>24}" for name in rows)
    lines = [f"{name:<{width}}" + "".join(f"{row.get(name, float('nan')):>24.4f}" for row in short) for name in names]
    return "\n".join([head, *lines])


if __name__ == "__main__":
    entry.main(evaluate)
