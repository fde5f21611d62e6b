"""From a checkpoint and an autoencoder to pictures. Image number i is a function of (seed, i) and nothing else."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from dit import sampling
from dit.checkpoint import Checkpoint, load_tensors, save_tensors
from dit.diffusion import NUM_TIMESTEPS, Diffusion, linear_betas, respace, space_timesteps
from dit.latents import require_autoencoder
from dit.randomness import generator
from dit.transport import velocity
from dit.vae import Autoencoder

SAMPLERS = {"transport": ("euler", "heun"), "diffusion": ("ddpm", "ddim")}


@dataclass(frozen=True)
class Setting:
    """One way to draw: its name, guidance scale, sampler and number of steps."""

    name: str
    cfg_scale: float
    sampler: Literal["euler", "heun", "ddpm", "ddim"]
    num_steps: int

    def __post_init__(self) -> None:
        if not self.name or not all(c.isalnum() or c in "._-" for c in self.name) or self.name[0] in ".-":
            raise ValueError(f"name must be letters, digits, dots, dashes (it names a folder), got {self.name!r}")
        if self.num_steps < 1:
            raise ValueError(f"num_steps must be at least 1, got {self.num_steps}")
        if not 0 <= self.cfg_scale <= 100:
            raise ValueError(f"cfg_scale must be 0 to 100 (1 = no guidance), got {self.cfg_scale}")


@dataclass(frozen=True)
class SampleConfig:
    """What to draw: so many images, with each of the named settings."""

    num_images: int
    seed: int
    labels: Literal["balanced", "random"]  # image i's class: i modulo the classes, or drawn by (seed, i)
    block_images: int  # images in one call of the network: part of the result to the last bit, so no hardware setting
    settings: tuple[Setting, ...]

    def __post_init__(self) -> None:
        if self.num_images < 1 or self.block_images < 1:
            raise ValueError(
                f"num_images and block_images must be at least 1, got {self.num_images} and {self.block_images}"
            )
        names = [setting.name for setting in self.settings]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"settings must be at least one, each with a name of its own, got {names}")


def require_sampler(setting: Setting, objective: str, num_classes: int) -> None:
    """Raise ValueError unless a model of this objective can be drawn from with this setting."""
    if setting.sampler not in SAMPLERS[objective]:
        allowed = " or ".join(SAMPLERS[objective])
        raise ValueError(
            f"sample.settings {setting.name!r}: sampler {setting.sampler!r} does not fit objective {objective!r}: use {allowed}"
        )
    if setting.sampler in SAMPLERS["diffusion"] and not 2 <= setting.num_steps <= NUM_TIMESTEPS:
        raise ValueError(
            f"sample.settings {setting.name!r}: num_steps must be 2 to {NUM_TIMESTEPS} for {setting.sampler}, got {setting.num_steps}"
        )
    if num_classes == 0 and setting.cfg_scale != 1:
        raise ValueError(
            f"sample.settings {setting.name!r}: an unconditional model has nothing to guide: set cfg_scale to 1"
        )


def draw_labels(labels: str, num_classes: int, seed: int, indices: Sequence[int]) -> Tensor:
    """The classes (N,) of images number `indices`; the null label 0 for an unconditional model."""
    if num_classes == 0:
        return torch.zeros(len(indices), dtype=torch.long)
    if labels == "balanced":
        return torch.tensor(indices) % num_classes
    return torch.stack([torch.randint(num_classes, (), generator=generator(seed, "label", i)) for i in indices])


def latent_noise(
    shape: tuple[int, ...], seed: int, indices: Sequence[int], device: torch.device | str
) -> Callable[[], Tensor]:
    """A source of standard normal (N, *shape): each image draws from a generator of its own."""
    generators = [generator(seed, "sample", i) for i in indices]
    return lambda: torch.stack([torch.randn(shape, generator=g) for g in generators]).to(device)


@torch.no_grad()
def generate_latents(
    checkpoint: Checkpoint, setting: Setting, labels: Tensor, indices: Sequence[int], *, seed: int
) -> Tensor:
    """Normalised latents (N, C, h, w) of images number `indices`, drawn for `labels` (N,)."""
    network, objective = checkpoint.model, checkpoint.config["objective"]["name"]
    require_sampler(setting, objective, network.num_classes)
    device = network.pos_embed.device
    shape = (network.in_channels, network.input_size, network.input_size)
    noise = latent_noise(shape, seed, indices, device)
    model = sampling.guided(network, labels.to(device), network.null_label, setting.cfg_scale)
    x = noise()
    if objective == "transport":
        solver = {"euler": sampling.euler, "heun": sampling.heun}[setting.sampler]
        times = torch.linspace(0, 1, setting.num_steps + 1, device=device)
        return solver(lambda x, t: velocity(model(x, t), network.in_channels), x, times)
    full = Diffusion(linear_betas())
    chain = respace(full, space_timesteps(full.num_timesteps, str(setting.num_steps)))
    return sampling.ddim(model, x, chain) if setting.sampler == "ddim" else sampling.ancestral(model, x, chain, noise)


def generate(
    checkpoint: Checkpoint,
    autoencoder: Autoencoder,
    setting: Setting,
    labels: Tensor,
    indices: Sequence[int],
    *,
    seed: int,
) -> Tensor:
    """uint8 images (N, H, W, 3), in one block.

    Raises ValueError where the autoencoder is not the one that the model was trained on.
    """
    told: dict[str, Any] = checkpoint.config["latents"]
    require_autoencoder(told, autoencoder.digest, "the model's latents")
    latents = generate_latents(checkpoint, setting, labels, indices, seed=seed)
    shift, scale = (torch.tensor(told[k], device=latents.device).view(1, -1, 1, 1) for k in ("mean", "std"))
    return autoencoder.decode(latents * scale + shift)


def generate_blocks(
    checkpoint: Checkpoint,
    autoencoder: Autoencoder,
    setting: Setting,
    config: SampleConfig,
    *,
    progress: Callable[[int], None] = lambda count: None,
    keep: Path | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """All images that `config` asks for, uint8 (N, H, W, 3), and their labels (N,), block by block of indices.

    With a folder `keep`, each block is kept there as soon as it is drawn, and one that is there already is taken: the
    folder's name must tell model, autoencoder, setting and `config` apart from any others.
    """
    N, side = config.num_images, checkpoint.config["image_size"]
    images, labels = np.empty((N, side, side, 3), np.uint8), np.empty(N, np.int64)
    for start in range(0, N, config.block_images):
        indices = range(start, min(start + config.block_images, N))
        wanted = draw_labels(config.labels, checkpoint.model.num_classes, config.seed, indices)
        labels[start : indices.stop] = wanted.numpy()
        kept = keep / f"block-{start:08d}.safetensors" if keep else None
        block = load_tensors(kept)["images"] if kept and kept.exists() else []
        if len(block) != len(indices):
            block = generate(checkpoint, autoencoder, setting, wanted, indices, seed=config.seed)
            if kept:
                save_tensors(kept, {"images": block})
        images[start : indices.stop] = block.numpy()
        progress(len(indices))
    return images, labels
