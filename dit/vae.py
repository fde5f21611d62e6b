"""The autoencoder between pixels and latents: fitted here or a pretrained one, always a diffusers `AutoencoderKL`.

Images are uint8 (N, S, S, 3). Raw latents are what the network gives; the scale that makes them ready for diffusion
is a property of the latents (see latents.py).
"""

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dit import torchvision_cpu
from dit.paths import Given, file_sha256, given_here
from dit.progress import Progress
from dit.randomness import generator
from dit.schedule import warmup_cosine

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"
BATCH = 100  # images of 64 pixels or less in one call of the network


def batch_of(side: int) -> int:
    """Images of so many pixels in one call: a function of the size alone, since sums depend on the batch's shape."""
    return max(1, min(BATCH, BATCH * 64 * 64 // (side * side)))


@dataclass(frozen=True)
class VaeConfig:
    """`pretrained` names a hub id, a diffusers folder, or models:/NAME/3 for a registered model's own; where it is null,
    the rest says how to fit one."""

    pretrained: str | None
    block_out_channels: tuple[int, ...] = (8, 16, 16)  # each but the last halves the side
    layers_per_block: int = 1
    latent_channels: int = 4
    norm_num_groups: int = 8
    max_steps: int = 640
    global_batch_size: int = 16
    lr: float = 8e-3
    kl_weight: float = 1e-3
    seed: int = 0

    def __post_init__(self) -> None:
        if self.pretrained is not None and not self.pretrained.strip():
            raise ValueError("pretrained must be null, a folder or a hub id, got an empty text")
        for name in ("layers_per_block", "latent_channels", "norm_num_groups", "max_steps", "global_batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.block_out_channels or any(c < 1 or c % self.norm_num_groups for c in self.block_out_channels):
            raise ValueError(
                f"block_out_channels must be multiples of norm_num_groups {self.norm_num_groups}, got {list(self.block_out_channels)}"
            )
        if not self.lr > 0 or self.kl_weight < 0:
            raise ValueError(f"lr must be above 0 and kl_weight at least 0, got {self.lr} and {self.kl_weight}")

    @property
    def factor(self) -> int:
        """Pixels per latent along one side, of the autoencoder that is fitted here."""
        return 2 ** (len(self.block_out_channels) - 1)


def import_diffusers():
    """diffusers' AutoencoderKL, imported late: it takes seconds."""
    torchvision_cpu.prepare()
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    return AutoencoderKL


class Autoencoder:
    """An `AutoencoderKL` in eval mode, and its identity."""

    def __init__(self, network: "AutoencoderKL", digest: str):
        self.network, self.digest = network.eval().requires_grad_(False), digest
        config = network.config
        self.channels: int = config.latent_channels
        self.factor: int = 2 ** (len(config.block_out_channels) - 1)
        # raw = shift + latent / scaling_factor
        self.shift, self.scaling_factor = config.get("shift_factor") or 0.0, config.scaling_factor

    @classmethod
    def load(cls, folder: Path | str, device: torch.device | str = "cpu") -> "Autoencoder":
        """Read a diffusers folder. Raises ValueError where it is not one."""
        folder = Path(folder)
        if missing := [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]:
            raise ValueError(f"{folder} is not an autoencoder's folder: {missing[0]} is missing")
        try:
            network = import_diffusers().from_pretrained(folder, local_files_only=True, low_cpu_mem_usage=False)
        except Exception as error:  # diffusers, safetensors and json each say it in their own way
            told = str(error).strip().splitlines() or [type(error).__name__]
            raise ValueError(f"{folder} holds a damaged autoencoder ({told[0]})") from None
        return cls(network.to(device), digest_of(folder))

    @torch.no_grad()
    def moments(self, images: np.ndarray) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the posterior, each (N, C, h, w), of images (N, S, S, 3)."""
        posterior = self.network.encode(to_pixels(images).to(self.network.device)).latent_dist
        return posterior.mean.cpu(), posterior.std.cpu()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """uint8 images (N, S, S, 3) from raw latents (N, C, h, w), on the CPU."""
        size = batch_of(latents.shape[-1] * self.factor)
        parts = [self.network.decode(part.to(self.network.device)).sample for part in latents.split(size)]
        return to_images(torch.cat(parts))

    def reconstruct(self, images: np.ndarray) -> np.ndarray:
        """What the posterior's mean decodes to: the best that any model on these latents can look like."""
        size = batch_of(images.shape[1])
        parts = [self.decode(self.moments(images[i : i + size])[0]).numpy() for i in range(0, len(images), size)]
        return np.concatenate(parts)


def to_pixels(images: np.ndarray) -> Tensor:
    """uint8 (N, S, S, 3) -> float (N, 3, S, S) in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_images(pixels: Tensor) -> Tensor:
    """float (N, 3, S, S) in [-1, 1] -> uint8 (N, S, S, 3): clamp(127.5 x + 128, 0, 255), truncated."""
    return (127.5 * pixels + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu()


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio of uint8 images, in dB, over all of them."""
    error = np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2)
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))


def digest_of(folder: Path) -> str:
    """sha256 over what decides the network: its configuration (the library's own notes apart) and its weights."""
    config = {k: v for k, v in json.loads((folder / CONFIG).read_text()).items() if not k.startswith("_")}
    content = json.dumps(config, sort_keys=True) + file_sha256(folder / WEIGHTS)
    return hashlib.sha256(content.encode()).hexdigest()


def fit(images: np.ndarray, config: VaeConfig, device: torch.device) -> "AutoencoderKL":
    """Fit a small autoencoder to uint8 images (N, S, S, 3): squared error plus a little KL, AdamW, cosine schedule.

    Its `scaling_factor` is 1 / the standard deviation of latents sampled for these images.
    """
    torch.manual_seed(config.seed)
    blocks = len(config.block_out_channels)
    network = import_diffusers()(
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        block_out_channels=config.block_out_channels,
        layers_per_block=config.layers_per_block,
        latent_channels=config.latent_channels,
        norm_num_groups=config.norm_num_groups,
        sample_size=images.shape[1],
        mid_block_add_attention=False,
    ).to(device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=config.lr)
    progress = Progress("vae", config.max_steps, "steps")
    for step in range(config.max_steps):
        draws = generator(config.seed, "vae step", step)
        picked = torch.randint(len(images), (config.global_batch_size,), generator=draws)
        pixels = to_pixels(images[picked.numpy()]).to(device)
        posterior = network.encode(pixels).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=draws).to(device)
        loss = F.mse_loss(network.decode(posterior.mean + posterior.std * noise).sample, pixels)
        loss = loss + config.kl_weight * posterior.kl().mean() / posterior.mean[0].numel()
        optimizer.param_groups[0]["lr"] = config.lr * warmup_cosine(step, config.max_steps, warmup_steps=30)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        progress(1)
    if not all(torch.isfinite(parameter).all() for parameter in network.parameters()):
        raise ValueError("vae.lr: the autoencoder's weights became infinite while it was fitted: lower it")
    network.register_to_config(scaling_factor=1 / _latent_std(Autoencoder(network, ""), images, config.seed))
    return network


def fetch(pretrained: str, destination: Path, given: Given = given_here) -> None:
    """Copy a pretrained autoencoder (a diffusers folder, `given` says where, or a hub id) to `destination`.

    Raises ValueError that says which files to bring, and where, if it is neither here nor to be had.
    """
    source = given(pretrained)
    if not source.is_dir() and pretrained.startswith(("/", "~", ".")):
        raise ValueError(f"vae.pretrained: the folder {source} is not there")
    if not source.is_dir():
        source = _download(pretrained)
    if not (source / CONFIG).is_file() and (source / "vae").is_dir():  # a whole pipeline's folder
        source = source / "vae"
    for name in (CONFIG, WEIGHTS):
        if not (source / name).is_file():
            raise ValueError(
                f"vae.pretrained: {pretrained} has no {name}; a diffusers autoencoder's folder holds {CONFIG} and {WEIGHTS}"
            )
        shutil.copyfile(source / name, destination / name)


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(hub_id, allow_patterns=[CONFIG, WEIGHTS], etag_timeout=10))
    except Exception as error:  # the hub's client has many ways to say that there is no network
        raise ValueError(
            f"vae.pretrained: {hub_id!r} is not a folder, is not in the hub's cache and could not be downloaded "
            f"({type(error).__name__}): bring {CONFIG} and {WEIGHTS} of https://huggingface.co/{hub_id} into a folder "
            f"and set vae.pretrained to that folder"
        ) from None


def _latent_std(autoencoder: Autoencoder, images: np.ndarray, seed: int) -> float:
    samples = []
    size = batch_of(images.shape[1])
    for start in range(0, min(len(images), 2000), size):
        mean, std = autoencoder.moments(images[start : start + size])
        samples.append(mean + std * torch.randn(mean.shape, generator=generator(seed, "vae scale", start)))
    return torch.cat(samples).std().item()
