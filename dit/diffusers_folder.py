"""A folder of diffusers' `DiTPipeline`, or of its transformer alone, read without instantiating any class of diffusers.

The tensors are the truth; a config.json that says something else of them is refused, and so is a chain that this code
does not know.
"""

import re
from pathlib import Path
from textwrap import shorten
from typing import Any, get_args

from torch import Tensor

from dit.checkpoint import FORMAT, load_tensors
from dit.embedders import Convention
from dit.foreign import Foreign, Settings, plain, read_json, unpickle
from dit.interop import RECORD, WEIGHTS, from_diffusers, to_diffusers

CONVERTED = re.compile(r"DiT-XL-2-(256|512)", re.I)  # diffusers' conversions of the published weights
CLASSES = ("DiTTransformer2DModel", "PublishedDiT", "Transformer2DModel")  # the last: its name in those conversions
NETWORK = {"norm_type": "ada_norm_zero", "activation_fn": "gelu-approximate"}
NETWORK |= {"norm_elementwise_affine": False, "attention_bias": True}
PREDICTIONS = {"epsilon": "epsilon", "sample": "x", "v_prediction": "v"}
SCHEDULES = {"linear": "linear", "squaredcos_cap_v2": "cosine"}
CHAIN = {"num_train_timesteps": 1000, "trained_betas": None, "rescale_betas_zero_snr": False, "use_flow_sigmas": False}
LINEAR = {"beta_start": 1e-4, "beta_end": 0.02}


def read_diffusers(folder: Path) -> Foreign:
    """The weights and all that the folder tells. Raises ValueError with one line."""
    transformer = folder / "transformer" if (folder / "transformer").is_dir() else folder
    if not (transformer / "config.json").is_file():
        there = "transformer/config.json" if transformer != folder else "config.json, and no transformer/"
        raise ValueError(f"{folder} is no diffusers folder of a DiT: it holds no {there}")
    config = read_json(transformer / "config.json")
    if config.values.get("format") == FORMAT:
        raise ValueError(f"{folder} is a checkpoint of ours already: give it to train.init_from as it is")
    config.one_of("_class_name", CLASSES)
    _require(config, NETWORK, "a network that this code does not know")
    files = _weights(transformer)
    tensors: dict[str, Tensor] = {}
    for file in files:
        tensors |= plain(load_tensors(file) if file.suffix == ".safetensors" else unpickle(file), file)
    ours = _translated(tensors, config.get("num_layers", int, above=0), transformer)
    found = Foreign(ours, "diffusers", [*files, transformer / "config.json"])
    _read_sizes(config, found)
    record = config.within(RECORD, {})
    found.weights = record.one_of("weights", ("ema", "raw"), "ema")
    found.license = record.get("license", str, None) or _card_license(folder)
    found.own = "license" in record.values and found.license is None
    _read_classes(folder, record, found)
    _read_timestep_embedding(folder, config, record, found)
    norm_eps = config.get("norm_eps", float, 1e-5)
    if norm_eps != 1e-6:
        found.said.append(f"norm_eps is {norm_eps:g} there and 1e-6 here: outputs differ by about 1e-5")
    found.vae = folder / "vae" if (folder / "vae" / "config.json").is_file() else None
    if (folder / "scheduler" / "scheduler_config.json").is_file():
        _read_scheduler(read_json(folder / "scheduler" / "scheduler_config.json"), found)
    return found


def _weights(folder: Path) -> list[Path]:
    index = folder / f"{WEIGHTS}.safetensors.index.json"
    if index.is_file():
        told = read_json(index).within("weight_map")
        return [folder / name for name in sorted({Path(told.get(key, str)).name for key in told.values})]
    for suffix in ("safetensors", "bin"):
        if (folder / f"{WEIGHTS}.{suffix}").is_file():
            return [folder / f"{WEIGHTS}.{suffix}"]
    raise ValueError(f"{folder} holds no weights ({WEIGHTS}.safetensors or .bin)")


def _translated(tensors: dict[str, Tensor], depth: int, folder: Path) -> dict[str, Tensor]:
    whole = f"a whole DiTTransformer2DModel of {depth} blocks, as its config.json says"
    try:
        ours = from_diffusers(tensors, depth)
    except KeyError as error:
        raise ValueError(f"{folder} is not {whole}: {error.args[0]} is missing") from None
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None
    except RuntimeError as error:  # of torch.cat
        raise ValueError(f"{folder} is not {whole}: {str(error).splitlines()[0]}") from None
    for name in sorted(tensors.keys() - to_diffusers(ours, depth).keys()):
        raise ValueError(f"{folder} is not {whole}: {name} is no part of that")
    return ours


def _read_sizes(config: Settings, found: Foreign) -> None:
    hidden_size, channels, patch_size, _ = found.sides("x_embedder.proj.weight", 4)
    found.num_heads = config.get("num_attention_heads", int, above=0)
    head_size = config.get("attention_head_dim", int, hidden_size // found.num_heads, above=0)
    found.input_size = config.get("sample_size", int, above=0)
    if found.num_heads * head_size != hidden_size:
        told = f"num_attention_heads {found.num_heads} x attention_head_dim {head_size}"
        raise ValueError(f"{config.place}{told} are not the {hidden_size} channels of the tensors")
    rows = found.sides("y_embedder.embedding_table.weight", 2)[0]
    theirs = {"patch_size": patch_size, "in_channels": channels, "num_embeds_ada_norm": rows - 1}
    _require(config, theirs, "not what the tensors are")
    if found.input_size % patch_size:
        raise ValueError(f"{config.place}sample_size {found.input_size} is no multiple of patch_size {patch_size}")


def _read_classes(folder: Path, record: Settings, found: Foreign) -> None:
    index = folder / "model_index.json"
    names = (read_json(index) if index.is_file() else Settings()).within("id2label", {})
    count = len(names.values)
    if names.values.keys() != {str(label) for label in range(count)}:
        raise ValueError(f"{index}: id2label must name the labels 0 to {count - 1}, each once")
    rows = found.sides("y_embedder.embedding_table.weight", 2)[0]
    found.num_classes = record.get("num_classes", int, count or rows - 1, above=0)
    if count:
        if found.num_classes != count:
            raise ValueError(f"{index}: id2label names {count} classes, {record.place}num_classes {found.num_classes}")
        found.classes = [names.get(str(label), str) for label in range(count)]


def _read_timestep_embedding(folder: Path, config: Settings, record: Settings, found: Foreign) -> None:
    found.timestep_embedding, found.timestep_reason = "diffusers", "that is what diffusers computes"
    if "timestep_embedding" in record.values:
        found.timestep_embedding = record.one_of("timestep_embedding", get_args(Convention))
        found.timestep_reason = "the export says so"
    elif CONVERTED.search(" ".join((folder.resolve().name, folder.name, str(config.values.get("_name_or_path"))))):
        found.timestep_embedding = "published"
        found.timestep_reason = "its name is that of the published weights' conversion, which were trained with it"


def _read_scheduler(config: Settings, found: Foreign) -> None:
    schedule = config.one_of("beta_schedule", SCHEDULES)
    found.prediction = PREDICTIONS[config.one_of("prediction_type", PREDICTIONS, "epsilon")]
    found.schedule = SCHEDULES[schedule]
    _require(config, CHAIN | (LINEAR if schedule == "linear" else {}), "a chain that this code does not know")


def _require(config: Settings, expected: dict[str, Any], fault: str) -> None:
    for key, value in expected.items():
        if (found := config.values.get(key, value)) != value:
            told = shorten(repr(found), 40, placeholder="...")
            raise ValueError(f"{config.place}{key} is {told} and must be {value!r}: {fault}")


def _card_license(folder: Path) -> str | None:
    """`license:` in a model card's front matter; the Creative Commons' ones in SPDX's capitals."""
    card = folder / "README.md"
    told = card.is_file() and re.match(
        r"---\s.*?^license:\s*([\w.-]+)\s*$.*?^---", card.read_text(errors="replace"), re.M | re.S
    )
    return (told[1].upper() if told[1].lower().startswith("cc") else told[1]) if told else None
