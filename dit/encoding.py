"""Shards of images to shards of latents, at the speed of the autoencoder alone.

Reading, decoding and writing are done by threads while the autoencoder works on what was decoded before. Batches are
cut by shard and image size alone and each goes through the same operations, so neither threads nor processes change a
bit of what is written.
"""

import io
import json
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from dit import parallel
from dit.embeddings import Features
from dit.latents import Statistics
from dit.runtime import mark, pins
from dit.vae import Autoencoder, batch_of, to_pixels

T = TypeVar("T")
MOST_DECODERS = 8  # threads of one process: more than any autoencoder keeps busy
UNWRITTEN = 2  # shards of latents that may wait in memory to be written
BLOCK = 512  # bytes: what a tar is made of


@dataclass(frozen=True)
class Task:
    """A shard of `samples` images to make latents of."""

    source: Path
    samples: int
    path: Path
    digest: str  # of everything that the latents depend on


class Batch(NamedTuple):
    """Decoded images, ready for the autoencoder."""

    task: Task
    last: bool  # of its shard
    keys: list[str]  # the source's
    labels: Tensor  # (n,)
    images: np.ndarray  # uint8 (n, S, S, 3)
    pixels: Tensor  # (n, 3, S, S) in [-1, 1]


def encode_shards(
    tasks: Sequence[Task],
    side: int,
    autoencoder: Autoencoder,
    finish: Callable[[Task, dict[str, Tensor]], T],
    *,
    mirror: bool = False,
    features: Features | None = None,
    progress: Callable[[int], None] = lambda count: None,
) -> list[T]:
    """What `finish(task, tensors)`, called in a thread, gives for each task, in their order. Images are of `side` pixels.

    The tensors: mean and std (n, C, h, w) float16, of the mirror images too if asked, and label (n,). With `features`
    also features (n, L, E) float16 of the images, and features_mirror where the mirror image has others. Raises
    ValueError where a shard is damaged.
    """
    device = autoencoder.network.device
    results: list[T] = []
    unwritten: deque[Future[T]] = deque()
    parts: dict[str, list[Tensor]] = {}
    with _threads(1) as writer, decoded(tasks, side, device) as batches:
        for batch, tensors in encoded(batches, autoencoder, mirror, features):
            for key, value in tensors.items():
                parts.setdefault(key, []).append(value)
            progress(len(batch.labels))
            if batch.last:
                unwritten.append(writer.submit(_finish, finish, batch.task, parts))
                parts = {}
            while len(unwritten) > UNWRITTEN:
                results.append(unwritten.popleft().result())
        return results + [future.result() for future in unwritten]


def encoded(
    batches: Iterator[Batch], autoencoder: Autoencoder, mirror: bool, features: Features | None
) -> Iterator[tuple[Batch, dict[str, Tensor]]]:
    """Each batch with its tensors, on the CPU. A GPU works on one while the next is brought there."""
    behind = 1 if pins(autoencoder.network.device) else 0
    under_way: deque[tuple[Batch, Callable[[], dict[str, Tensor]]]] = deque()
    for batch in batches:
        under_way.append((batch, _on_its_way(_moments(batch, autoencoder, mirror, features))))
        if len(under_way) > behind:
            batch, arrived = under_way.popleft()
            yield batch, arrived()
    for batch, arrived in under_way:
        yield batch, arrived()


@torch.no_grad()
def _moments(batch: Batch, autoencoder: Autoencoder, mirror: bool, features: Features | None) -> dict[str, Tensor]:
    """A batch's tensors, those of the autoencoder on its device."""
    pixels = batch.pixels.to(autoencoder.network.device, non_blocking=True)
    found = {"label": batch.labels}
    for suffix, seen in (("", pixels), ("_mirror", pixels.flip(3))) if mirror else (("", pixels),):
        posterior = autoencoder.network.encode(seen).latent_dist
        found |= {f"mean{suffix}": posterior.mean.half(), f"std{suffix}": posterior.std.half()}
    if features:
        found["features"] = features.of(batch.keys, batch.images).half()
        if mirror and features.of_mirror:
            found["features_mirror"] = features.of_mirror(batch.keys, batch.images).half()
    return found


def _on_its_way(tensors: dict[str, Tensor]) -> Callable[[], dict[str, Tensor]]:
    """Begin to bring the tensors to the CPU; what is returned waits until they are there."""
    device = next((tensor.device for tensor in tensors.values() if pins(tensor.device)), torch.device("cpu"))
    here = {key: tensor.to("cpu", non_blocking=pins(device)) for key, tensor in tensors.items()}
    copied = mark(device)

    def arrived() -> dict[str, Tensor]:
        copied()
        return here

    return arrived


def _finish(finish: Callable[[Task, dict[str, Tensor]], T], task: Task, parts: dict[str, list[Tensor]]) -> T:
    return finish(task, {key: torch.cat(some).contiguous() for key, some in parts.items()})


def measure(tensors: dict[str, Tensor], channels: int) -> dict[str, Any]:
    """What the statistics of all latents need of one shard's: see `total`. Plain numbers, exact in JSON."""
    own = Statistics(channels)
    own.add(tensors["mean"].float(), tensors["std"].float())
    return {"count": own.count, "sum": own.sum.tolist(), "squares": own.squares.tolist()}


def total(measured: Sequence[dict[str, Any]], channels: int) -> Statistics:
    """The statistics of several shards, added in this order."""
    statistics = Statistics(channels)
    for one in measured:
        statistics.count += one["count"]
        statistics.sum += torch.tensor(one["sum"], dtype=torch.float64)
        statistics.squares += torch.tensor(one["squares"], dtype=torch.float64)
    return statistics


# Decoding


@contextmanager
def decoded(tasks: Sequence[Task], side: int, device: torch.device) -> Iterator[Iterator[Batch]]:
    """The batches of all tasks in their order, decoded some way ahead of whoever takes them."""
    with _threads(1) as reader, _threads(decoders()) as pool:

        def batches() -> Iterator[Batch]:
            ahead: deque[Future[Batch]] = deque()
            for task in tasks:
                samples = read_samples(task.source)
                for numbers in parallel.blocks(task.samples, batch_of(side)):
                    last = numbers.stop == task.samples
                    read = reader.submit(_read, task.source, samples, len(numbers), last)
                    ahead.append(pool.submit(_decode, task, last, read, device))
                    if len(ahead) > decoders() + 1:
                        yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()

        yield batches()


def decoders() -> int:
    """Threads that decode: the cores of this process's share but the one on which it computes."""
    return min(MOST_DECODERS, max(1, (os.cpu_count() or 1) // parallel.local_size() - 1))


def read_samples(path: Path) -> Iterator[dict[str, bytes]]:
    """The content of each sample {png, cls, json} of one of our own shards, in order. Raises ValueError if damaged.

    tarfile checks, remembers and can do much more, and takes as long for a small picture as decoding it does.
    """
    try:
        with open(path, "rb") as file:
            name, sample = "", {}
            while (header := file.read(BLOCK)) != bytes(BLOCK):
                if len(header) < BLOCK or header[257:262] != b"ustar" or header[156:157] != b"0":
                    raise ValueError("its end is missing, or it is no tar of plain files")
                size = int(header[124:135], 8)
                content = file.read(size + -size % BLOCK)
                if len(content) < size:
                    raise ValueError("its end is missing")
                member, _, extension = header[: header.index(0)].decode().partition(".")
                if member != name and sample:
                    yield sample
                    sample = {}
                name, sample[extension] = member, content[:size]
            if sample:
                yield sample
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is missing or damaged ({error}): run the stage `shard`") from None


def _read(path: Path, samples: Iterator[dict[str, bytes]], count: int, last: bool) -> list[dict[str, bytes]]:
    read = list(islice(samples, count))
    if len(read) < count or (last and next(samples, None) is not None):
        raise ValueError(f"{path} holds another number of images than manifest.json tells: run the stage `shard`")
    return read


def _decode(task: Task, last: bool, read: Future[list[dict[str, bytes]]], device: torch.device) -> Batch:
    from PIL import Image

    samples, images = read.result(), []
    try:
        for sample in samples:
            with Image.open(io.BytesIO(sample["png"]), formats=("PNG",)) as image:
                images.append(np.asarray(image))
        keys = [json.loads(sample["json"])["key"] for sample in samples]
        labels = torch.tensor([int(sample["cls"]) for sample in samples])
        stacked = np.stack(images)
    except (KeyError, OSError, EOFError, ValueError) as error:
        raise ValueError(f"{task.source} is damaged ({error}): run the stage `shard`") from None
    pixels = to_pixels(stacked)
    return Batch(task, last, keys, labels, stacked, pixels.pin_memory() if pins(device) else pixels)


@contextmanager
def _threads(count: int) -> Iterator[ThreadPoolExecutor]:
    """So many threads; what they have not begun when the block ends is not done."""
    pool = ThreadPoolExecutor(count)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
