"""A set of pictures of any size: drawn in blocks by one process or several, and streamed into one file.

Images are cut into blocks of consecutive indices by `sample.block_images` alone. A process takes whole blocks and keeps
each in a folder as soon as it is drawn; the main process streams them, in order, into the file. So the file does not
depend on how many processes drew it, an interruption costs the blocks in work, and no more than one block is in memory.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dit import parallel
from dit.checkpoint import Checkpoint, load_tensors, save_tensors
from dit.generation import asked, evaluations, generate
from dit.parallel import world
from dit.samples import write_npz
from dit.setting import SampleConfig, Setting
from dit.vae import Autoencoder


def blocks(config: SampleConfig) -> list[range]:
    """The indices of all images, block by block; the last may be short."""
    return parallel.blocks(config.num_images, config.block_images)


def all_labels(checkpoint: Checkpoint, config: SampleConfig) -> np.ndarray:
    """The label (N,) int64 of every image, as `samples.npz` tells it; -1 where the model knows no classes."""
    return np.concatenate([asked(checkpoint, config, indices)[1].numpy() for indices in blocks(config)])


def draw_blocks(
    checkpoint: Checkpoint,
    autoencoder: Autoencoder,
    setting: Setting,
    config: SampleConfig,
    keep: Path,
    *,
    progress: Callable[[int], None] = lambda count: None,
) -> None:
    """Draw this process's blocks into the folder `keep`; one that is there already is taken.

    The folder's name must tell model, autoencoder, setting and `config` apart from any others.
    """
    keep.mkdir(parents=True, exist_ok=True)
    for indices in world().mine(blocks(config)):
        file = _file(keep, indices)
        if _count(file) != len(indices):
            wanted, _ = asked(checkpoint, config, indices)
            save_tensors(
                file, {"images": generate(checkpoint, autoencoder, setting, wanted, indices, seed=config.seed)}
            )
        progress(len(indices))


def kept_blocks(config: SampleConfig, keep: Path) -> Iterator[np.ndarray]:
    """The pictures uint8 (n, H, W, 3) of each block that `draw_blocks` kept, by whichever process.

    Raises ValueError where one is missing.
    """
    for indices in blocks(config):
        file = _file(keep, indices)
        if not file.is_file():
            raise ValueError(f"{file} is missing: all processes that draw together must see the same folder {keep}")
        yield load_tensors(file)["images"].numpy()


def draw(
    checkpoint: Checkpoint,
    autoencoder: Autoencoder,
    setting: Setting,
    config: SampleConfig,
    file: Path,
    *,
    keep: Path | None = None,
    progress: Callable[[int], None] = lambda count: None,
) -> np.ndarray:
    """Draw all images that `config` asks for into the .npz `file`, and return their labels (N,).

    Under torchrun every process calls it, with a folder `keep` that all of them see (see `draw_blocks`), and the file is
    whole when it returns. Without `keep` one process streams what it draws straight into the file.
    """
    side, labels = checkpoint.config["image_size"], all_labels(checkpoint, config)
    if keep is None:
        assert world().size == 1, "several processes meet in a folder"
        drawn = _drawn(checkpoint, autoencoder, setting, config, progress)
        write_npz(file, config.num_images, (side, side), drawn, labels)
        return labels
    draw_blocks(checkpoint, autoencoder, setting, config, keep, progress=progress)
    world().barrier()
    if world().main:
        write_npz(file, config.num_images, (side, side), kept_blocks(config, keep), labels)
    world().barrier()
    return labels


def share(config: SampleConfig) -> int:
    """How many images this process draws."""
    return sum(map(len, world().mine(blocks(config))))


def record(
    checkpoint: Checkpoint, autoencoder: Autoencoder, setting: Setting, config: SampleConfig, weights: str
) -> dict[str, Any]:
    """What must be known of pictures before their figures are compared with others': samples.json.

    `weights` is the sha256 of model.safetensors. `evaluations` are the network's for an image, by `generation.evaluations`
    (guidance looks at twice as many images in each); `null` where a tolerance decides.
    """
    device = checkpoint.model.pos_embed.device
    guided = setting.cfg_scale != 1
    reduced = device.type == "cuda" and torch.get_float32_matmul_precision() != "highest"
    return {
        "num_images": config.num_images,
        "image_size": checkpoint.config["image_size"],
        "labels": config.labels,
        "seed": config.seed,
        "block_images": config.block_images,
        "setting": asdict(setting),
        "evaluations": evaluations(setting),
        "guidance": {"scale": setting.cfg_scale, "channels": setting.cfg_channels, "interval": setting.cfg_interval}
        if guided
        else None,
        "checkpoint": {
            "digest": weights,
            "step": checkpoint.config.get("step"),
            "weights": checkpoint.config.get("weights"),
        },
        "autoencoder": autoencoder.digest,
        "pixels": "uint8: clamp(127.5 x + 128, 0, 255), truncated",
        "precision": f"{str(checkpoint.model.pos_embed.dtype).removeprefix('torch.')}{', products in TF32' * reduced}",
        "device": device.type,
        "torch": torch.__version__,
    }


def _drawn(
    checkpoint: Checkpoint,
    autoencoder: Autoencoder,
    setting: Setting,
    config: SampleConfig,
    progress: Callable[[int], None],
) -> Iterator[np.ndarray]:
    for indices in blocks(config):
        wanted, _ = asked(checkpoint, config, indices)
        yield generate(checkpoint, autoencoder, setting, wanted, indices, seed=config.seed).numpy()
        progress(len(indices))


def _file(keep: Path, indices: Sequence[int]) -> Path:
    return keep / f"block-{indices[0]:08d}.safetensors"


def _count(file: Path) -> int:
    """How many pictures a kept block holds, without reading them; 0 where it is missing or torn."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as content:
            return content.get_slice("images").get_shape()[0]
    except (FileNotFoundError, SafetensorError):
        return 0
