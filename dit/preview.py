"""Pictures while training: a grid of the average's samples now and then, as an observer that may fail but not harm."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dit.checkpoint import Checkpoint
from dit.generation import Setting, generate
from dit.grids import grid
from dit.model import DiT
from dit.paths import Paths
from dit.vae import Autoencoder

COLUMNS = 10
SETTINGS = {"transport": Setting("preview", 1.5, "heun", 10), "diffusion": Setting("preview", 1.5, "ddim", 25)}


def previews(
    paths: Paths, folder: Path, config: dict[str, Any], show: Callable[[str, np.ndarray, int], None]
) -> Callable[[int, Callable[[], DiT]], None]:
    """An `observe(step, average)` for trainer.fit that keeps a grid in `folder` and hands it to `show`."""
    autoencoder: list[Autoencoder] = []

    def observe(step: int, average: Callable[[], DiT]) -> None:
        try:
            network = average()
            if not autoencoder:
                autoencoder.append(Autoencoder.load(paths.artifacts / "vae", network.pos_embed.device))
            sheet = draw(Checkpoint(network, config), autoencoder[0])
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(sheet).save(folder / f"step-{step:08d}.png")
            show("preview", sheet, step)
        except Exception as error:  # a picture is not worth a training
            print(f"preview at step {step} failed ({type(error).__name__}: {error}): training goes on")

    return observe


def draw(checkpoint: Checkpoint, autoencoder: Autoencoder, per_class: int = 2) -> np.ndarray:
    """A grid of the first ten classes, `per_class` images of each; always the same noise."""
    import torch

    setting = SETTINGS[checkpoint.config["objective"]["name"]]
    classes = checkpoint.model.num_classes
    if not classes:
        setting = Setting("preview", 1.0, setting.sampler, setting.num_steps)
    columns = min(COLUMNS, classes) or COLUMNS
    labels = torch.arange(columns).repeat(per_class) if classes else torch.zeros(columns * per_class, dtype=torch.long)
    images = generate(checkpoint, autoencoder, setting, labels, range(len(labels)), seed=0)
    return grid(images.numpy(), columns)
