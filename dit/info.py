"""The pages of `dit info`: one network in detail, or a table of them, with what was assumed."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from dit import estimate
from dit.model import PATCH_SIZES, ModelConfig

FACTOR, IN_CHANNELS, NUM_CLASSES = 8, 4, 1000  # the published models': latents of 1/8 of the side, ImageNet
DEFAULTS = {"batch_size": 32, "precision": "bf16"}


def answer(
    name: str | None,
    *,
    image_size: int | None = None,
    block: str | None = None,
    batch_size: int | None = None,
    precision: estimate.Precision | None = None,
    device: str = "H100",
    price: float | None = None,
    mfu: float | None = None,
    as_json: bool = False,
    mine: Callable[[], dict[str, Any]] | None = None,
) -> str:
    """The text of `dit info`: of the network `name`, of all twelve (None), or of params.yaml's (`params`).

    `mine()` tells params.yaml's network, as `of_params` does. What is None is as params.yaml says, or else as in
    DEFAULTS. Raises ValueError for what a person mistyped.
    """
    chosen, own = estimate.device_named(device), name == "params" and mine is not None
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"--batch-size must be at least 1, got {batch_size}")
    if mfu is not None and not 0 < mfu <= 1:
        raise ValueError(f"--mfu must be above 0 and at most 1, got {mfu}")
    if price is not None and not 0 <= price < math.inf:
        raise ValueError(f"--price must be a number of US dollars, 0 or more, got {price}")
    if own and (image_size is not None or block is not None):
        raise ValueError("--image-size and --block are said by params.yaml: leave them out, or name a network")
    network = mine() if own else {}
    said = {key: network.pop(key, default) for key, default in DEFAULTS.items()}
    precision, batch_size = precision or said["precision"], batch_size or said["batch_size"]
    mfu = estimate.ASSUMED_MFU[precision] if mfu is None else mfu
    chosen = chosen if price is None else replace(chosen, price=price)
    assumed = {"device": chosen, "batch_size": batch_size, "precision": precision, "mfu": mfu}
    if own:
        title, recipe = network.pop("title"), network.pop("recipe")
        rows = [estimate.row("params", **network, **assumed)]
    else:
        image_size = 256 if image_size is None else image_size
        rows = published(name, image_size, block or "adaln_zero", **assumed)
        title = f"{name} at {image_size} pixels, {NUM_CLASSES} classes"
        recipe = f"the paper's {estimate.paper_steps(image_size):,} steps of {estimate.PAPER_BATCH_SIZE} images"
    if as_json:
        return json.dumps(told(rows, recipe=recipe, **assumed), indent=2)
    if name is None:
        return table(rows, image_size=image_size, recipe=recipe, **assumed)
    return page(rows[0], title=title, recipe=recipe, **assumed)


def published(name: str | None, image_size: int, block: str, **assumed: Any) -> list[dict[str, Any]]:
    """The row of a network by name (`SiT-XL/2` is `DiT-XL/2` with another objective), or all twelve, as published.

    Raises ValueError where the name is not known, or the sizes do not fit.
    """
    if name is not None and _dit(name) not in estimate.names():
        raise ValueError(
            f"{name!r} is no published network: choose DiT-S/2 to DiT-XL/8, SiT-S/2 to SiT-XL/8, or params for yours"
        )
    token = FACTOR * max(PATCH_SIZES if name is None else (int(name.partition("/")[2]),))
    if image_size < token or image_size % token:
        raise ValueError(f"--image-size must be a multiple of {token} for {name or 'all twelve'}, got {image_size}")
    return [
        estimate.row(
            each,
            ModelConfig(_dit(each), block=block),
            input_size=image_size // FACTOR,
            in_channels=IN_CHANNELS,
            num_classes=NUM_CLASSES,
            images=estimate.paper_steps(image_size) * estimate.PAPER_BATCH_SIZE,
            **assumed,
        )
        for each in ([name] if name is not None else estimate.names())
    ]


def of_params(sections: dict[str, Any], factor: int | None, index: dict[str, Any] | None) -> dict[str, Any]:
    """params.yaml's network and training, for `answer`.

    `factor` is pixels per latent, None where nobody knows. `index` is the encoded data's index.json where it is there:
    an autoencoder that comes from elsewhere, and embeddings, have sizes that params.yaml does not say. It counts as far
    as it is of this image size, this autoencoder and these features.
    """
    data, vae, model, train, run = (sections[name] for name in ("data", "vae", "model", "train", "run"))
    index = index if index and _is_of(index, data, vae, factor) else None
    features = (index or {}).get("features")
    if model.condition == "embeddings" and (not features or features["source"] != sections["encode"].features):
        raise ValueError("model.condition embeddings: their shape is known once `dvc repro encode` has run")
    if index:
        side, channels, latents = index["size"], index["channels"], "as encoded (artifacts/encode)"
    else:
        side, channels = data.image_size // (factor or FACTOR), IN_CHANNELS if vae.pretrained else vae.latent_channels
        known = factor and not vae.pretrained
        latents = (
            f"by arithmetic, {factor or FACTOR} pixels each{'' if known else f' and {channels} channels, assumed'}"
        )
    return {
        "title": f"The network of params.yaml ({model.name}) at {data.image_size} pixels, {data.num_classes} classes; "
        f"its latents {latents}",
        "recipe": f"params.yaml's {train.max_steps:,} steps of {train.global_batch_size} images",
        "config": model,
        "input_size": side,
        "in_channels": channels,
        "num_classes": data.num_classes,
        "condition_shape": tuple(features["shape"]) if features else None,
        "images": train.max_steps * train.global_batch_size,
        "batch_size": run.device_batch_size or train.global_batch_size,
        "precision": train.precision,
        "averages": 1 + len(train.power_ema),
    }


def _is_of(index: dict[str, Any], data: Any, vae: Any, factor: int | None) -> bool:
    fitting = index["image_size"] == data.image_size and index.get("pretrained", vae.pretrained) == vae.pretrained
    fitting = fitting and (factor is None or index["size"] == data.image_size // factor)
    return fitting and (vae.pretrained is not None or index["channels"] == vae.latent_channels)


def _dit(name: str) -> str:
    return name.replace("SiT-", "DiT-", 1)


def told(rows: list[dict[str, Any]], *, device: estimate.Device, **assumed: Any) -> dict[str, Any]:
    """What `--json` prints."""
    chosen = {"name": device.name, "bf16_flops": device.peak_flops, "memory_bytes": device.memory_bytes}
    chosen["price_usd_per_hour"] = device.price
    return {"assumed": {"device": chosen, **assumed}, "models": rows}


def table(rows: list[dict[str, Any]], *, image_size: int, **assumed: Any) -> str:
    """A line for each network, and what was assumed."""
    heads = ("network", "parameters", "Gflops", "tokens", "train GB", "sample GB", "hours", "US$")
    lines = ["{:<10} {:>12} {:>8} {:>7} {:>9} {:>10} {:>8} {:>8}".format(*heads)]
    for row in rows:
        train, sample = sum(row["training_memory_bytes"].values()) / 1e9, row["sampling_memory_bytes"] / 1e9
        lines.append(
            f"{row['name']:<10} {row['parameters']:>12,} {row['gflops']:>8.2f} {row['tokens']:>7,} {train:>9.1f} "
            f"{sample:>10.1f} {row['accelerator_hours']:>8,.0f} {row['price_usd']:>8,.0f}"
        )
    about = f"{rows[0]['block']} blocks, {image_size} pixels, latents {_latent(rows[0])}, {NUM_CLASSES} classes."
    return "\n".join([*lines, "", about, *_notes(rows[0], **assumed)])


def page(row: dict[str, Any], *, title: str, device: estimate.Device, **assumed: Any) -> str:
    """One network in detail."""
    parts, gflops, images = row["training_memory_bytes"], row["gflops"], row["training_images"]
    memory = ", ".join(f"{name} {_size(size)}" for name, size in parts.items())
    fits = row["largest_training_batch"]
    hours, price = row["accelerator_hours"], row["price_usd"]
    lines = {
        "network": f"{row['depth']} {row['block']} blocks of {row['hidden_size']} channels, {row['num_heads']} heads; "
        f"latents {_latent(row)}, patches of {row['patch_size']}",
        "tokens": f"{row['tokens']:,}",
        "parameters": f"{row['parameters']:,} ({row['trained_parameters']:,} of them trained)",
        "Gflops": f"{_number(gflops)} (a training step: {_number(6 * gflops)} operations of 10^9 an image)",
        "training": f"{_size(sum(parts.values()))}: {memory}",
        "sampling": f"{_size(row['sampling_memory_bytes'])}, guided, beside the autoencoder",
        f"one {device.name}": f"holds training with {fits:,} images at a time" if fits else "is too small to train it",
        "hours": f"{_number(hours)} of one {device.name} for {images:,} images",
        "price": f"US$ {_number(price)} at {device.price:.2f} an hour",
    }
    width = max(map(len, lines))
    text = [title, *(f"  {name:<{width}}  {value}" for name, value in lines.items())]
    return "\n".join([*text, "", *_notes(row, device=device, **assumed)])


def _size(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.2f}" if value >= 0.1 else f"{value:.2g}"


def _latent(row: dict[str, Any]) -> str:
    channels, height, width = row["latent"]
    return f"{height} x {width} x {channels}"


def _notes(
    row: dict[str, Any], *, device: estimate.Device, batch_size: int, precision: str, mfu: float, recipe: str
) -> list[str]:
    return [
        "Gflops: multiply-accumulates of one image's forward pass, as the papers count.",
        f"Memory: {batch_size} images on a device at a time, eager torch; training in {precision} with Adam and averages,",
        "  sampling in fp32 (drawing is always), guided, without the autoencoder.",
        f"Hours: {recipe}, on one {device.name}",
        f"  at {mfu:.0%} of its {device.peak_flops / 1e12:,.0f} TFLOP/s (bf16). That share is an assumption, made from published XL/2",
        "  trainings; small networks reach less. --mfu says another.",
        f"Price: US$ {device.price:.2f} an hour, "
        + (
            f"an assumption of {estimate.PRICES_OF}, no offer: --price says another."
            if device == estimate.DEVICES.get(device.name)
            else "as given."
        ),
    ]
