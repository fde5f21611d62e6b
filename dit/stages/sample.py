"""sample: pictures from the checkpoint, once with each of the named settings."""

import hashlib
import json
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dit import entry, runtime
from dit.checkpoint import Checkpoint, load_checkpoint
from dit.generation import generate_blocks, num_choices
from dit.grids import overview
from dit.paths import Paths, file_sha256, publish
from dit.progress import Progress
from dit.runtime import RunConfig
from dit.setting import SampleConfig, Setting, require_sampler
from dit.vae import Autoencoder


def sample(sample: SampleConfig, run: RunConfig, *, paths: Paths) -> None:
    """Write artifacts/sample/<setting>: samples.npz (`arr_0` uint8 (N, H, W, 3), `labels` (N,)) and grid.png.

    The network is rebuilt from the checkpoint's own config, never from params.yaml. Blocks that were drawn before an
    interruption are taken from scratch/sample.
    """
    device = runtime.start(run)
    checkpoint = load_checkpoint(paths.artifacts / "ema", device)
    for setting in sample.settings:
        require_sampler(setting, checkpoint.config["objective"]["name"], num_choices(checkpoint))
    autoencoder = Autoencoder.load(paths.artifacts / "vae", device)
    weights = [file_sha256(file) for file in sorted((paths.artifacts / "ema").glob("*.safetensors"))]
    drawn = {
        setting.name: paths.scratch / "sample" / _name(setting, sample, weights, checkpoint)
        for setting in sample.settings
    }
    _forget_others(paths.scratch / "sample", set(drawn.values()))
    with publish(paths.artifacts / "sample", paths.scratch) as folder:
        for setting in sample.settings:
            progress = Progress(f"sample {setting.name}", sample.num_images)
            keep = drawn[setting.name]
            images, labels = generate_blocks(checkpoint, autoencoder, setting, sample, progress=progress, keep=keep)
            (folder / setting.name).mkdir()
            np.savez(folder / setting.name / "samples.npz", arr_0=images, labels=labels)
            Image.fromarray(overview(images, labels)).save(folder / setting.name / "grid.png")
    _forget_others(paths.scratch / "sample", set())


def _name(setting: Setting, sample: SampleConfig, weights: list[str], checkpoint: Checkpoint) -> str:
    """A name for these very images; how many of them are drawn is no part of it, nor are the other settings."""
    told = [
        asdict(setting),
        sample.seed,
        sample.labels,
        sample.block_images,
        weights,
        checkpoint.config,
        torch.__version__,
    ]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]


def _forget_others(folder: Path, wanted: set[Path]) -> None:
    for other in set(folder.glob("*")) - wanted:
        shutil.rmtree(other)


if __name__ == "__main__":
    entry.main(sample)
