"""What each stage will ask for, before it begins: seconds, memory, disk. Arithmetic on a machine's speed.

Operations are exact where the networks are ours (cost.py, and the autoencoder's convolutions below). How fast they are
done is assumed for accelerators (estimate.ASSUMED_MFU) and measured for CPUs: with the shares below, the stages of
presets digits and own-64 take what the README says they took, within a factor of two.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dit import info
from dit.cost import macs, parameters
from dit.estimate import ASSUMED_MFU, Device, largest_batch, parallel_kind, sampling_memory, training_memory
from dit.expectations import CPU_SHARE, Machine, known
from dit.generation import evaluations
from dit.pipeline import SHARED
from dit.weights import OWN

LIGHT = ("scan", "ema", "register", "report")  # which take little more than their start
START_SECONDS = 4  # of a stage's process and its imports: 45 s for eleven, preset smoke on two cores
# Of a CPU's matrix products (expectations.look): convolutions of few channels take longer, and drawing has its own
# products, which are faster (docs/benchmarks.md).
CPU_CONVOLUTIONS, CPU_DRAWING = 0.35, 0.8
IMAGE_SECONDS, PIXEL_SECONDS = 2e-3, 2.8e-7  # to read a photograph and write it as PNG: 3 ms at 64 pixels, 20 at 256
PNG = 0.6  # bytes of a photograph as PNG over those of its pixels
EVALUATE_SECONDS = 3e-3  # an image's share of neighbours, resamplings and copies: 11 s for digits' 2,000
DOPRI5 = 60  # evaluations, where a tolerance decides: of the order of a hundred
EXTRACTOR = 5.7e9  # multiply-accumulates: Inception-v3's for an image of 299 pixels; taken for every published one
CLASSIFIER = 0.77e6 / 32**2  # those of the small classifier, for a pixel
SD_VAE = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 4}


@dataclass(frozen=True)
class Speeds:
    """Operations a second of all that a machine lends, for each kind of work."""

    training: float
    drawing: float
    convolutions: float


def speeds(machine: Machine, precision: str, threads: int = 1, device: Device | None = None) -> Speeds | None:
    """What to count on; None where nobody knows the machine, and no `device` is told. Of a CPU, `threads` are taken to
    help fully."""
    device = device or known(machine, precision)[0]
    if device is None:
        return None
    if machine.flops is not None:
        all_of_it = machine.flops * threads
        return Speeds(CPU_SHARE * all_of_it, CPU_DRAWING * all_of_it, CPU_CONVOLUTIONS * all_of_it)
    full = device.peak_flops * ASSUMED_MFU["fp32"]  # drawing and encoding are
    return Speeds(device.peak_flops * ASSUMED_MFU[precision], full, full)


def network_of(sections: dict[str, Any], factor: int | None, artifacts: Path) -> dict[str, Any]:
    """params.yaml's network and training as `info.of_params` tells them; embeddings of a size that is not known yet are
    taken for classes."""
    encoded, fit = (artifacts / name for name in ("encode/index.json", "vae/fit.json"))
    try:
        index = json.loads(encoded.read_text())
        index["pretrained"] = json.loads(fit.read_text()).get("pretrained")
    except (OSError, ValueError):
        index = None
    try:
        return info.of_params(sections, factor, index)
    except ValueError:
        model = replace(sections["model"], condition="classes")
        return info.of_params(sections | {"model": model}, factor, index)


def seconds(
    sections: dict[str, Any],
    network: dict[str, Any],
    images: int,
    speeds: Speeds,
    *,
    vae: dict[str, Any] | None = None,
    devices: int = 1,
    cores: int = 1,
) -> dict[str, float]:
    """Of each stage from nothing. `vae` is the configuration of a pretrained autoencoder, where it is known.

    What a stage finds of its earlier work is not counted, nor are downloads, nor the registry's contest.
    """
    data, reference, sample = (sections[name] for name in ("data", "reference", "sample"))
    encoder, decoder = autoencoder_macs(data.image_size, **autoencoder(sections["vae"], vae))
    forward = macs(**{name: network[name] for name in ("config", "input_size", "in_channels", "condition_shape")})
    extractor = EXTRACTOR if reference.extractor not in OWN else 0
    classifier = CLASSIFIER * min(data.image_size, 64) ** 2
    held = min(images * data.held_out_fraction, 10_000)
    drawn = sample.num_images * len(sample.settings)
    passes = sum((evaluations(s) or DOPRI5) * (1 + guided(s)) for s in sample.settings) * sample.num_images
    looks = 2 * reference.max_steps * reference.global_batch_size * 3
    fitted = sections["vae"]
    steps = 0 if fitted.pretrained else fitted.max_steps * fitted.global_batch_size
    work = dict.fromkeys(LIGHT, 0.0) | {
        "shard": images * (IMAGE_SECONDS + PIXEL_SECONDS * data.image_size**2 * (data.source != "digits")) / cores,
        "vae": 2 * (3 * steps + min(images, 1000)) * (encoder + decoder) / speeds.convolutions,
        "encode": 2 * images * (1 + data.mirror) * encoder / speeds.convolutions,
        "reference": 2 * (images * extractor + (looks + images) * classifier) / speeds.convolutions,
        "train": 6 * forward * network["images"] / speeds.training,
        "sample": 2 * (passes * forward / speeds.drawing + drawn * decoder / speeds.convolutions),
        "evaluate": 2 * ((drawn + 2 * held) * extractor + held * (encoder + decoder)) / speeds.convolutions
        + drawn * EVALUATE_SECONDS,
    }
    return {name: START_SECONDS + took / (devices if name in SHARED else 1) for name, took in work.items()}


def guided(setting: Any) -> float:
    """The share of a setting's evaluations that look at the image without its condition too."""
    first, last = setting.cfg_interval
    return last - first if setting.cfg_scale != 1 else 0.0


def autoencoder(config: Any, told: dict[str, Any] | None = None) -> dict[str, Any]:
    """What `autoencoder_macs` asks: the one that is fitted, or the pretrained one's own config.json, or Stable
    Diffusion's in its place."""
    if config.pretrained is None:
        names = ("block_out_channels", "layers_per_block", "latent_channels")
        return {name: getattr(config, name) for name in names} | {"attention": False}
    told = told or {}
    return {name: told.get(name, value) for name, value in SD_VAE.items()} | {
        "attention": told.get("mid_block_add_attention", True)
    }


def autoencoder_macs(
    side: int,
    *,
    block_out_channels: tuple[int, ...],
    layers_per_block: int,
    latent_channels: int,
    attention: bool,
) -> tuple[int, int]:
    """Multiply-accumulates of diffusers' `AutoencoderKL` for one image of `side` pixels: to encode it, to decode it."""

    def conv(inputs: int, outputs: int, side: int, kernel: int = 3) -> int:
        return inputs * outputs * kernel * kernel * side * side

    def resnet(inputs: int, outputs: int, side: int) -> int:
        shortcut = conv(inputs, outputs, side, 1) if inputs != outputs else 0
        return conv(inputs, outputs, side) + conv(outputs, outputs, side) + shortcut

    widths, z = tuple(block_out_channels), latent_channels
    sides = [side >> level for level in range(len(widths))]
    C, T = widths[-1], sides[-1] ** 2
    middle = 2 * resnet(C, C, sides[-1]) + (4 * T * C * C + 2 * T * T * C if attention else 0)
    encode = conv(3, widths[0], side) + middle + conv(C, 2 * z, sides[-1]) + conv(2 * z, 2 * z, sides[-1], 1)
    decode = conv(z, z, sides[-1], 1) + conv(z, C, sides[-1]) + middle + conv(widths[0], 3, side)
    for level, (width, at) in enumerate(zip(widths, sides, strict=True)):
        below, above = widths[max(level - 1, 0)], widths[min(level + 1, len(widths) - 1)]
        encode += resnet(below, width, at) + (layers_per_block - 1) * resnet(width, width, at)
        decode += resnet(above, width, at) + layers_per_block * resnet(width, width, at)
        if level + 1 < len(widths):
            encode += conv(width, width, sides[level + 1])
        if level:
            decode += conv(width, width, sides[level - 1])
    return encode, decode


def memory(sections: dict[str, Any], network: dict[str, Any]) -> dict[str, int]:
    """Bytes of one device that training and drawing ask for; for `network["shared_by"]` see `sharing`."""
    sample = sections["sample"]
    asked = {}
    if network["images"]:
        asked["train"] = training_memory(network["config"], batch_size=network["batch_size"], **_held(network))
    drawn = {"batch_size": min(sample.block_images, sample.num_images), "guided": any(map(guided, sample.settings))}
    asked["sample"] = sampling_memory(network["config"], **_shape(network), **drawn)
    return asked


def sharing(network: dict[str, Any], parallel: str, devices: int, machine: Machine | None) -> int:
    """How many devices share one copy of what training holds: all of them where run.parallel comes to mean fsdp."""
    alone = network | {"shared_by": 1}
    kind = parallel_kind(
        parallel,
        devices,
        machine.memory_bytes if machine and machine.device not in ("cpu", "mps") else None,  # runtime.memory_bytes
        lambda: training_memory(network["config"], batch_size=network["batch_size"], **_held(alone)),
    )
    return devices if kind == "fsdp" else 1


def largest_training_batch(network: dict[str, Any], memory_bytes: float) -> int:
    """How many images at a time so much memory allows to train on (0: not one)."""
    device = Device("", 0.0, memory_bytes, 0.0)
    return largest_batch(device, network["config"], **_held(network))


def _shape(network: dict[str, Any]) -> dict[str, Any]:
    return {name: network[name] for name in ("input_size", "in_channels", "num_classes", "condition_shape")}


def _held(network: dict[str, Any]) -> dict[str, Any]:
    told = {name: network[name] for name in ("precision", "averages")}
    return _shape(network) | told | {"shared_by": network.get("shared_by", 1)}


def latents_bytes(sections: dict[str, Any], network: dict[str, Any], images: int) -> int:
    """Memory of the machine (not the accelerator's) in which training keeps the latents: float16 mean and deviation."""
    data = sections["data"]
    learned = round(images * (1 - data.held_out_fraction))
    return 2 * 2 * (1 + data.mirror) * learned * network["in_channels"] * network["input_size"] ** 2


def disk_bytes(sections: dict[str, Any], network: dict[str, Any], images: int) -> dict[str, int]:
    """What each stage's results, and training's own states, take on the disk; DVC's cache may hold them once more."""
    data, train, sample, run = (sections[name] for name in ("data", "train", "sample", "run"))
    weights = 4 * parameters(network["config"], **_shape(network))
    pixels, every = 3 * data.image_size**2, train.snapshot_every_steps
    kept = 1 + (train.max_steps // every if every else 0)
    states = (2 + network["averages"] + 1) * weights * (run.keep_checkpoints + 1)  # Adam's moments, averages, weights
    latents = latents_bytes(sections, network, images) / max(1 - data.held_out_fraction, 1e-9)
    return {
        "shard": round(images * pixels * PNG),
        "encode": round(latents),
        "train": (1 + kept * network["averages"]) * weights + (states if train.max_steps else 0),
        "ema": weights,
        "sample": sample.num_images * len(sample.settings) * pixels,
    }
