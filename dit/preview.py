"""Pictures while training: a grid of the average's samples now and then, as an observer that may fail but not harm."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from dit.checkpoint import Checkpoint
from dit.generation import generate, num_choices
from dit.grids import grid
from dit.model import DiT
from dit.paths import Paths
from dit.setting import Setting, changed
from dit.vae import Autoencoder

COLUMNS = 10
SETTINGS = {"transport": Setting("preview", 1.5, "heun", 10), "diffusion": Setting("preview", 1.5, "ddim", 25)}


def previews(
    paths: Paths,
    folder: Path,
    config: dict[str, Any],
    show: Callable[[str, np.ndarray, int], None],
    conditions: dict[str, Tensor] | None = None,
) -> Callable[[int, Callable[[], DiT]], None]:
    """An `observe(step, average)` for trainer.fit that keeps a grid in `folder` and hands it to `show`.

    `conditions` are what a network that is conditioned on embeddings is asked with (`dit.dataset`).
    """
    bank = conditions and {key: some[:COLUMNS] for key, some in conditions.items()}
    autoencoder: list[Autoencoder] = []

    def observe(step: int, average: Callable[[], DiT]) -> None:
        try:
            network = average()
            if not autoencoder:
                autoencoder.append(Autoencoder.load(paths.artifacts / "vae", network.pos_embed.device))
            sheet = draw(Checkpoint(network, config, bank), autoencoder[0])
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(sheet).save(folder / f"step-{step:08d}.png")
            show("preview", sheet, step)
        except Exception as error:  # a picture is not worth a training
            print(f"preview at step {step} failed ({type(error).__name__}: {error}): training goes on")

    return observe


def draw(checkpoint: Checkpoint, autoencoder: Autoencoder, per_class: int = 2) -> np.ndarray:
    """A grid of the first ten classes, or embeddings, `per_class` images of each; always the same noise."""
    import torch

    setting, choices = SETTINGS[checkpoint.config["objective"]["name"]], num_choices(checkpoint)
    columns = min(COLUMNS, choices) or COLUMNS
    wanted = torch.arange(columns).repeat(per_class)
    if not choices:
        setting, wanted = changed(setting, cfg_scale=1.0), torch.zeros_like(wanted)
    images = generate(checkpoint, autoencoder, setting, wanted, range(len(wanted)), seed=0)
    return grid(images.numpy(), columns)
