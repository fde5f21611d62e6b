"""sample: pictures from the checkpoint, once with each of the named settings."""

import numpy as np
from PIL import Image

from dit import entry, runtime
from dit.checkpoint import load_checkpoint
from dit.generation import SampleConfig, generate_blocks, require_sampler
from dit.grids import overview
from dit.paths import Paths, publish
from dit.progress import Progress
from dit.runtime import RunConfig
from dit.vae import Autoencoder


def sample(sample: SampleConfig, run: RunConfig, *, paths: Paths) -> None:
    """Write artifacts/sample/<setting>: samples.npz (`arr_0` uint8 (N, H, W, 3), `labels` (N,)) and grid.png.

    The network is rebuilt from the checkpoint's own config, never from params.yaml.
    """
    device = runtime.start(run)
    checkpoint = load_checkpoint(paths.artifacts / "ema", device)
    for setting in sample.settings:
        require_sampler(setting, checkpoint.config["objective"]["name"], checkpoint.model.num_classes)
    autoencoder = Autoencoder.load(paths.artifacts / "vae", device)
    with publish(paths.artifacts / "sample", paths.scratch) as folder:
        for setting in sample.settings:
            progress = Progress(f"sample {setting.name}", sample.num_images)
            images, labels = generate_blocks(checkpoint, autoencoder, setting, sample, progress=progress)
            (folder / setting.name).mkdir()
            np.savez(folder / setting.name / "samples.npz", arr_0=images, labels=labels)
            Image.fromarray(overview(images, labels)).save(folder / setting.name / "grid.png")


if __name__ == "__main__":
    entry.main(sample)
