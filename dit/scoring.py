"""A quick score of a network: its loss on images that it was never trained on, always at the same noise and times.

What is drawn does not change from one score to the next, so two of them differ by the weights alone. It is a loss and
no measure of pictures: those are judged by the stage `evaluate`.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from dit.latentcache import Streamed
from dit.latents import pick_features, read_index
from dit.latentshards import Mapped, lying
from dit.model import DiT
from dit.objective import ObjectiveConfig, loss_of, times
from dit.places import Place
from dit.randomness import generator, permutation
from dit.runtime import autocast

IMAGES = 1024  # at most so many are looked at
BATCH = 64  # images in one pass
KEYS = ("mean", "std", "label", "features")


def held_out_loss(
    network: DiT, folder: Path, objective: ObjectiveConfig, precision: Literal["fp32", "bf16"], images: int = IMAGES
) -> float:
    """The mean loss over at most `images` held-out images of the encode folder, without the alignment's term.

    Each has its own noise; their times are spread evenly over the objective's law of times. Raises ValueError where no
    image is held out.
    """
    return mean_loss(network, held_out(folder, images), objective, precision)


def scores(
    folder: Path,
    objective: ObjectiveConfig,
    precision: Literal["fp32", "bf16"],
    log: Callable[[int, dict[str, float]], None],
    images: int = IMAGES,
    *,
    source: Place | None = None,
    cache: Path | None = None,
    cache_gb: float = 50.0,
) -> Callable[[int, Callable[[], DiT]], None]:
    """A `score(step, average)` for trainer.fit that logs the average's held_out_loss. It may fail, but not harm.

    Images that are not in the folder are streamed from `source`, once (see LatentDataset).
    """
    chosen: list[dict[str, Tensor]] = []

    def score(step: int, average: Callable[[], DiT]) -> None:
        try:
            if not chosen:
                chosen.append(held_out(folder, images, source=source, cache=cache, cache_gb=cache_gb))
            log(step, {"held_out_loss": mean_loss(average(), chosen[0], objective, precision)})
        except Exception as error:  # a figure is not worth a training
            print(f"score at step {step} failed ({type(error).__name__}: {error}): training goes on")

    return score


def held_out(
    folder: Path,
    images: int = IMAGES,
    *,
    source: Place | None = None,
    cache: Path | None = None,
    cache_gb: float = 50.0,
) -> dict[str, Tensor]:
    """The tensors of at most `images` held-out images, a random choice that is always the same: label and features as
    they are stored, and mean and std (n, C, h, w) of their normalised latents. Raises ValueError where there are none.
    """
    index = read_index(folder)
    entries = [shard for shard in index["shards"] if shard["split"] == "heldout"]
    if not entries:
        raise ValueError("data.held_out_fraction: no image is held out that could be scored: raise it")
    sizes = torch.tensor([entry["samples"] for entry in entries])
    rows = permutation(int(sizes.sum()), "held-out loss")[:images].sort().values
    numbers = torch.searchsorted(sizes.cumsum(0), rows, right=True).unique().tolist()
    files = [folder / entry["file"] for entry in entries]
    if lying(files, numbers, source) == "streamed":
        shards = Streamed(entries, numbers, source, cache, cache_gb, len(rows))
    else:
        shards = Mapped(files, sizes, numbers)
    try:
        shards.ahead(lambda: (set(numbers), set()))
        chosen = shards.gather(rows, [key for key in KEYS if key in shards.pieces], False)
    finally:
        shards.close()
    shift, scale = (torch.tensor(index["normalization"][name]).view(1, -1, 1, 1) for name in ("mean", "std"))
    return chosen | {"mean": (chosen["mean"].float() - shift) / scale, "std": chosen["std"].float() / scale}


@torch.no_grad()
def mean_loss(
    network: DiT, chosen: dict[str, Tensor], objective: ObjectiveConfig, precision: Literal["fp32", "bf16"]
) -> float:
    """The mean loss of what `held_out` gave, with noise and times that are functions of the number of images alone."""
    draws, N, device, total = generator("held-out loss", "inputs"), len(chosen["mean"]), network.pos_embed.device, 0.0
    posterior, noise = (torch.randn(chosen["mean"].shape, generator=draws) for _ in range(2))
    even = (torch.randperm(N, generator=draws) + torch.rand(N, generator=draws)) / N  # one of each N-th part
    inputs = {"x": chosen["mean"] + chosen["std"] * posterior, "noise": noise, "y": _conditions(chosen, network)}
    inputs["t"] = times(even.clamp(max=1 - 2**-24), objective)  # rounding may reach 1, which no time has
    for start in range(0, N, BATCH):
        part = {name: tensor[start : start + BATCH].to(device) for name, tensor in inputs.items()}
        with autocast(device, precision):
            total += loss_of(network, objective, **part).cpu().double().sum().item()
    return total / N


def _conditions(chosen: dict[str, Tensor], network: DiT) -> Tensor:
    if network.config.condition == "embeddings":
        return pick_features(chosen, None)
    return chosen["label"] if network.num_classes else torch.zeros_like(chosen["label"])
