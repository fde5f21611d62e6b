"""encode: each image shard becomes a shard of latent moments; only what has no earlier result is computed.

    torchrun --nproc-per-node 8 -m dit.stages.encode

shares the shards among several processes; what is written is the same, to the last bit.
"""

import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dit import entry, heap, reuse, runtime
from dit.checkpoint import load_tensors, save_tensors
from dit.embeddings import Features, open_features, require_all
from dit.encoding import Task, encode_shards, measure, total
from dit.latents import EncodeConfig, index_digest
from dit.parallel import World, world
from dit.paths import Paths, publish, write_json
from dit.progress import Progress
from dit.runtime import RunConfig
from dit.shards import read_keys, read_manifest
from dit.sources import DataConfig
from dit.vae import Autoencoder

FORMAT = 1  # raise it when the content of a latent shard changes for the same inputs
LOOK_SECONDS = 1.0  # between two looks at what the other processes have finished


def encode(data: DataConfig, encode: EncodeConfig, run: RunConfig, *, paths: Paths) -> None:
    """Write artifacts/encode: train/ and heldout/ safetensors, index.json.

    Every process of `world()` calls it and encodes whole shards; the main one tells of all. What was encoded before an
    interruption is taken.
    """
    device, here, source = runtime.start(run), world(), paths.artifacts / "shard"
    heap.keep()
    manifest = read_manifest(source)
    autoencoder = Autoencoder.load(paths.artifacts / "vae", device)
    if data.image_size % autoencoder.factor:
        raise ValueError(
            f"data.image_size {data.image_size} is no multiple of {autoencoder.factor}, the autoencoder's factor"
        )
    features = open_features(encode.features, device, paths.given) if encode.features else None
    digests = digests_of(source, manifest, autoencoder, device.type, data.mirror, features) if here.main else []
    with _begun(paths, here) as (index, folder):
        tasks = [
            Task(source / shard["file"], shard["samples"], latents_file(folder, shard), digest)
            for shard, digest in zip(manifest["shards"] if here.main else [], digests, strict=True)
        ]
        for parent in {task.path.parent for task in tasks}:
            parent.mkdir()
        made = reuse.fetch_all(index, {task.digest: task.path for task in tasks})
        todo = here.share([task for task in tasks if task.digest not in made])

        def finish(task: Task, tensors: dict[str, Tensor]) -> tuple[str, dict[str, Any]]:
            save_tensors(task.path, tensors)
            return task.digest, reuse.remember(index, task.digest, task.path, note_of(tensors, autoencoder.channels))

        with _counting(tasks, todo, here, index) as progress:
            own = encode_shards(
                here.mine(todo),
                data.image_size,
                autoencoder,
                finish,
                mirror=data.mirror,
                features=features,
                progress=progress,
            )
            parts = here.gather(dict(own))
        if not here.main:
            return
        for part in parts:
            reuse.join(index, part)
            made |= part
        for task in tasks:
            if not made[task.digest]["note"]:  # an earlier version took none
                made[task.digest]["note"] = note_of(load_tensors(task.path), autoencoder.channels)
        told = describe(autoencoder, encode, data, manifest, [made[digest] for digest in digests], features)
        write_json(folder / "index.json", {"digest": index_digest(told), **told})
    print(f"{len(tasks)} shards of latents: {len(todo)} encoded, {len(tasks) - len(todo)} reused")


@contextmanager
def _begun(paths: Paths, here: World) -> Iterator[tuple[reuse.Index, Path]]:
    """What is remembered, and the folder that becomes artifacts/encode: the main process's, which all write into."""
    if not here.main:
        yield here.share(None)
        return
    with reuse.opened(paths, "encode") as index, publish(paths.artifacts / "encode", paths.scratch) as folder:
        here.share((reuse.part(index), folder))
        yield index, folder


@contextmanager
def _counting(tasks: list[Task], todo: list[Task], here: World, index: reuse.Index) -> Iterator[Callable[[int], None]]:
    """A count of images; at the main process those count too that others finish, shard by shard."""
    total = sum(task.samples for task in tasks or todo)
    progress = Progress("encode", total, before=total - sum(task.samples for task in todo))
    lock, ended = threading.Lock(), threading.Event()
    left = {task.digest: task.samples for rank in range(1, here.size) for task in World(rank, here.size).mine(todo)}

    def count(images: int) -> None:
        with lock:
            progress(images)

    def look() -> None:
        while not ended.wait(LOOK_SECONDS):
            if done := [digest for digest in left if reuse.is_remembered(index, digest)]:
                count(sum(left.pop(digest) for digest in done))

    watch = threading.Thread(target=look, daemon=True)
    if not here.main or not left:
        yield count
        return
    watch.start()
    try:
        yield count
    finally:
        ended.set()
        watch.join()
    if left:
        count(sum(left.values()))


def note_of(tensors: dict[str, Tensor], channels: int) -> dict[str, Any]:
    """What index.json needs to know of a shard, so that one that is used again need not be read."""
    shape = list(tensors["features"].shape[1:]) if "features" in tensors else None
    return {"statistics": measure(tensors, channels), "features": shape}


def describe(
    autoencoder: Autoencoder,
    encode: EncodeConfig,
    data: DataConfig,
    manifest: dict[str, Any],
    made: list[dict[str, Any]],
    features: Features | None,
) -> dict[str, Any]:
    """index.json: what the latents are, and how raw ones become normalised: (raw - mean) / std.

    `made` is what `reuse` remembers of each of the manifest's shards.
    """
    shards = [entry_of(shard, result["sha256"]) for shard, result in zip(manifest["shards"], made, strict=True)]
    notes = [result["note"] for shard, result in zip(shards, made, strict=True) if shard["split"] == "train"]
    mean, std = total([note["statistics"] for note in notes], autoencoder.channels)
    if encode.normalization == "channel":
        if min(std) == 0:
            raise ValueError("encode.normalization: a channel of the latents is constant, it has no scale: use `scale`")
        normalization = {"mode": "channel", "mean": mean, "std": std}
    else:
        channels = autoencoder.channels
        normalization = {
            "mode": "scale",
            "mean": [autoencoder.shift] * channels,
            "std": [1 / autoencoder.scaling_factor] * channels,
        }
    told = {
        "autoencoder": autoencoder.digest,
        "channels": autoencoder.channels,
        "size": data.image_size // autoencoder.factor,
        "image_size": data.image_size,
        "mirror": data.mirror,
        "classes": manifest["classes"],
        "data": {"name": data.name, "digest": manifest["digest"]},
        "statistics": {"mean": mean, "std": std},
        "normalization": normalization,
        "shards": shards,
    }
    if features:
        shape = notes[0]["features"]
        told["features"] = {"source": features.source, "digest": features.digest, "shape": shape}
    return told


def entry_of(shard: dict[str, Any], sha256: str) -> dict[str, Any]:
    """A shard of latents in index.json: its images in all, and of each label that it has ({"0": n} without labels)."""
    counts = {str(label): count for label, count in enumerate(shard["class_counts"]) if count}
    file = latents_file(Path(), shard).as_posix()
    return {"file": file, "split": shard["split"], "samples": shard["samples"], "sha256": sha256, "counts": counts}


def latents_file(folder: Path, shard: dict[str, Any]) -> Path:
    """Where the latents of a shard of images belong."""
    return folder / f"{shard['file'].removesuffix('.tar')}.safetensors"


def digests_of(
    shards: Path,
    manifest: dict[str, Any],
    autoencoder: Autoencoder,
    device: str,
    mirror: bool,
    features: Features | None,
) -> list[str]:
    """The name of each shard's result. Raises ValueError where images have no features."""
    keys = keys_of(shards, manifest, features)
    seen = [features.digest_of(keys[shard["file"]]) if features else None for shard in manifest["shards"]]
    return [
        digest_of(shard["sha256"], autoencoder.digest, device, mirror, one)
        for shard, one in zip(manifest["shards"], seen, strict=True)
    ]


def digest_of(shard: str, autoencoder: str, device: str, mirror: bool, features: str | None = None) -> str:
    """The name of one shard's result. Device and libraries are part of it: they differ in the last bits."""
    machine = [device, torch.__version__, version("diffusers")]
    told = [FORMAT, shard, autoencoder, mirror, *machine] + ([features] if features else [])
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def keys_of(shards: Path, manifest: dict[str, Any], features: Features | None) -> dict[str, list[str]]:
    """The source's keys of the images in each shard file; nothing where no features are wanted. Raises ValueError where
    some have none."""
    if features is None:
        return {}
    keys = {shard["file"]: read_keys(shards / shard["file"]) for shard in manifest["shards"]}
    require_all(features, (key for some in keys.values() for key in some))
    return keys


if __name__ == "__main__":
    entry.main(encode, together=True)
