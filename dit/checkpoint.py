"""Checkpoints: the self-contained model folder that people use. (What a training goes on from is in states.py.)

Everything is safetensors and JSON: nothing is pickled, nothing runs code when it is opened.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dit.model import DiT, ModelConfig
from dit.paths import replacing, write_json

FORMAT = "dit-checkpoint/1"
WEIGHTS, CONDITIONS = "model.safetensors", "conditions.safetensors"
SHAPE = ("input_size", "in_channels", "num_classes", "condition_shape")  # of the data, beside the network's own config


@dataclass
class Checkpoint:
    """A network in eval mode and its config.json, which tells all that is needed to use it.

    `conditions` are examples for a network that is conditioned on embeddings, of images it was not trained on:
    `features` (n, L, E) and `label` (n,).
    """

    model: DiT
    config: dict[str, Any]
    conditions: dict[str, Tensor] | None = None

    @property
    def license(self) -> str | None:
        """The licence of the weights, as an SPDX name; None where nobody told."""
        return self.config.get("license")


def network_config(network: DiT) -> dict[str, Any]:
    """What `build` needs to make this network again."""
    return asdict(network.config) | {name: getattr(network, name) for name in SHAPE}


def build(config: dict[str, Any]) -> DiT:
    """A network of the shape that `network_config` told. What an earlier version did not tell has its default."""
    sizes = ModelConfig(**{k: v for k, v in config.items() if k not in SHAPE})
    told = {name: config[name] for name in SHAPE[:3]}
    condition_shape = config.get("condition_shape")
    return DiT(sizes, **told, condition_shape=tuple(condition_shape) if condition_shape else None)


def save_checkpoint(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    """Write model.safetensors and config.json into an existing folder."""
    save_tensors(folder / WEIGHTS, tensors)
    write_json(folder / "config.json", {"format": FORMAT, **config})


def load_checkpoint(folder: Path | str, device: torch.device | str = "cpu") -> Checkpoint:
    """Open a checkpoint folder. Raises ValueError where it is not one, or is torn."""
    folder = Path(folder)
    config = read_config(folder)
    tensors = load_tensors(folder / WEIGHTS)
    try:
        network = build(config["model"])
        network.load_state_dict(tensors)
    except (KeyError, TypeError, RuntimeError) as error:
        raise ValueError(
            f"{folder}: config.json and model.safetensors do not fit together ({_first_line(error)})"
        ) from None
    conditions = load_tensors(folder / CONDITIONS) if (folder / CONDITIONS).is_file() else None
    return Checkpoint(network.eval().requires_grad_(False).to(device), config, conditions)


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a checkpoint folder. Raises ValueError where it is not one, or of another format."""
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        raise ValueError(f"{folder} is not a checkpoint: config.json is missing or torn") from None
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        told = config.get("format") if isinstance(config, dict) else None
        raise ValueError(f"{folder}/config.json is of format {told!r}, this code reads {FORMAT!r}")
    return config


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file, atomically, from wherever the tensors live."""
    from safetensors.torch import save_file

    on_cpu = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    with replacing(path) as unfinished:
        save_file(on_cpu, unfinished)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file. Raises ValueError where it is missing or torn."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (FileNotFoundError, SafetensorError) as error:
        raise ValueError(f"{path} is missing or torn ({error})") from None


def power_file(sigma_rel: float, step: int) -> str:
    """The file of a power-function average of this relative width: power-0.05-00000400.safetensors."""
    return f"power-{sigma_rel}-{step:08d}.safetensors"
