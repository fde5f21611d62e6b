"""encode: each image shard becomes a shard of latent moments; only what has no earlier result is computed."""

import hashlib
import json
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dit import entry, reuse, runtime
from dit.checkpoint import load_tensors, save_tensors
from dit.latents import EncodeConfig, Statistics, index_digest
from dit.paths import Paths, publish, write_json
from dit.progress import Progress
from dit.runtime import RunConfig
from dit.shards import read_manifest, read_shard
from dit.sources import DataConfig
from dit.vae import Autoencoder, batch_of

FORMAT = 1  # raise it when the content of a latent shard changes for the same inputs


def encode(data: DataConfig, encode: EncodeConfig, run: RunConfig, *, paths: Paths) -> None:
    """Write artifacts/encode: train/ and heldout/ safetensors, index.json."""
    device = runtime.start(run)
    manifest = read_manifest(paths.artifacts / "shard")
    autoencoder = Autoencoder.load(paths.artifacts / "vae", device)
    if data.image_size % autoencoder.factor:
        raise ValueError(
            f"data.image_size {data.image_size} is no multiple of {autoencoder.factor}, the autoencoder's factor"
        )
    progress = Progress("encode", sum(shard["samples"] for shard in manifest["shards"]))
    shards, statistics, built = [], Statistics(autoencoder.channels), 0
    with reuse.opened(paths, "encode") as index, publish(paths.artifacts / "encode", paths.scratch) as folder:
        for shard in manifest["shards"]:
            source, path = (
                paths.artifacts / "shard" / shard["file"],
                folder / f"{shard['file'].removesuffix('.tar')}.safetensors",
            )
            path.parent.mkdir(exist_ok=True)
            key = digest_of(shard["sha256"], autoencoder.digest, device.type, data.mirror)
            made = reuse.fetch(index, key, path)
            if made is None:
                save_tensors(path, moments(source, autoencoder, data.mirror, progress))
                made, built = reuse.remember(index, key, path), built + 1
            if shard["split"] == "train":
                tensors = load_tensors(path)
                statistics.add(tensors["mean"].float(), tensors["std"].float())
            entry_ = {"file": path.relative_to(folder).as_posix(), "split": shard["split"], "samples": shard["samples"]}
            shards.append(entry_ | {"sha256": made["sha256"]})
        told = describe(autoencoder, encode, data, manifest, statistics, shards)
        write_json(folder / "index.json", told)
    print(f"{len(shards)} shards of latents: {built} encoded, {len(shards) - built} reused")


def moments(source: Path, autoencoder: Autoencoder, mirror: bool, progress: Progress) -> dict[str, torch.Tensor]:
    """A shard's tensors: mean and std (n, C, h, w) float16, of the mirror images too if asked, and label (n,)."""
    parts: dict[str, list[torch.Tensor]] = {}
    for images, labels in _batches(source):
        found = dict(zip(("mean", "std"), autoencoder.moments(images), strict=True))
        if mirror:
            found |= dict(zip(("mean_mirror", "std_mirror"), autoencoder.moments(images[:, :, ::-1]), strict=True))
        for key, value in found.items():
            parts.setdefault(key, []).append(value.half())
        parts.setdefault("label", []).append(torch.from_numpy(labels))
        progress(len(labels))
    return {key: torch.cat(value) for key, value in parts.items()}


def describe(
    autoencoder: Autoencoder,
    encode: EncodeConfig,
    data: DataConfig,
    manifest: dict[str, Any],
    statistics: Statistics,
    shards: list[dict[str, Any]],
) -> dict[str, Any]:
    """index.json: what the latents are, and how raw ones become normalised: (raw - mean) / std."""
    mean, std = statistics
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
    return {"digest": index_digest(told), **told}


def digest_of(shard: str, autoencoder: str, device: str, mirror: bool) -> str:
    """The name of one shard's result. Device and libraries are part of it: they differ in the last bits."""
    machine = [device, torch.__version__, version("diffusers")]
    return hashlib.sha256(json.dumps([FORMAT, shard, autoencoder, mirror, *machine]).encode()).hexdigest()


def _batches(source: Path) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    images, labels = [], []
    for _, label, image in read_shard(source):
        images.append(image)
        labels.append(label)
        if len(images) == batch_of(image.shape[0]):
            yield np.stack(images), np.array(labels)
            images, labels = [], []
    if images:
        yield np.stack(images), np.array(labels)


if __name__ == "__main__":
    entry.main(encode)
