"""encode: each image shard becomes a shard of latent moments; only what has no earlier result is computed."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dit import entry, reuse, runtime
from dit.checkpoint import load_tensors, save_tensors
from dit.embeddings import Features, open_features, require_all
from dit.latents import EncodeConfig, Statistics, index_digest
from dit.paths import Paths, publish, write_json
from dit.progress import Progress
from dit.runtime import RunConfig
from dit.shards import read_keys, read_manifest, read_shard
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
    features = open_features(encode.features, device, paths.given) if encode.features else None
    keys = keys_of(paths.artifacts / "shard", manifest, features)
    progress = Progress("encode", sum(shard["samples"] for shard in manifest["shards"]))
    shards, statistics, built = [], Statistics(autoencoder.channels), 0
    with reuse.opened(paths, "encode") as index, publish(paths.artifacts / "encode", paths.scratch) as folder:
        for shard in manifest["shards"]:
            source, path = (
                paths.artifacts / "shard" / shard["file"],
                folder / f"{shard['file'].removesuffix('.tar')}.safetensors",
            )
            path.parent.mkdir(exist_ok=True)
            seen = features.digest_of(keys[shard["file"]]) if features else None
            key = digest_of(shard["sha256"], autoencoder.digest, device.type, data.mirror, seen)
            made = reuse.fetch(index, key, path)
            if made is None:
                tensors = moments(source, autoencoder, data.mirror, features, keys.get(shard["file"]), progress)
                save_tensors(path, tensors)
                made, built = reuse.remember(index, key, path), built + 1
            if shard["split"] == "train":
                tensors = load_tensors(path)
                shape = list(tensors["features"].shape[1:]) if features else None
                statistics.add(tensors["mean"].float(), tensors["std"].float())
            entry_ = {"file": path.relative_to(folder).as_posix(), "split": shard["split"], "samples": shard["samples"]}
            shards.append(entry_ | {"sha256": made["sha256"]})
        told = describe(autoencoder, encode, data, manifest, statistics, shards)
        if features:
            told["features"] = {"source": features.source, "digest": features.digest, "shape": shape}
        told = {"digest": index_digest(told), **told}
        write_json(folder / "index.json", told)
    print(f"{len(shards)} shards of latents: {built} encoded, {len(shards) - built} reused")


def moments(
    source: Path,
    autoencoder: Autoencoder,
    mirror: bool,
    features: Features | None,
    keys: Sequence[str] | None,
    progress: Progress,
) -> dict[str, torch.Tensor]:
    """A shard's tensors: mean and std (n, C, h, w) float16, of the mirror images too if asked, and label (n,).

    With `features` also features (n, L, E) float16 of the images with these keys, and features_mirror where the mirror
    image has others.
    """
    parts: dict[str, list[torch.Tensor]] = {}
    done = 0
    for images, labels in _batches(source):
        found = dict(zip(("mean", "std"), autoencoder.moments(images), strict=True))
        if mirror:
            found |= dict(zip(("mean_mirror", "std_mirror"), autoencoder.moments(images[:, :, ::-1]), strict=True))
        if features:
            theirs = keys[done : done + len(images)]
            found["features"] = features.of(theirs, images)
            if mirror and features.of_mirror:
                found["features_mirror"] = features.of_mirror(theirs, images)
        for key, value in found.items():
            parts.setdefault(key, []).append(value.half())
        parts.setdefault("label", []).append(torch.from_numpy(labels))
        done += len(images)
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
    return told


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
