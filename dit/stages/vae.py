"""vae: the autoencoder, fitted to the training images or a pretrained one brought here so that it is versioned."""

from dit import entry, registry, runtime
from dit.addresses import registered
from dit.paths import Paths, publish, write_json
from dit.runtime import RunConfig
from dit.shards import load_split
from dit.vae import Autoencoder, VaeConfig, fetch, fit, psnr

MAX_IMAGES = 20_000  # a small autoencoder learns nothing more from further ones, and these fit in memory


def vae(vae: VaeConfig, run: RunConfig, *, paths: Paths) -> None:
    """Write artifacts/vae: a diffusers folder, and fit.json with its held-out reconstruction error."""
    device = runtime.start(run)
    shards = paths.artifacts / "shard"
    with publish(paths.artifacts / "vae", paths.scratch) as folder:
        if vae.pretrained is None:
            fit(load_split(shards, "train", MAX_IMAGES)[0], vae, device).save_pretrained(folder)
        else:
            named = registered(vae.pretrained, "vae.pretrained")
            source = registry.download(paths, *named, part="vae").as_posix() if named else vae.pretrained
            fetch(source, folder, paths.given)
        autoencoder = Autoencoder.load(folder, device)
        heldout, _ = load_split(shards, "heldout", most=1000)
        told = {
            "pretrained": vae.pretrained,
            "digest": autoencoder.digest,
            "scaling_factor": autoencoder.scaling_factor,
        }
        if len(heldout):
            told["heldout_psnr_db"] = round(psnr(autoencoder.reconstruct(heldout), heldout), 3)
        write_json(folder / "fit.json", told)
    print(", ".join(f"{key} {value}" for key, value in told.items()))


if __name__ == "__main__":
    entry.main(vae)
