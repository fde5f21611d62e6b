"""sample: pictures from the checkpoint, once with each of the named settings. Run it again and it goes on.

Several processes (`run.processes`, or one for each accelerator) draw the same pictures, to the last bit where device
type, threads and block size are the same.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dit import entry, runtime
from dit.checkpoint import Checkpoint, load_checkpoint
from dit.drawing import all_labels, draw_blocks, kept_blocks, record, share
from dit.generation import num_choices
from dit.grids import overview, shown
from dit.parallel import world
from dit.paths import Paths, file_sha256, publish, write_json
from dit.progress import Progress
from dit.runtime import RunConfig
from dit.samples import write_npz
from dit.setting import SampleConfig, Setting, require_sampler
from dit.vae import Autoencoder


def sample(sample: SampleConfig, run: RunConfig, *, paths: Paths) -> None:
    """Write artifacts/sample/<setting>: samples.npz (`arr_0` uint8 (N, H, W, 3), `labels` (N,)), samples.json (how they
    were drawn) and grid.png.

    The network is rebuilt from the checkpoint's own config, never from params.yaml. Blocks that were drawn before an
    interruption are taken from scratch/sample.
    """
    device = runtime.start(run)
    checkpoint = load_checkpoint(paths.artifacts / "ema", device)
    for setting in sample.settings:
        require_sampler(setting, checkpoint.config["objective"]["name"], num_choices(checkpoint))
    autoencoder = Autoencoder.load(paths.artifacts / "vae", device)
    weights = [file_sha256(file) for file in sorted((paths.artifacts / "ema").glob("*.safetensors"))]
    keep = {
        setting: paths.scratch / "sample" / _name(setting, sample, weights, checkpoint) for setting in sample.settings
    }
    if world().main:
        _forget_others(paths.scratch / "sample", set(keep.values()))
    of = "" if world().size == 1 else f", process {world().rank + 1} of {world().size}"
    for setting in sample.settings:
        progress = Progress(f"sample {setting.name}{of}", share(sample))
        draw_blocks(checkpoint, autoencoder, setting, sample, keep[setting], progress=progress)
    world().barrier()
    if not world().main:
        return
    digest = file_sha256(paths.artifacts / "ema" / "model.safetensors")
    with publish(paths.artifacts / "sample", paths.scratch) as folder:
        for setting in sample.settings:
            (folder / setting.name).mkdir()
            sheet = _write(checkpoint, sample, keep[setting], folder / setting.name / "samples.npz")
            Image.fromarray(sheet).save(folder / setting.name / "grid.png")
            told = record(checkpoint, autoencoder, setting, sample, digest)
            write_json(folder / setting.name / "samples.json", told)
    _forget_others(paths.scratch / "sample", set())


def _write(checkpoint: Checkpoint, sample: SampleConfig, keep: Path, file: Path) -> np.ndarray:
    """Stream the kept blocks into samples.npz, and return a grid of the few that stand for all."""
    labels = all_labels(checkpoint, sample)
    picked, pictures = shown(labels), []

    def passing() -> Iterator[np.ndarray]:
        start = 0
        for block in kept_blocks(sample, keep):
            here = picked[(picked >= start) & (picked < start + len(block))]
            pictures.extend(block[here - start])
            start += len(block)
            yield block

    side = checkpoint.config["image_size"]
    write_npz(file, sample.num_images, (side, side), passing(), labels)
    return overview(np.stack(pictures), labels[picked])


def _name(setting: Setting, sample: SampleConfig, weights: list[str], checkpoint: Checkpoint) -> str:
    """A name for these very images; how many of them are drawn is no part of it, nor are the other settings."""
    device = checkpoint.model.pos_embed.device.type
    told = [
        asdict(setting),
        sample.seed,
        sample.labels,
        sample.block_images,
        weights,
        checkpoint.config,
        torch.__version__,
        device,
        torch.get_num_threads() if device == "cpu" else None,
    ]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]


def _forget_others(folder: Path, wanted: set[Path]) -> None:
    for other in set(folder.glob("*")) - wanted:
        shutil.rmtree(other)


if __name__ == "__main__":
    entry.main(sample, together=True)
