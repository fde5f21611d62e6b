"""Other people's checkpoints, read into the names of our network without running any code of theirs.

Our names are those of the published DiT and SiT files (arXiv 2212.09748, 2401.08740), so these load as they are.
diffusers' `DiTTransformer2DModel` holds the same numbers under other names, with q, k and v apart and the embedders of
timestep and label repeated in every block: `from_diffusers` and `to_diffusers` translate.
"""

import argparse
import json
import pickle
import re
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dit.checkpoint import FORMAT, load_tensors
from dit.paths import publish

NAMES = {"x_embedder.proj": "pos_embed.proj", "final_layer.adaLN_modulation.1": "proj_out_1"}
NAMES |= {"final_layer.linear": "proj_out_2"}
EMBEDDERS = {"t_embedder.mlp.0": "timestep_embedder.linear_1", "t_embedder.mlp.2": "timestep_embedder.linear_2"}
EMBEDDERS |= {"y_embedder.embedding_table": "class_embedder.embedding_table"}
IN_BLOCK = {"adaLN_modulation.1": "norm1.linear", "attn.proj": "attn1.to_out.0"}
IN_BLOCK |= {"mlp.fc1": "ff.net.0.proj", "mlp.fc2": "ff.net.2"}
QKV = ("attn1.to_q", "attn1.to_k", "attn1.to_v")
CONVERTED = re.compile(r"DiT-XL-2-(256|512)", re.I)  # diffusers' conversions of the published weights
RECORD = "_dit"  # what an export of ours tells in transformer/config.json; diffusers passes over such names
WEIGHTS = "diffusion_pytorch_model"


@dataclass
class Foreign:
    """Somebody's weights under our names, and what their files tell; None where they do not tell it."""

    tensors: dict[str, Tensor]
    format: str  # "published" or "diffusers"
    files: list[Path]  # the first of them holds the weights
    args: dict[str, Any] = field(default_factory=dict)  # the training script's, of a published training checkpoint
    weights: str = "ema"
    num_heads: int | None = None
    input_size: int | None = None  # latents along one side
    num_classes: int | None = None
    classes: list[str] | None = None
    timestep_embedding: str = "published"
    prediction: str = "epsilon"
    schedule: str = "linear"
    license: str | None = None
    vae: Path | None = None
    said: list[str] = field(default_factory=list)  # what a person should know about it


def read(source: Path) -> Foreign:
    """Read a published file (.pt, .safetensors) or a diffusers folder. Raises ValueError with one line."""
    if source.is_dir():
        return read_diffusers(source)
    if not source.is_file():
        raise ValueError(f"{source} is not there: give a published .pt file, or a diffusers folder")
    return read_published(source)


def read_published(file: Path) -> Foreign:
    """A bare state dict, or {"model", "ema", "opt", "args"}, of which the averaged weights are taken."""
    if file.suffix == ".safetensors":
        content: Any = load_tensors(file)
    else:
        content = unpickle(file)
    args, weights = {}, "ema"  # the published files are averages, by what their authors say
    if isinstance(content, dict) and not any(isinstance(value, Tensor) for value in content.values()):
        args = vars(content["args"]) if isinstance(content.get("args"), argparse.Namespace) else {}
        weights = "ema" if "ema" in content else "raw"
        content = content.get("ema", content.get("model"))
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{file} holds no state dict (tensors by name, or such under 'ema' or 'model')")
    tensors = {re.sub(r"^(module\.|_orig_mod\.)+", "", name): value for name, value in content.items()}
    if "x_embedder.proj.weight" not in tensors:
        raise ValueError(f"{file} is no DiT or SiT: x_embedder.proj.weight is not among its {len(tensors)} tensors")
    found = Foreign(_float32(tensors), "published", [file], args, weights)
    found.num_classes = args.get("num_classes")
    if found.weights == "raw":
        found.said.append("it holds no averaged weights (ema): the trained ones are taken")
    return found


def unpickle(file: Path) -> Any:
    """torch.load of tensors, plain values and argparse.Namespace. Anything else in the file is refused unrun."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as error:  # each of a broken file's many ways to be broken has an error of its own
        forbidden = re.search(r"GLOBAL ([\w.]+)", str(error))
        if isinstance(error, pickle.UnpicklingError) and forbidden:
            raise ValueError(
                f"{file} holds more than tensors and plain values ({forbidden[1]}): refused, "
                f"since opening that could run somebody's code"
            ) from None
        raise ValueError(f"{file} is torn, or no checkpoint of torch ({type(error).__name__})") from None


def read_diffusers(folder: Path) -> Foreign:
    """A `DiTPipeline`'s folder, or its transformer's alone. No class of diffusers is instantiated."""
    pipeline = read_json(folder / "model_index.json") if (folder / "model_index.json").is_file() else {}
    transformer = folder / "transformer" if (folder / "transformer").is_dir() else folder
    config = read_json(transformer / "config.json")
    if config.get("format") == FORMAT:
        raise ValueError(f"{folder} is a checkpoint of ours already: give it to train.init_from as it is")
    if (
        config.get("norm_type") != "ada_norm_zero"
        or config.get("activation_fn", "gelu-approximate") != "gelu-approximate"
    ):
        raise ValueError(f"{transformer}/config.json is not of a DiTTransformer2DModel (norm_type ada_norm_zero)")
    files = _weights(transformer)
    tensors: dict[str, Tensor] = {}
    for file in files:
        tensors |= load_tensors(file) if file.suffix == ".safetensors" else unpickle(file)
    try:
        ours = from_diffusers(_float32(tensors), config["num_layers"])
        found = Foreign(ours, "diffusers", [*files, transformer / "config.json"])
        found.num_heads, found.input_size = config["num_attention_heads"], config["sample_size"]
        num_rows = len(ours["y_embedder.embedding_table.weight"])
    except KeyError as error:
        raise ValueError(f"{transformer} is no whole DiTTransformer2DModel: {error.args[0]} is missing") from None
    record = config.get(RECORD, {})
    found.license = record.get("license") or _card_license(folder)
    names = pipeline.get("id2label")
    found.num_classes = record.get("num_classes", len(names) if names else num_rows - 1)
    if names:
        found.classes = [str(names[str(label)]) for label in sorted(map(int, names))][: found.num_classes]
    found.timestep_embedding, why = _timestep_embedding(folder, config, record)
    found.said.append(f"timestep embedding: {found.timestep_embedding}, since {why} (--timestep-embedding)")
    if config.get("norm_eps", 1e-5) != 1e-6:
        found.said.append(
            f"norm_eps is {config.get('norm_eps', 1e-5):g} there and 1e-6 here: outputs differ by about 1e-5"
        )
    found.vae = folder / "vae" if (folder / "vae" / "config.json").is_file() else None
    if (folder / "scheduler" / "scheduler_config.json").is_file():
        _read_scheduler(read_json(folder / "scheduler" / "scheduler_config.json"), found)
    return found


def from_diffusers(theirs: dict[str, Tensor], depth: int) -> dict[str, Tensor]:
    """Our names. Raises KeyError where a tensor is missing, ValueError where the blocks' embedders differ."""
    ours = {}
    for kind in ("weight", "bias"):
        for name, other in NAMES.items():
            ours[f"{name}.{kind}"] = theirs[f"{other}.{kind}"]
        for name, other in EMBEDDERS.items():
            if kind == "bias" and name.startswith("y_"):
                continue
            copies = [theirs[f"transformer_blocks.{i}.norm1.emb.{other}.{kind}"] for i in range(depth)]
            if not all(torch.equal(copies[0], copy) for copy in copies):
                raise ValueError(
                    f"the blocks' {other}.{kind} differ: this network embeds timestep and label once, for all blocks"
                )
            ours[f"{name}.{kind}"] = copies[0]
        for i in range(depth):
            block = f"transformer_blocks.{i}"
            ours[f"blocks.{i}.attn.qkv.{kind}"] = torch.cat([theirs[f"{block}.{part}.{kind}"] for part in QKV])
            for name, other in IN_BLOCK.items():
                ours[f"blocks.{i}.{name}.{kind}"] = theirs[f"{block}.{other}.{kind}"]
    return ours


def to_diffusers(ours: dict[str, Tensor], depth: int) -> dict[str, Tensor]:
    """diffusers' names: the inverse of `from_diffusers`. The position table is no part of it (diffusers computes it)."""
    theirs = {}
    for kind in ("weight", "bias"):
        for name, other in NAMES.items():
            theirs[f"{other}.{kind}"] = ours[f"{name}.{kind}"]
        for i in range(depth):
            block = f"transformer_blocks.{i}"
            for part, tensor in zip(QKV, ours[f"blocks.{i}.attn.qkv.{kind}"].chunk(3), strict=True):
                theirs[f"{block}.{part}.{kind}"] = tensor
            for name, other in IN_BLOCK.items():
                theirs[f"{block}.{other}.{kind}"] = ours[f"blocks.{i}.{name}.{kind}"]
            for name, other in EMBEDDERS.items():
                if f"{name}.{kind}" in ours:
                    theirs[f"{block}.norm1.emb.{other}.{kind}"] = ours[f"{name}.{kind}"].clone()
    return theirs


def require_place(output: Path, name: str, mark: str) -> None:
    """Raise ValueError where `output` holds something else than an earlier result: a file `name` with `mark` in it."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not (output / name).is_file() or mark not in (output / name).read_text(errors="replace"):
        raise ValueError(f"{output} is there and holds something else: choose another --output")


@contextmanager
def beside(output: Path) -> Iterator[Path]:
    """Yield an empty folder on the same disk as `output` that replaces it at the end: whole or not at all."""
    scratch = output.parent / f".{output.name}.unfinished"
    try:
        with publish(output, scratch) as folder:
            yield folder
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _timestep_embedding(folder: Path, config: dict[str, Any], record: dict[str, Any]) -> tuple[str, str]:
    if "timestep_embedding" in record:
        return record["timestep_embedding"], "the export says so"
    if CONVERTED.search(" ".join((folder.resolve().name, folder.name, str(config.get("_name_or_path", ""))))):
        return "published", "its name is that of the published weights' conversion, which were trained with it"
    return "diffusers", "that is what diffusers computes"


def _read_scheduler(config: dict[str, Any], found: Foreign) -> None:
    predictions = {"epsilon": "epsilon", "sample": "x", "v_prediction": "v"}
    schedules = {"linear": "linear", "squaredcos_cap_v2": "cosine"}
    prediction, schedule = config.get("prediction_type", "epsilon"), config.get("beta_schedule", "linear")
    betas = (config.get("num_train_timesteps", 1000), config.get("beta_start", 1e-4), config.get("beta_end", 0.02))
    usual = betas[0] == 1000 and (schedule != "linear" or betas[1:] == (1e-4, 0.02)) and not config.get("trained_betas")
    if prediction not in predictions or schedule not in schedules or not usual:
        raise ValueError(
            f"scheduler_config.json: {prediction} on {schedule} betas {betas} is not a chain that this code knows"
        )
    found.prediction, found.schedule = predictions[prediction], schedules[schedule]


def _weights(folder: Path) -> list[Path]:
    index = folder / f"{WEIGHTS}.safetensors.index.json"
    if index.is_file():
        return [folder / name for name in sorted({Path(name).name for name in read_json(index)["weight_map"].values()})]
    for suffix in ("safetensors", "bin"):
        if (folder / f"{WEIGHTS}.{suffix}").is_file():
            return [folder / f"{WEIGHTS}.{suffix}"]
    raise ValueError(f"{folder} holds no weights ({WEIGHTS}.safetensors or .bin)")


def _card_license(folder: Path) -> str | None:
    """`license:` in a model card's front matter; the Creative Commons' ones in SPDX's capitals."""
    card = folder / "README.md"
    told = card.is_file() and re.match(
        r"---\s.*?^license:\s*([\w.-]+)\s*$.*?^---", card.read_text(errors="replace"), re.M | re.S
    )
    return (told[1].upper() if told[1].lower().startswith("cc") else told[1]) if told else None


def read_json(file: Path) -> dict[str, Any]:
    """A JSON file of settings. Raises ValueError where it is missing, torn or something else."""
    try:
        told = json.loads(file.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError):
        raise ValueError(f"{file} is missing or torn") from None
    if not isinstance(told, dict):
        raise ValueError(f"{file} holds no settings")
    return told


def _float32(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.float() for name, tensor in tensors.items()}
