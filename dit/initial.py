"""Another model's weights, to begin a training with: finding them, and knowing that they are what they should be.

Their config.json is somebody's: what it says is looked at once, here, before anything rests on it.
"""

from collections.abc import Callable
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from dit.addresses import registered
from dit.checkpoint import SHAPE, WEIGHTS, read_config
from dit.model import ModelConfig
from dit.objective import ObjectiveConfig
from dit.paths import Paths, file_sha256


@dataclass(frozen=True)
class Initial:
    """Weights to begin with: their folder, its config.json, and the sha256 of model.safetensors."""

    spec: str
    folder: Path
    config: dict[str, Any]
    digest: str

    def told(self) -> dict[str, Any]:
        """What the trained model's config.json says of where it began."""
        return {"from": self.spec, "digest": self.digest, "license": self.config.get("license")}


def open_initial(spec: str, download: Callable[[str, str | int], Path], root: Path = Path(".")) -> Initial:
    """The weights that `train.init_from` names: a checkpoint folder (relative to the home of the checkout `root`),
    models:/NAME@ALIAS or models:/NAME/VERSION, for which `download(name, alias or version)` gives the folder.

    They are opened whenever a training starts or goes on, since its name rests on their digest.
    Raises ValueError where there is no checkpoint, or its config.json says what this code does not know.
    """
    if named := registered(spec):
        folder = download(*named)
    else:
        folder = Paths(root).given(spec)
    config = open_config(spec, folder)
    return Initial(spec, folder, config, file_sha256(folder / WEIGHTS))


def require_latents(initial: Initial, index: dict[str, Any]) -> None:
    """Raise ValueError where the weights were trained on another autoencoder's latents, as far as both are known."""
    theirs, ours = (initial.config.get("latents") or {}).get("autoencoder"), index.get("autoencoder")
    if theirs and ours and theirs != ours:
        raise ValueError(
            f"train.init_from: these weights belong to the autoencoder {theirs[:12]}, the latents to {ours[:12]}: "
            "set vae.pretrained to the autoencoder that the weights were trained with"
        )


def open_config(spec: str, folder: Path) -> dict[str, Any]:
    """config.json of the checkpoint folder that `spec` names. Raises ValueError where it is none, or not sound."""
    if not (folder / WEIGHTS).is_file():
        raise ValueError(
            f"train.init_from: {spec!r} is no folder with {WEIGHTS} and config.json: "
            "name one (`dit import` makes it of other formats), or models:/NAME@ALIAS"
        )
    try:
        config = read_config(folder)
        _require_sound(config, f"{folder}/config.json")
    except ValueError as error:
        raise ValueError(f"train.init_from: {str(error).splitlines()[0]}") from None
    return config


def outlines(file: Path) -> dict[str, Tensor]:
    """Tensors of the same names and shapes without numbers: the file's header is all that is read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as opened:
            shapes = {name: opened.get_slice(name).get_shape() for name in opened.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"train.init_from: {file} is torn ({error})") from None
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def _require_sound(config: dict[str, Any], source: str) -> None:
    """Raise ValueError where a part of somebody's config.json is not what this code reads out of it."""
    wanted = {"license": (str, "a text"), "classes": (list, "a list of names"), "latents": (dict, "settings")}
    wanted |= {"model": (dict, "settings"), "objective": (dict, "settings")}
    for name, (kind, what) in wanted.items():
        value = config.get(name)
        if value is not None and (not isinstance(value, kind) or value == ""):
            raise ValueError(f"{source}: {name} must be {what}, got {value!r}")
    if not all(isinstance(name, str) for name in config.get("classes") or []):
        raise ValueError(f"{source}: classes must be a list of names")
    latents = config.get("latents") or {}
    for name in ("mean", "std"):
        values = latents.get(name)
        if values is not None and not (isinstance(values, list) and all(isinstance(v, int | float) for v in values)):
            raise ValueError(f"{source}: latents.{name} must be a list of numbers, got {values!r}")
    if not isinstance(latents.get("autoencoder"), str | None):
        raise ValueError(f"{source}: latents.autoencoder must be a digest, got {latents['autoencoder']!r}")
    told = config.get("model") or {}
    for name in SHAPE:
        kind = list if name == "condition_shape" else int
        if told.get(name) is not None and not isinstance(told[name], kind):
            raise ValueError(f"{source}: model.{name} must be a size, got {told[name]!r}")
    model = {name: value for name, value in told.items() if name not in SHAPE}
    parts = [("model", model, ModelConfig)] if "name" in model else []
    if config.get("objective"):
        parts.append(("objective", config["objective"], ObjectiveConfig))
    for name, values, kind in parts:
        try:
            _settings(kind, values, name)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from None


def _settings(kind: type, values: Any, where: str) -> Any:
    """A dataclass of settings from somebody's dict. Raises ValueError that begins with the setting's path."""
    if not isinstance(values, dict):
        raise ValueError(f"{where} must be settings, got {values!r}")
    hints, told = get_type_hints(kind), {}
    for key, value in values.items():
        if key not in hints:
            raise ValueError(f"{where}.{key} is no setting of this code's")
        choices = get_args(hints[key]) if get_origin(hints[key]) is Literal else ()
        if choices and value not in choices:
            raise ValueError(f"{where}.{key} must be one of {', '.join(choices)}, got {value!r}")
        told[key] = _settings(hints[key], value, f"{where}.{key}") if is_dataclass(hints[key]) else value
    try:
        return kind(**told)
    except TypeError as error:
        raise ValueError(f"{where} is not whole, or of another kind ({error})") from None
    except ValueError as error:  # begins with the field's name
        raise ValueError(f"{where}.{error}") from None
