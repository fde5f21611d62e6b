"""The doors for other people's files: tensors are plain and have names, settings have the type that is expected.

Nothing of theirs is run. What a file says wrongly is a ValueError of one line, which names the file and the key.
"""

import argparse
import json
import pickle
import re
import textwrap
import warnings
import zipfile
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dit.checkpoint import load_tensors

WORDS = {
    int: "a whole number",
    float: "a number",
    str: "a line of text",
    dict: "an object",
    list: "a list with members",
}
REQUIRED = object()
WRAPPED = re.compile(r"^(module\.|_orig_mod\.)+")  # names of a network that was trained in parallel, or compiled


@dataclass(frozen=True)
class Settings:
    """What a file tells, and the `place` with which every error begins: `file: `, or `file: args.`"""

    place: str = ""
    values: dict[Any, Any] = field(default_factory=dict)

    def get(self, key: Any, kind: type, default: Any = REQUIRED, *, above: float | None = None) -> Any:
        """The value, if it is a `kind`. A missing one is the default, and so is null where the default is None."""
        value = self.values.get(key, default)
        if value is None and default is None:
            return None
        if value is REQUIRED:
            raise ValueError(f"{self.place}{key} is missing")
        if not _is(value, kind) or (above is not None and not value > above):
            wanted = WORDS[kind] + ("" if above is None else f" above {above}")
            got = textwrap.shorten(repr(value), 60, placeholder="...")
            raise ValueError(f"{self.place}{key} must be {wanted}, got {got}")
        return value

    def one_of(self, key: str, choices: Collection[str], default: Any = REQUIRED) -> str:
        """The value, if it is among `choices`."""
        value = self.get(key, str, default)
        if value not in choices:
            raise ValueError(f"{self.place}{key} must be one of {', '.join(choices)}, got {value!r}")
        return value

    def each(self, key: str, kind: type, *, above: float | None = None) -> list[Any]:
        """A list, if all its members are of a kind; at least one."""
        members = Settings(f"{self.place}{key}.", dict(enumerate(self.get(key, list))))
        return [members.get(i, kind, above=above) for i in members.values]

    def within(self, key: str, default: Any = REQUIRED) -> "Settings":
        """The settings in a setting."""
        return Settings(f"{self.place}{key}.", self.get(key, dict, default))


@dataclass
class Foreign:
    """Somebody's weights under our names, and what their files tell; None where they do not tell it."""

    tensors: dict[str, Tensor]
    format: str  # "published" or "diffusers"
    files: list[Path]  # the first of them holds the weights
    args: Settings = Settings()  # the training script's, of a published training checkpoint
    weights: str = "ema"
    num_heads: int | None = None
    input_size: int | None = None  # latents along one side
    num_classes: int | None = None
    classes: list[str] | None = None
    timestep_embedding: str = "published"
    timestep_reason: str | None = None
    prediction: str = "epsilon"
    schedule: str = "linear"
    license: str | None = None
    own: bool = False  # an export of ours that tells no licence: the weights are their trainer's own
    vae: Path | None = None
    said: list[str] = field(default_factory=list)  # what a person should know about it

    def sides(self, name: str, count: int) -> tuple[int, ...]:
        """The shape of a tensor. Raises ValueError where it is missing, empty, or has not `count` sides."""
        if name not in self.tensors:
            raise ValueError(
                f"{self.files[0]} is no DiT or SiT: {name} is missing (it holds {len(self.tensors)} tensors)"
            )
        shape = tuple(self.tensors[name].shape)
        if len(shape) != count or 0 in shape:
            raise ValueError(f"{self.files[0]} is no DiT or SiT: {name} is {shape}, and must have {count} sides")
        return shape


def read_json(file: Path) -> Settings:
    """A JSON file of settings. Raises ValueError where it is missing, torn or something else."""
    try:
        told = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError):
        raise ValueError(f"{file} is missing or torn") from None
    if not isinstance(told, dict):
        raise ValueError(f"{file} holds no settings")
    return Settings(f"{file}: ", told)


def plain(content: Any, file: Path) -> dict[str, Tensor]:
    """Float32 tensors by their names, without what a parallel training puts before them. Raises ValueError."""
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{file} holds no state dict (tensors by name, or such under 'ema' or 'model')")
    tensors: dict[str, Tensor] = {}
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise ValueError(f"{file} holds no state dict: {key!r} is no tensor with a name ({type(value).__name__})")
        dense = value.layout == torch.strided and not value.is_nested and value.device.type != "meta"
        if not dense or not value.is_floating_point():
            kind = f"{value.dtype}, {value.layout}, on {value.device}"
            raise ValueError(f"{file}: {key} is no plain tensor of floats ({kind}): save it again as one")
        name = WRAPPED.sub("", key)
        if name in tensors:
            raise ValueError(f"{file}: {name} is there twice, with and without a wrapper's name before it")
        tensors[name] = value.detach().float()
    return tensors


def unpickle(file: Path) -> Any:
    """torch.load of tensors, plain values and argparse.Namespace. Anything else in the file is refused unrun."""
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.simplefilter("ignore")  # on pickles of another protocol: they are read, or refused
            return torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as error:  # each of a broken file's many ways to be broken has an error of its own
        forbidden = re.search(r"GLOBAL ([\w.]+)", str(error))
        if isinstance(error, pickle.UnpicklingError) and forbidden:
            way_out = "; if it is yours, save it again with Python's numbers" if "numpy" in forbidden[1] else ""
            raise ValueError(
                f"{file} holds more than tensors and plain values ({forbidden[1]}): refused, "
                f"since opening that could run somebody's code{way_out}"
            ) from None
        raise ValueError(f"{file} is torn, or no checkpoint of torch ({type(error).__name__})") from None


def read_published(file: Path) -> Foreign:
    """A bare state dict, or {"model", "ema", "opt", "args"}, of which the averaged weights are taken."""
    content = load_tensors(file) if file.suffix == ".safetensors" else unpickle(file)
    said: list[str] = []
    args, weights = {}, "ema"  # the published files are averages, by what their authors say
    kept = content if isinstance(content, dict) else {}
    if parts := [key for key in ("ema", "model") if isinstance(kept.get(key), dict) and kept[key]]:
        content, weights = kept[parts[0]], "ema" if parts[0] == "ema" else "raw"
        told = kept.get("args")
        args = vars(told) if isinstance(told, argparse.Namespace) else told if isinstance(told, dict) else {}
        if weights == "raw":
            said.append("it holds no averaged weights (ema): the trained ones are taken")
    found = Foreign(plain(content, file), "published", [file], Settings(f"{file}: args.", args), weights, said=said)
    found.sides("x_embedder.proj.weight", 4)
    found.num_classes = found.args.get("num_classes", int, None)
    return found


def _is(value: Any, kind: type) -> bool:
    if isinstance(value, bool):
        return False
    if kind is float:
        return isinstance(value, int | float) and -1e300 < value < 1e300  # not infinite, not NaN
    if kind is str:
        return isinstance(value, str) and bool(value.strip()) and len(value.splitlines()) == 1
    return isinstance(value, kind) and (kind is not list or bool(value))
