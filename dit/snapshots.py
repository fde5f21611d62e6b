"""The averages that a training kept on its way: pictures of each, and how a figure went along.

`train.snapshot_every_steps` keeps them in artifacts/train/ema; the last step's is always there.
"""

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dit.checkpoint import CONDITIONS, Checkpoint, build, load_tensors
from dit.config import digest
from dit.drawing import draw, share
from dit.generation import num_choices
from dit.parallel import world
from dit.paths import file_sha256
from dit.progress import Progress
from dit.setting import SampleConfig, Setting, require_sampler


def snapshots(train: Path) -> list[tuple[int, Path]]:
    """The steps whose average a training kept, in order, and the files of their weights.

    Raises ValueError where `train` is no training's folder, or holds none.
    """
    if not (train / "config.json").is_file():
        raise ValueError(f"{train} is no training's folder (config.json is missing): name artifacts/train of a run")
    found = [(re.fullmatch(r"step-(\d+)\.safetensors", file.name), file) for file in (train / "ema").glob("step-*")]
    kept = sorted((int(match[1]), file) for match, file in found if match)
    if not kept:
        raise ValueError(f"{train}/ema holds no snapshots: keep some with train.snapshot_every_steps")
    return kept


def image_side(train: Path) -> int:
    """Height and width of the pictures that a training's networks draw. Raises ValueError where config.json is torn."""
    try:
        return int(json.loads((train / "config.json").read_text())["image_size"])
    except (KeyError, TypeError, ValueError):
        raise ValueError(
            f"{train}/config.json is torn, or no training's (it tells no image_size): train again"
        ) from None


def open_snapshot(train: Path, step: int, weights: Path, device: Any = "cpu") -> Checkpoint:
    """A kept average as a network in eval mode on `device`. Raises ValueError where it does not fit config.json."""
    try:
        config = json.loads((train / "config.json").read_text())
        network = build(config["model"])
        network.load_state_dict(load_tensors(weights))
    except (KeyError, TypeError, RuntimeError, json.JSONDecodeError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{weights} does not fit {train}/config.json ({first}): another training's?") from None
    bank = train / "ema" / CONDITIONS
    conditions = load_tensors(bank) if bank.is_file() else None
    config |= {"step": step, "weights": "ema"}
    return Checkpoint(network.eval().requires_grad_(False).to(device), config, conditions)


def drawn(
    train: Path,
    vae: Path,
    setting: Setting,
    config: SampleConfig,
    folder: Path,
    *,
    device: Any = "cpu",
    say: Callable[[str], None] = print,
) -> Iterator[tuple[int, Path]]:
    """Draw `config.num_images` with each kept average: its step, and an .npz below `folder` (`arr_0`, `labels`).

    All are drawn from the same noise for the same labels, so that what differs is the weights. The file is there until
    the next is asked for. Blocks that an interrupted call drew are taken; under torchrun every process calls it, and
    all see `folder`. Raises ValueError where the setting does not fit the model, or the autoencoder is another one.
    """
    from dit.vae import Autoencoder

    kept = snapshots(train)
    autoencoder = Autoencoder.load(vae, device)
    for step, weights in kept:
        checkpoint = open_snapshot(train, step, weights, device)
        require_sampler(setting, checkpoint.config["objective"]["name"], num_choices(checkpoint))
        told = [file_sha256(weights), autoencoder.digest, setting, replace(config, num_images=1, settings=(setting,))]
        place = folder / f"step-{step:08d}-{digest(*told)}"
        progress = Progress(f"step {step} draws", share(config), say=say)
        draw(checkpoint, autoencoder, setting, config, place / "samples.npz", keep=place / "blocks", progress=progress)
        yield step, place / "samples.npz"
        world().barrier()  # all have read it
        if world().main:
            shutil.rmtree(place, ignore_errors=True)


def best(points: Sequence[tuple[int, float]], lower: bool = True) -> tuple[int, float]:
    """The step of the best figure, and the figure; the earliest of equals."""
    return (min if lower else max)(points, key=lambda point: point[1])


def plot(curves: Mapping[str, Sequence[tuple[int, float]]], file: Path) -> None:
    """A small picture of figures over steps: a panel for each metric, {name: [(step, value)]}, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(len(curves), 1, figsize=(6, 2.2 * len(curves)), sharex=True, squeeze=False)
    for axes, (name, points) in zip(panels[:, 0], curves.items(), strict=True):
        axes.plot(*zip(*points, strict=True), marker="o", markersize=3, linewidth=1)
        axes.set_ylabel(name, fontsize=8)
        axes.grid(alpha=0.3)
    panels[-1, 0].set_xlabel("step")
    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120, metadata={"Software": None})
    pyplot.close(figure)
