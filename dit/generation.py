"""From a checkpoint and an autoencoder to pictures. Image number i is a function of (seed, i) and what is asked for.

Only dopri5 looks at more: the length of its steps depends on the whole block, so that an image is the same, within the
tolerances, whatever it is drawn with.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dit import acceleration, denoising, diffusion, sampling, solvers, stochastic, transport
from dit.checkpoint import Checkpoint
from dit.latents import require_autoencoder
from dit.objective import ObjectiveConfig, objective_from
from dit.randomness import generator
from dit.setting import SampleConfig, Setting, require_sampler, respacing
from dit.vae import Autoencoder


def num_choices(checkpoint: Checkpoint) -> int:
    """What the model can be asked for: so many classes, or rows of its bank of embeddings; 0 = nothing.

    Raises ValueError where a model of embeddings has no bank.
    """
    if checkpoint.model.config.condition != "embeddings":
        return checkpoint.model.num_classes
    if checkpoint.conditions is None:
        raise ValueError("the checkpoint has no conditions.safetensors to draw for: ask it with embeddings themselves")
    return len(checkpoint.conditions["label"])


def condition(checkpoint: Checkpoint, wanted: Tensor) -> Tensor:
    """The network's y, on its device, for what is asked for: labels (N,), or for a model of embeddings either rows
    (N,) of its bank or embeddings (N, L, E) themselves.

    Raises ValueError where it takes none like these.
    """
    network = checkpoint.model
    if network.config.condition != "embeddings":
        if wanted.dim() != 1 or wanted.is_floating_point():
            raise ValueError(f"this model takes labels (N,), and was given {wanted.dtype} {tuple(wanted.shape)}")
    elif not wanted.is_floating_point():
        rows = num_choices(checkpoint)
        if len(wanted) and not 0 <= int(wanted.min()) <= int(wanted.max()) < rows:
            raise ValueError(
                f"the model's bank has {rows} rows: ask for 0 to {rows - 1}, or with embeddings themselves"
            )
        wanted = checkpoint.conditions["features"].to(wanted.device)[wanted].float()
    elif tuple(wanted.shape[1:]) != tuple(network.condition_shape):
        L, E = network.condition_shape
        raise ValueError(f"this model takes embeddings (N, {L}, {E}), and was given {tuple(wanted.shape)}")
    return wanted.to(network.pos_embed.device)


def evaluations(setting: Setting) -> int | None:
    """How often the network is evaluated for an image; None for dopri5, where nobody knows before.

    Guidance is not counted: it evaluates twice as many images in each call.
    """
    steps = setting.num_steps
    if setting.sampler == "heun":
        return 2 * steps
    if setting.sampler == "sde_heun":
        return 2 * steps if setting.last_step == "none" else 2 * (steps - 1) + 1
    return steps


def draw_labels(labels: str, num_classes: int, seed: int, indices: Sequence[int]) -> Tensor:
    """The classes, or rows of a bank, (N,) of images number `indices`; the null label 0 where there are none."""
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
    checkpoint: Checkpoint, setting: Setting, wanted: Tensor, indices: Sequence[int], *, seed: int
) -> Tensor:
    """Normalised latents (N, C, h, w) of images number `indices`, drawn for what is `wanted` (see `condition`)."""
    network, objective = checkpoint.model, objective_from(checkpoint.config["objective"])
    conditional = network.config.condition == "embeddings" or network.num_classes
    require_sampler(setting, objective.name, conditional)
    device, C = network.pos_embed.device, network.in_channels
    noise = latent_noise((C, network.input_size, network.input_size), seed, indices, device)
    model = sampling.guided(
        acceleration.for_drawing(network),
        condition(checkpoint, wanted),
        network.null(len(indices)),
        setting.cfg_scale,
        channels=min(3, C) if setting.cfg_channels == "first3" else None,
        interval=setting.cfg_interval,
        clock=CLOCKS[objective.name],
    )
    solve = solve_transport if objective.name == "transport" else solve_diffusion
    return solve(model, noise(), setting, objective, noise)


# The sampler's time, from 0 (noise) to 1 (data), by which an interval of guidance goes.
CLOCKS: dict[str, Callable[[Tensor], Tensor]] = {
    "transport": lambda t: t,
    "diffusion": lambda t: 1 - t / diffusion.NUM_TIMESTEPS,
}


def solve_transport(
    model: sampling.Model, x: Tensor, setting: Setting, objective: ObjectiveConfig, noise: Callable[[], Tensor]
) -> Tensor:
    """Latents from noise x (N, C, h, w), by the ODE or SDE of a network's velocity, score or noise."""
    config, C = objective.transport, x.shape[1]
    t0, t1 = transport.interval(config)
    if setting.sampler == "dopri5":
        return sampling.dopri5(transport.velocity_of(model, config, C), x, t0, t1, setting.rtol, setting.atol)
    if setting.sampler in ("euler", "heun"):
        solver = {"euler": sampling.euler, "heun": sampling.heun}[setting.sampler]
        times = torch.linspace(t0, t1, setting.num_steps + 1)
        return solver(transport.velocity_of(model, config, C), x, times)
    form, norm, size = setting.diffusion_form, setting.diffusion_norm, setting.last_step_size
    method = setting.sampler.removeprefix("sde_")
    solver = {"euler": stochastic.sde_euler, "heun": stochastic.sde_heun}[method]
    noisy = {"form": form, "norm": norm, "last_step": setting.last_step, "last_step_size": size, "method": method}
    times = stochastic.sde_times(config, setting.num_steps, **noisy)
    x = solver(*stochastic.sde(model, config, C, form, norm), x, times, noise)
    return stochastic.last_step(setting.last_step, model, config, C, form, norm)(x, times[-1], size)


def solve_diffusion(
    model: sampling.Model, x: Tensor, setting: Setting, objective: ObjectiveConfig, noise: Callable[[], Tensor]
) -> Tensor:
    """Latents from noise x (N, C, h, w), down the chain, or by a solver of its ODE."""
    config = objective.diffusion
    if setting.sampler in ("dpmpp", "unipc"):
        return solvers.solve(setting.sampler, model, x, config, setting.num_steps)
    chain = diffusion.chain(config, respacing(setting))
    if setting.sampler == "ddpm":
        return denoising.ancestral(model, x, chain, noise, setting.clip)
    return denoising.ddim(model, x, chain, eta=setting.eta, noise=noise, clip=setting.clip)


def generate(
    checkpoint: Checkpoint,
    autoencoder: Autoencoder,
    setting: Setting,
    wanted: Tensor,
    indices: Sequence[int],
    *,
    seed: int,
) -> Tensor:
    """uint8 images (N, H, W, 3), in one block, of what is `wanted` (see `condition`).

    Raises ValueError where the autoencoder is not the one that the model was trained on.
    """
    told: dict[str, Any] = checkpoint.config["latents"]
    require_autoencoder(told, autoencoder.digest, "the model's latents")
    latents = generate_latents(checkpoint, setting, wanted, indices, seed=seed)
    shift, scale = (torch.tensor(told[k], device=latents.device).view(1, -1, 1, 1) for k in ("mean", "std"))
    return autoencoder.decode(latents * scale + shift)


def asked(checkpoint: Checkpoint, config: SampleConfig, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
    """What images number `indices` are drawn for (see `condition`), and the labels (N,) that they are told by: classes,
    -1 where the model knows none, or for a model of embeddings, which draws for the rows of its bank, the rows' classes.
    """
    choices = num_choices(checkpoint)
    wanted = draw_labels(config.labels, choices, config.seed, indices)
    if checkpoint.model.config.condition == "embeddings":
        return wanted, checkpoint.conditions["label"][wanted]
    return wanted, wanted if choices else wanted - 1


def generate_blocks(
    checkpoint: Checkpoint,
    autoencoder: Autoencoder,
    setting: Setting,
    config: SampleConfig,
    *,
    progress: Callable[[int], None] = lambda count: None,
) -> tuple[np.ndarray, np.ndarray]:
    """All images that `config` asks for, uint8 (N, H, W, 3), and their labels (N,), block by block of indices, in memory.

    `dit.drawing` draws the same images into a file, for sets of any size.
    """
    N, side = config.num_images, checkpoint.config["image_size"]
    images, labels = np.empty((N, side, side, 3), np.uint8), np.empty(N, np.int64)
    for start in range(0, N, config.block_images):
        indices = range(start, min(start + config.block_images, N))
        wanted, told = asked(checkpoint, config, indices)
        labels[start : indices.stop] = told.numpy()
        images[start : indices.stop] = generate(
            checkpoint, autoencoder, setting, wanted, indices, seed=config.seed
        ).numpy()
        progress(len(indices))
    return images, labels
