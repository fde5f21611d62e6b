"""vae: the autoencoder, fitted to the training images or a pretrained one brought here so that it is versioned."""

from itertools import islice
from pathlib import Path

import numpy as np

from dit import entry, runtime
from dit.paths import Paths, publish, write_json
from dit.runtime import RunConfig
from dit.shards import read_manifest, stream_split
from dit.vae import Autoencoder, VaeConfig, fetch, fit, psnr

MAX_IMAGES = 20_000  # a small autoencoder learns nothing more from further ones, and these fit in memory


def vae(vae: VaeConfig, run: RunConfig, *, paths: Paths) -> None:
    """Write artifacts/vae: a diffusers folder, and fit.json with its held-out reconstruction error."""
    device = runtime.start(run)
    shards = paths.artifacts / "shard"
    with publish(paths.artifacts / "vae", paths.scratch) as folder:
        if vae.pretrained is None:
            fit(spread(shards, MAX_IMAGES), vae, device).save_pretrained(folder)
        else:
            fetch(vae.pretrained, folder)
        autoencoder = Autoencoder.load(folder, device)
        heldout = [image for _, _, image in islice(stream_split(shards, "heldout"), 1000)]
        told = {
            "pretrained": vae.pretrained,
            "digest": autoencoder.digest,
            "scaling_factor": autoencoder.scaling_factor,
        }
        if heldout:
            told["heldout_psnr_db"] = round(psnr(autoencoder.reconstruct(np.stack(heldout)), np.stack(heldout)), 3)
        write_json(folder / "fit.json", told)
    print(", ".join(f"{key} {value}" for key, value in told.items()))


def spread(shards: Path, most: int) -> np.ndarray:
    """At most so many training images (N, S, S, 3), taken evenly from all shards: those are sorted by class."""
    total = sum(shard["samples"] for shard in read_manifest(shards)["shards"] if shard["split"] == "train")
    return np.stack(
        [image for _, _, image in islice(stream_split(shards, "train"), 0, None, max(1, -(-total // most)))]
    )


if __name__ == "__main__":
    entry.main(vae)
