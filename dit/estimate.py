"""What a network will ask of a machine: memory to train and to sample, accelerator hours, price.

Operations and parameters are exact (cost.py). Memory is what eager torch keeps, counted tensor by tensor: against the
measured peak of DiT-S/2 on a CPU (batches of 2 x 4 and 2 x 8 images, fp32 and bf16) it was off by 3% at most; for one of
two or four processes that share a network of 58 million weights there (FSDP), it said 1 to 14% more than was measured.
A compiled network needs less. Hours rest on an assumed share of the device's peak, and prices are assumptions too.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from dit.blocks import MODULATED, mlp_size
from dit.cost import NORMS, condition_tokens, macs, parameters, tokens
from dit.model import PATCH_SIZES, SIZES, ModelConfig

Precision = Literal["fp32", "bf16"]
Parallel = Literal["alone", "ddp", "fsdp"]  # how processes train one network: see wrapping.py


@dataclass(frozen=True)
class Device:
    """One accelerator: its peak of dense bf16 operations a second, its memory, and what an hour of it costs."""

    name: str
    peak_flops: float  # multiplications and additions, each counted
    memory_bytes: float
    price: float  # US dollars an hour


# Makers' data sheets; a TPU is one chip. Prices: round figures of what renting one on demand costs; nobody's quotation.
PRICES_OF = "2026-05"
DEVICES = {
    device.name: device
    for device in (
        Device("A100", 312e12, 80e9, 1.50),
        Device("H100", 989e12, 80e9, 3.00),
        Device("H200", 989e12, 141e9, 4.00),
        Device("L4", 121e12, 24e9, 0.70),
        Device("RTX 4090", 165e12, 24e9, 0.50),
        Device("TPU v3", 123e12, 32e9, 2.00),
        Device("TPU v4", 275e12, 32e9, 3.22),
        Device("TPU v5e", 197e12, 16e9, 1.20),
        Device("TPU v5p", 459e12, 95e9, 4.20),
        Device("TPU v6e", 918e12, 32e9, 2.70),
    )
}
# LightningDiT-XL/1 on 8 H800 in bf16, 64 epochs of ImageNet in about 10 hours by its README, is 284 images a second and
# device, a fifth of the peak: the most that was found published for this size. TensorFloat-32's own peak is half of bf16's, so fp32 is taken to reach half as much.
ASSUMED_MFU = {"bf16": 0.20, "fp32": 0.10}
PAPER_BATCH_SIZE = 256
PAPER_STEPS = {256: 7_000_000, 512: 3_000_000}  # XL/2's; the paper compares its twelve sizes at 400,000
BYTES = {"fp32": 4, "bf16": 2}
ROOM = 0.9  # of a device's memory may be planned for


def device_named(name: str) -> Device:
    """The device that `name` means, also by what torch calls it ("NVIDIA A100-SXM4-80GB"). Raises ValueError."""
    words = _words(name)
    for device in DEVICES.values():
        if set(_words(device.name)) <= set(words):
            return device
    raise ValueError(f"device {name!r} is not in the table: choose one of {', '.join(DEVICES)}")


def _words(name: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", name.lower())


def training_memory_parts(
    config: ModelConfig,
    *,
    input_size: int,
    in_channels: int,
    num_classes: int,
    batch_size: int,
    precision: Precision = "bf16",
    condition_shape: tuple[int, int] | None = None,
    averages: int = 1,
    shared_by: int = 1,
) -> dict[str, int]:
    """Bytes that training holds on one device while `batch_size` images go through it at a time.

    Weights, gradients, Adam's two moments and the averages (one, and train.power_ema's) are fp32 whatever the
    precision; under bf16 autocast keeps a second copy of the weights. Activations: what the forward pass keeps for the
    backward pass. Where so many devices share all but the activations (FSDP), `gathered` is what each holds whole.
    """
    shape = {"input_size": input_size, "in_channels": in_channels, "condition_shape": condition_shape}
    T, D = tokens(config, input_size), config.resolved().hidden_size
    P = parameters(config, num_classes=num_classes, **shape) - T * D  # the position table is not trained
    halved = P * BYTES["bf16"] if precision == "bf16" else 0
    parts = {"weights": 4 * P, "gradients": 4 * P, "adam": 8 * P, "ema": 4 * P * averages}
    if shared_by > 1:
        sizes = config.resolved()
        deeper = parameters(replace(sizes, depth=sizes.depth + 1), num_classes=num_classes, **shape)
        block = deeper - parameters(sizes, num_classes=num_classes, **shape)
        rest = P - sizes.depth * block
        # A block and the one that is fetched ahead of its turn; of what is no block the weights and the gradients.
        parts = {name: -(-size // shared_by) for name, size in parts.items()} | {"gathered": 8 * block + 8 * rest}
        if not (config.qk_norm or NORMS[config.block]):  # such blocks are gathered in bf16, and let go
            halved = rest * BYTES["bf16"] if precision == "bf16" else 0
    parts["weights"] += halved
    return parts | {"activations": batch_size * _activations(config, input_size, precision, condition_shape)}


def training_memory(config: ModelConfig, **told: Any) -> int:
    """The sum of `training_memory_parts`, which takes the same arguments: bytes."""
    return sum(training_memory_parts(config, **told).values())


def parallel_kind(asked: str, devices: int, memory_bytes: float | None, needed: Callable[[], int]) -> Parallel:
    """What `run.parallel` means for so many devices: `auto` is ddp unless one of them has no room for all of it.

    `memory_bytes` is one's (None: not known), `needed()` what one takes that holds a copy of everything.
    """
    if devices == 1:
        return "alone"
    if asked != "auto" or memory_bytes is None:
        return "fsdp" if asked == "fsdp" else "ddp"
    return "ddp" if needed() < ROOM * memory_bytes else "fsdp"


def _activations(
    config: ModelConfig, input_size: int, precision: Precision, condition_shape: tuple[int, int] | None
) -> int:
    # Bytes of one image, counted in vectors of D for each token. Under autocast the residual stream, which norms read,
    # and norms' outputs, which modulation reads, stay fp32; inputs and outputs of matrix products are halved.
    config = config.resolved()
    D, inner = config.hidden_size, mlp_size(config) / config.hidden_size
    X = tokens(config, input_size)
    X += condition_tokens(config, condition_shape) if config.block == "in_context" else 0
    inner *= 2 if config.mlp == "gelu" else 4  # GELU's input and output; SwiGLU's two, the gate's SiLU, the product
    norms = 3 if config.block == "cross_attention" else 2
    full = norms + (2 if config.block in MODULATED else 0)
    half = 6 + inner  # inputs of qkv and fc1; q, k, v; attention's output; the MLP's inside
    half += {"adaln_zero": 2, "cross_attention": 3}.get(config.block, 0)  # what is gated; the second attention
    if config.rotary or config.qk_norm:
        half += 3  # q and k once more, and a copy of attention's output, now laid out by heads
    if config.qk_norm and config.block == "cross_attention":
        half += 2
    if config.qk_norm and precision == "bf16":
        full += 2  # norms work in fp32
    last = (2 * 4 + BYTES[precision]) if config.block in MODULATED else (4 + BYTES[precision])
    backward = inner * BYTES[precision]  # gradients inside the last MLP: the peak is at the backward pass's beginning
    return round(X * D * (config.depth * (4 * full + BYTES[precision] * half) + last + backward))


def sampling_memory(
    config: ModelConfig,
    *,
    input_size: int,
    in_channels: int,
    num_classes: int,
    batch_size: int,
    condition_shape: tuple[int, int] | None = None,
    guided: bool = True,
) -> int:
    """Bytes to sample `batch_size` images at a time, in fp32 as drawing is here, without the autoencoder.

    Guidance puts both halves through one call. The most is held inside an MLP: its inner vectors, its input, and the
    residual stream before and after attention.
    """
    shape = {"input_size": input_size, "in_channels": in_channels, "condition_shape": condition_shape}
    sizes = config.resolved()
    inner = mlp_size(sizes) / sizes.hidden_size * (2 if sizes.mlp == "gelu" else 4)
    X = tokens(config, input_size)
    X += condition_tokens(config, condition_shape) if sizes.block == "in_context" else 0
    held = (1 + guided) * batch_size * X * sizes.hidden_size * (3 + inner)
    return round(BYTES["fp32"] * (parameters(config, num_classes=num_classes, **shape) + held))


def training_hours(macs: float, images: float, device: Device, mfu: float) -> float:
    """Hours of one `device` to train on `images` images, seen again each time, at the share `mfu` of its bf16 peak.

    A training step costs three forward passes (the backward pass two), and a multiply-accumulate is two operations.
    """
    return 6 * macs * images / (device.peak_flops * mfu) / 3600


def largest_batch(device: Device, config: ModelConfig, **told: Any) -> int:
    """How many images `device` can train on at a time (0: not one), a tenth of its memory left free."""
    parts = training_memory_parts(config, batch_size=1, **told)
    each = parts.pop("activations")
    return max(0, int((ROOM * device.memory_bytes - sum(parts.values())) // each))


def names() -> list[str]:
    """The twelve networks of the paper."""
    return [f"{size}/{patch}" for size in SIZES for patch in PATCH_SIZES]


def paper_steps(image_size: int) -> int:
    """The optimizer steps of the paper's longest training at this size (256's, where it trained none)."""
    return PAPER_STEPS.get(image_size, PAPER_STEPS[256])


def row(
    name: str,
    config: ModelConfig,
    *,
    input_size: int,
    in_channels: int,
    num_classes: int,
    batch_size: int,
    precision: Precision,
    device: Device,
    mfu: float,
    images: int,
    condition_shape: tuple[int, int] | None = None,
    averages: int = 1,
) -> dict[str, Any]:
    """All that is told of one network, by names that say their units; `images` is the training's length."""
    sizes = config.resolved()
    shape = {"input_size": input_size, "in_channels": in_channels, "condition_shape": condition_shape}
    drawn = shape | {"num_classes": num_classes, "batch_size": batch_size}
    held = shape | {"num_classes": num_classes, "precision": precision, "averages": averages}
    count, forward = parameters(config, num_classes=num_classes, **shape), macs(config, **shape)
    hours = training_hours(forward, images, device, mfu)
    return {
        "name": name,
        "block": sizes.block,
        "depth": sizes.depth,
        "hidden_size": sizes.hidden_size,
        "num_heads": sizes.num_heads,
        "patch_size": sizes.patch_size,
        "latent": [in_channels, input_size, input_size],
        "tokens": tokens(config, input_size),
        "parameters": count,
        "trained_parameters": count - tokens(config, input_size) * sizes.hidden_size,
        "gflops": forward / 1e9,  # multiply-accumulates, as the papers count
        "training_memory_bytes": training_memory_parts(config, batch_size=batch_size, **held),
        "sampling_memory_bytes": sampling_memory(config, **drawn),
        "largest_training_batch": largest_batch(device, config, **held),
        "training_images": images,
        "accelerator_hours": hours,
        "price_usd": hours * device.price,
    }
