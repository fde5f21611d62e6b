"""The latents that training sees, step after step, wherever they lie; and the held-out ones that pictures ask for."""

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from dit.latentcache import Streamed
from dit.latents import read_index
from dit.latentshards import Mapped, Memory, Shards, images_in, lying, map_file
from dit.order import Batches, Mix, Order, deal
from dit.parallel import local_rank, local_size
from dit.places import Place
from dit.randomness import permutation


class LatentDataset:
    """The training latents; `batch(step)` is a pure function of the seed and the step, wherever they lie.

    Args:
        folder: artifacts/encode; streamed latents need no more of it than index.json.
        window: images shuffled together, in whole shards (`train.shuffle_window`); 0 = all.
        classes: how often each class is seen (`train.classes`): natural, balanced, or weights by name (others: 1).
        parts: that the shards are dealt into (`train.data_parts`): the v-th fills the global batch from v size / V on.
        rows: of the global batch, all that this process will ask for: shards that none of them is of are not read.
        where: memory, mapped (read from the files as needed), streamed (from `source`, kept in the folder `cache` as
            far as `cache_gb` allows), or auto: streamed where the files are not here, else memory where they fit.

    Raises ValueError where latents are missing or torn, or the settings do not fit them.
    """

    def __init__(
        self,
        folder: Path,
        seed: int,
        global_batch_size: int,
        *,
        window: int = 0,
        classes: Literal["natural", "balanced"] | Mapping[str, float] = "natural",
        parts: int = 1,
        rows: slice = slice(None),
        where: Literal["auto", "memory", "mapped", "streamed"] = "auto",
        source: Place | None = None,
        cache: Path | None = None,
        cache_gb: float = 50.0,
    ):
        index = read_index(folder)
        entries = [entry for entry in index["shards"] if entry["split"] == "train"]
        files = [folder / entry["file"] for entry in entries]
        sizes = sizes_of(folder, entries)
        if not sum(sizes):
            raise ValueError(f"{folder} holds no latents to train on: lower data.held_out_fraction")
        mix = None if classes == "natural" else class_mix(classes, index["classes"], entries, files, self._labels)
        names = [()] if parts == 1 else [("part", part, parts) for part in range(parts)]
        streams = [
            Order(sizes, seed, window=window, mix=mix, shards=shards, stream=name)
            for shards, name in zip(deal(sizes, parts), names, strict=True)
        ]
        self.seed, self.global_batch_size, self.size = seed, global_batch_size, sum(sizes)
        self.batches = Batches(streams, global_batch_size)
        here = range(global_batch_size)[rows]
        wanted = self.batches.shards(here)
        where = lying(files, wanted, source) if where == "auto" else where
        self.shards: Shards
        if where == "streamed":
            self.shards = Streamed(entries, wanted, source, cache, cache_gb, self.batches.at_a_time(self._near(here)))
        else:
            self.shards = (Memory.read if where == "memory" else Mapped)(files, torch.tensor(sizes), wanted)
        normalization = index["normalization"]
        self.shift = torch.tensor(normalization["mean"]).view(1, -1, 1, 1)
        self.scale = torch.tensor(normalization["std"]).view(1, -1, 1, 1)

    def _near(self, rows: range) -> range:
        """The rows of all processes of this machine, which share a cache; each has as many."""
        each, first = len(rows), rows.start - local_rank() * len(rows)
        return range(max(0, first), min(self.global_batch_size, first + local_size() * each))

    @property
    def mirror(self) -> bool:
        """Whether there are mirror images, one of the two to be picked at random."""
        return self.has("mean_mirror")

    @property
    def keys(self) -> tuple[str, ...]:
        """The names of what there is of each image: mean, std, label and so on."""
        return tuple(self.shards.pieces)

    def has(self, key: str) -> bool:
        """Whether there is such a tensor of each image."""
        return key in self.shards.pieces

    def shape(self, key: str) -> tuple[int, ...]:
        """Of one image's row of a tensor."""
        return tuple(self.shards.pieces[key].shape[1:])

    @property
    def feature_shape(self) -> tuple[int, ...] | None:
        """(L, E) of an image's features; None where there are none."""
        return self.shape("features") if self.has("features") else None

    @property
    def in_memory(self) -> bool:
        """Whether a batch is gathered without waiting for a disk or a network."""
        return isinstance(self.shards, Memory)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What is in memory: all of it, where latents lie there."""
        return self.shards.tensors if isinstance(self.shards, Memory) else {}

    @tensors.setter
    def tensors(self, tensors: dict[str, Tensor]) -> None:
        """Take these images in memory, each tensor (n, ...), instead of the folder's."""
        self.size = len(tensors["label"])
        self.shards = Memory(tensors, torch.tensor([self.size]))
        self.batches = Batches([Order([self.size], self.seed)], self.global_batch_size)

    def indices(self, step: int, part: slice = slice(None)) -> Tensor:
        """The images of these rows of this step's global batch."""
        return self.batches.at(step, range(self.global_batch_size)[part])

    def batch(
        self, step: int, part: slice = slice(None), *, keys: Collection[str] | None = None, pin: bool = False
    ) -> dict[str, Tensor]:
        """The tensors of these rows of this step's images, or those of `keys` only: on the CPU, pinned if asked."""
        rows = range(self.global_batch_size)[part]
        self.shards.ahead(partial(self.batches.ahead, step, rows))
        wanted = [key for key in self.keys if keys is None or key in keys]
        return self.shards.gather(self.batches.at(step, rows), wanted, pin)

    def close(self) -> None:
        """Let go of what is being fetched ahead; the next batch begins it anew."""
        self.shards.close()

    def _labels(self, shard: int) -> Tensor:
        return self.shards.labels(shard)


def class_mix(
    classes: Literal["balanced"] | Mapping[str, float],
    names: Sequence[str],
    entries: Sequence[dict[str, Any]],
    files: Sequence[Path],
    labels: Callable[[int], Tensor],
) -> Mix:
    """How often classes with these names are seen. Raises ValueError, one line, where that cannot be."""
    if not names:
        raise ValueError("train.classes: these images have no classes: set it to natural")
    weights = {} if classes == "balanced" else classes
    unknown = sorted(set(weights) - set(names))
    if unknown:
        known = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
        raise ValueError(f"train.classes: there is no class {unknown[0]!r} ({known}): correct the name")
    told = [float(weights.get(name, 1.0)) for name in names]
    if not all(0 <= weight < float("inf") for weight in told) or not any(told):
        raise ValueError(f"train.classes: weights must be 0 or more, and one above 0, got {dict(weights)}")
    counts = torch.zeros(len(entries), len(names), dtype=torch.int64)
    for shard, (entry, file) in enumerate(zip(entries, files, strict=True)):
        if "counts" in entry:
            for label, count in entry["counts"].items():
                counts[shard, int(label)] = count
        elif file.is_file():
            counts[shard] = map_file(file)["label"].bincount(minlength=len(names))
        else:
            raise ValueError("train.classes: index.json counts no classes: run `encode` again, or set it to natural")
    return Mix(told, counts, labels)


def conditions(
    folder: Path, limit: int = 1024, *, source: Place | None = None, cache: Path | None = None, cache_gb: float = 50.0
) -> dict[str, Tensor]:
    """What a model that is conditioned on features is asked with when it is drawn from: those of held-out images.

    `features` (n, L, E) float16 and `label` (n,) of at most `limit` images, in an order that is random and always the
    same: any first few of them are of all classes. What is not in the folder is streamed, as LatentDataset does. Raises
    ValueError where the latents come without features, or no image is held out.
    """
    index = read_index(folder)
    if "features" not in index:
        raise ValueError(f"{folder} holds no features: set encode.features, or another model.condition than embeddings")
    entries = [entry for entry in index["shards"] if entry["split"] == "heldout"]
    if not entries:
        raise ValueError("data.held_out_fraction: no image is held out whose features could be asked for: raise it")
    sizes = torch.tensor(sizes_of(folder, entries))
    picked = permutation(int(sizes.sum()), "conditions")[:limit]
    files, wanted = [folder / entry["file"] for entry in entries], list(range(len(entries)))
    if lying(files, wanted, source) == "streamed":
        shards: Shards = Streamed(entries, wanted, source, cache, cache_gb, len(picked))
    else:
        shards = Mapped(files, sizes, wanted)
    try:
        return shards.gather(picked, ["features", "label"], False)
    finally:
        shards.close()


def sizes_of(folder: Path, entries: Sequence[dict[str, Any]]) -> list[int]:
    """The number of images of each shard. Raises ValueError where neither the index nor the file tells it."""
    return [entry.get("samples") or images_in(folder / entry["file"]) for entry in entries]
