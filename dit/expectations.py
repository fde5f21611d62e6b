"""What to expect of a training before it begins: this machine, the time, the memory, how good, and whose rights.

Time and memory are arithmetic (estimate.py) on the speed that the machine shows or is known for; the words on quality
are a rule of thumb.
"""

import time
from dataclasses import dataclass
from typing import Any

from dit.cost import macs
from dit.estimate import ASSUMED_MFU, Device, device_named, largest_batch, training_hours, training_memory
from dit.model import ModelConfig
from dit.progress import clock
from dit.survey import Survey

FEW = 10_000  # images, below which a large network learns more from weights that have seen others
GIB = 2**30
REST = 1.6  # time of the whole pipeline over that of training, where the autoencoder is fitted here (own-64's)
# Seconds that the stages' processes and their imports take in all, whatever the work: preset smoke on two cores.
STARTS = 45
CPU_SHARE = 0.5  # of a processor's matrix products, in training: presets digits (2,200 images/s) and own-64


@dataclass(frozen=True)
class Machine:
    """What the work will run on."""

    device: str  # cpu, cuda, mps
    name: str
    memory_bytes: int
    flops: float | None  # floating-point operations a second: measured on a CPU, None where `name` tells


def look(wanted: str = "auto") -> Machine:
    """This machine: its accelerator, or one thread of its processor, whose matrix products are timed (0.2 s).

    `wanted` is a device as run.device names it. Raises ValueError where the machine lacks it.
    """
    import os

    import torch

    from dit import runtime

    device = runtime.pick_device(wanted)
    own, name = runtime.memory_bytes(device), runtime.device_name(device)
    if own:
        return Machine(device.type, name or device.type, int(own), None)
    memory = runtime.main_memory()
    torch.set_num_threads(1)
    a, best, end = torch.randn(256, 256), float("inf"), time.monotonic() + 0.2
    while time.monotonic() < end:
        started = time.monotonic()
        a @ a
        best = min(best, time.monotonic() - started)
    if device.type != "cpu":  # its own speed is not known
        return Machine(device.type, name or device.type, memory, None)
    return Machine(device.type, f"one of {os.cpu_count()} CPU threads", memory, 2 * 256**3 / best)


@dataclass(frozen=True)
class Weights:
    """A checkpoint folder that `dit import` wrote."""

    folder: str
    config: dict[str, Any]


def expectations(
    found: Survey, machine: Machine, weights: Weights | None, settings: dict[str, Any], learned: int | None = None
) -> list[str]:
    """Time, memory, quality and licences, in lines; `learned` is the number of images to train on where it is known."""
    train, preset = settings["train"], settings["preset"]
    count = found.count - len(found.unreadable)
    if learned is None:
        learned = round(count * (1 - settings["data"]["held_out_fraction"]))
    if not train["max_steps"]:
        return [*untrained(found, train["init_from"]), *licences(weights, settings, preset)]
    passes = train["max_steps"] * train["global_batch_size"] / learned
    lines = [f"{learned:,} images to learn from, {count - learned:,} held out to judge by; {passes:,.0f} passes"]
    lines += cost(machine, settings)
    lines.append(quality(found, learned, passes, settings))
    if settings["data"]["mirror"]:
        lines.append(
            "mirror images are trained on too: --no-mirror for text, digits, and whatever has a left and a right"
        )
    if found.classes and max(found.classes.values()) > 10 * min(found.classes.values()):
        lines.append("the classes differ tenfold in size, and samples are balanced: the FID includes that difference")
    return lines + licences(weights, settings, preset)


def untrained(found: Survey, source: str | None) -> list[str]:
    """What a preset with train.max_steps 0 does with the images."""
    lines = [
        f"nothing is trained (train.max_steps 0): pictures are drawn from the weights in {source} as they are; "
        f"the {found.count:,} images are only what they are compared with",
        "time: none for training; that of drawing and comparing is not estimated",
    ]
    if found.classes:
        lines.append(
            "the sub-folders must sort as the weights' own classes do, and be as many: `dit check` counts them"
        )
    return [*lines, "quality: that of the weights; to have pictures of your kind, --preset finetune-256"]


def quality(found: Survey, learned: int, passes: float, settings: dict[str, Any]) -> str:
    """What to hope for, in words: a rule of thumb on images for each class and passes over them."""
    each = learned // max(1, len(found.classes))
    what = f"{each:,} image{'s' * (each != 1)} a class" if found.classes else f"{learned:,} images"
    if settings["train"].get("init_from"):
        return f"quality: {what} for weights that have seen others: pictures of your kind; watch for copies of yours"
    if each < 30:
        return f"quality: {what} are few: expect blurred copies of them; hundreds make a difference"
    if passes > 400:
        return (
            f"quality: {what}, each seen {passes:,.0f} times: expect near copies of them; more images, or fewer steps"
        )
    if settings["vae"]["pretrained"] is None:
        return f"quality: {what} and a small network: shapes and colours of the kind, little fine detail"
    if learned < FEW:
        return f"quality: {what} are few for a network from nothing: imported weights (`dit import`) go further"
    return f"quality: {what}: good pictures, where the images are of one kind; the more alike, the better"


def licences(weights: Weights | None, settings: dict[str, Any], preset: str) -> list[str]:
    """Which rights are to be asked for."""
    lines = ["rights: the pictures' owners must allow the training; nothing here can know that"]
    if settings["vae"]["pretrained"] == "stabilityai/sd-vae-ft-ema":
        lines.append("rights: the autoencoder stabilityai/sd-vae-ft-ema is under MIT; it is fetched once, 335 MB")
    if source := settings["train"].get("init_from"):
        if weights is None or weights.folder != source:
            lines.append(
                f"weights: {source} is not there yet: `dit import` brings them (the published ones are CC-BY-NC-4.0)"
            )
        elif told := weights.config.get("license"):
            lines.append(f"rights: the weights in {source} are under {told}, and so is every model trained from them")
        else:
            lines.append(f"rights: the weights in {source} descend from nobody else's")
    elif preset == "own-256" and settings["data"]["held_out_fraction"] > 0.05:
        lines.append("with imported weights (`dit import`), --preset finetune-256 learns more from so few images")
    return lines


def cost(machine: Machine, settings: dict[str, Any]) -> list[str]:
    """Time of training and of all of it, by arithmetic, and the memory that training takes."""
    model, train = ModelConfig(**settings["model"]), settings["train"]
    told = shape_of(settings)
    device, share = known(machine, train["precision"])
    at_once = settings["run"]["device_batch_size"] or train["global_batch_size"]
    memory = training_memory(model, **told, batch_size=at_once) / GIB
    lines = [
        f"memory: {memory:.1f} GiB to train with, {at_once} images at a time, of {machine.memory_bytes / GIB:.0f} GiB"
    ]
    forward = macs(model, input_size=told["input_size"], in_channels=told["in_channels"])
    images = train["max_steps"] * train["global_batch_size"]
    if device is None:
        return [
            f"time: {6 * forward * images:.1e} operations of training; how fast {machine.name} is, is not known",
            *lines,
        ]
    seconds = 3600 * training_hours(forward, images, device, share)
    rest = (
        f", {clock(REST * seconds + STARTS)} for everything"
        if settings["vae"]["pretrained"] is None
        else " (encoding apart)"
    )
    return [f"time: about {clock(seconds)} of training{rest}, by arithmetic for {machine.name}", *lines]


def known(machine: Machine, precision: str) -> tuple[Device | None, float]:
    """The machine as a device with a speed, and which share of that speed training gets; None where it is not known."""
    if machine.flops is not None:
        return Device(machine.name, machine.flops, machine.memory_bytes, 0.0), CPU_SHARE
    try:
        return device_named(machine.name), ASSUMED_MFU[precision]
    except ValueError:
        return None, 0.0


def shape_of(settings: dict[str, Any]) -> dict[str, Any]:
    """What estimate.py asks about the network beside its config; a pretrained autoencoder is taken for SD's."""
    vae = settings["vae"]
    fitted = vae["pretrained"] is None
    factor, channels = (2 ** (len(vae["block_out_channels"]) - 1), vae["latent_channels"]) if fitted else (8, 4)
    side = settings["data"]["image_size"] // factor
    shape = {"input_size": side, "in_channels": channels, "num_classes": settings["data"]["num_classes"]}
    return shape | {"precision": settings["train"]["precision"]}


def device_batch_size(machine: Machine, settings: dict[str, Any]) -> int:
    """Images in one pass that the machine has the memory for, a power of two; 0 where the whole batch fits."""
    device = Device(machine.name, 0.0, machine.memory_bytes, 0.0)
    most = largest_batch(device, ModelConfig(**settings["model"]), **shape_of(settings))
    return 0 if most >= settings["train"]["global_batch_size"] else 2 ** max(0, most.bit_length() - 1)
