"""Beginning a training with another model's weights: opening them, and fitting them into the new network.

What depends on the new images (how many classes there are, how large a picture is) is made anew and said; what makes
the two another network is refused.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dit.checkpoint import WEIGHTS, load_tensors, read_config
from dit.model import DiT, ModelConfig
from dit.objective import ObjectiveConfig, objective_from
from dit.paths import file_sha256

REGISTERED = re.compile(r"models:/([^/@]+)(?:@([^/@]+)|/(\d+))")
CONDITION = "y_embedder."
TABLE, POSITIONS = "y_embedder.embedding_table.weight", "pos_embed"
OUTPUT = ("final_layer.linear.weight", "final_layer.linear.bias")
UNSEEN = ("num_heads", "block", "timestep_embedding", "norm", "mlp", "rotary", "qk_norm")  # what shapes need not tell


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
    """The weights that `train.init_from` names: a checkpoint folder (relative to `root`), models:/NAME@ALIAS or
    models:/NAME/VERSION, for which `download(name, alias or version)` gives the folder.

    They are opened whenever a training starts or goes on, since its name rests on their digest.
    Raises ValueError where there is no checkpoint.
    """
    if spec.startswith("models:"):
        if not (match := REGISTERED.fullmatch(spec)):
            raise ValueError(f"train.init_from: {spec!r} is neither models:/NAME@ALIAS nor models:/NAME/VERSION")
        name, alias, number = match.groups()
        folder = download(name, alias or int(number))
    else:
        folder = root / Path(spec).expanduser()
    if not (folder / WEIGHTS).is_file():
        raise ValueError(
            f"train.init_from: {spec!r} is no folder with {WEIGHTS} and config.json: "
            "name one (`dit import` makes it of other formats), or models:/NAME@ALIAS"
        )
    try:
        return Initial(spec, folder, read_config(folder), file_sha256(folder / WEIGHTS))
    except ValueError as error:
        raise ValueError(f"train.init_from: {error}") from None


def require_latents(initial: Initial, index: dict[str, Any]) -> None:
    """Raise ValueError where the weights were trained on another autoencoder's latents, as far as both are known."""
    theirs, ours = (initial.config.get("latents") or {}).get("autoencoder"), index.get("autoencoder")
    if theirs and ours and theirs != ours:
        raise ValueError(
            f"train.init_from: these weights belong to the autoencoder {theirs[:12]}, the latents to {ours[:12]}: "
            "set vae.pretrained to the autoencoder that the weights were trained with"
        )


def adopt(network: DiT, tensors: dict[str, Tensor], config: dict[str, Any]) -> list[str]:
    """Load weights, which `config` (a checkpoint's config.json) explains, into `network`; return what there is to say.

    - The position table is the network's own: it is computed for its size of image.
    - The embedder of the condition begins anew where the number of classes, or the kind of condition, is another.
    - A network that also predicts variances gives the outputs that one without needs, and the other way round gets
      outputs of 0 for them.

    Raises ValueError that names the setting or the tensor where the two are not the same network otherwise; then
    `network` is as it was.
    """
    _require_same_design(network, config.get("model") or {})
    own, said = network.state_dict(), []
    given = {name: tensor.to(torch.float32) for name, tensor in tensors.items() if name != POSITIONS}
    if POSITIONS in tensors and tensors[POSITIONS].shape != own[POSITIONS].shape:
        theirs, ours = tensors[POSITIONS].shape[-2], own[POSITIONS].shape[-2]
        said.append(f"the position table is computed anew: {ours} tokens an image, not {theirs}")
    said += _settle_condition(own, given, network, config)
    said += _settle_variance(own, given, network)
    for name in sorted(own.keys() - given.keys() - {POSITIONS}):
        raise ValueError(f"train.init_from: the weights have no {name}: they are another network's than `model` says")
    for name, tensor in given.items():
        if name not in own:
            raise ValueError(
                f"train.init_from: `model` has no {name}, which the weights hold: they are another network's"
            )
        if tensor.shape != own[name].shape:
            sizes = f"{_size(tensor)} in the weights, {_size(own[name])} here"
            raise ValueError(f"train.init_from: {name} is {sizes}: set `model` to the network that the weights are of")
    network.load_state_dict(given | {POSITIONS: own[POSITIONS]})
    return said


def begin_with(network: DiT, initial: Initial, objective: ObjectiveConfig, normalization: dict[str, Any]) -> list[str]:
    """`adopt` from an opened folder; what differs in the way of training is said too, though it hinders nothing."""
    said = adopt(network, load_tensors(initial.folder / WEIGHTS), initial.config)
    if (initial.config.get("objective") or {}).get("name"):
        theirs, ours = objective_from(initial.config["objective"]), objective
        if {**theirs.active(), "alignment": None} != {**ours.active(), "alignment": None}:
            before, after = (f"{one.name} {_told(one)}" for one in (theirs, ours))
            said.append(f"the weights learned {before} and go on with {after}")
    latents = initial.config.get("latents") or {}
    before, after = ([told.get(key) for key in ("mean", "std")] for told in (latents, normalization))
    if None not in before and before != after:
        said.append("latents are scaled in another way here than those of the weights were (encode.normalization)")
    return said


def _require_same_design(network: DiT, model: dict[str, Any]) -> None:
    for name in UNSEEN:
        ours, theirs = getattr(network.config, name), model.get(name, getattr(ModelConfig, name, None))
        if theirs is not None and theirs != ours:
            raise ValueError(
                f"train.init_from: the weights are of a network with {name} {theirs}, not {ours}: set model.{name} to it"
            )


def _settle_condition(
    own: dict[str, Tensor], given: dict[str, Tensor], network: DiT, config: dict[str, Any]
) -> list[str]:
    ours = {name: tensor for name, tensor in own.items() if name.startswith(CONDITION)}
    theirs = {name: given.pop(name) for name in list(given) if name.startswith(CONDITION)}
    same = ours.keys() == theirs.keys() and all(ours[name].shape == theirs[name].shape for name in ours)
    given |= theirs if same else ours
    if TABLE not in ours or TABLE not in theirs:
        return [] if same else ["the condition's embedder begins anew: the weights were conditioned on something else"]
    if not same:
        rows = [f"{len(table[TABLE]) - 1}" for table in (theirs, ours)]
        return [f"the label table begins anew: {rows[1]} classes, not the {rows[0]} of the weights"]
    if network.num_classes == 0:
        return []
    names = config.get("classes")
    of_what = f" ({', '.join(map(str, names[:3]))} ...)" if names else ""
    return [f"the label table is kept: as many classes, {network.num_classes}, taken in the weights' order{of_what}"]


def _settle_variance(own: dict[str, Tensor], given: dict[str, Tensor], network: DiT) -> list[str]:
    # Rows of the last layer are a patch's outputs: row, column, channel, the channel fastest.
    C, said = network.in_channels, ""
    for name in OUTPUT:
        patch = network.patch_size**2
        if name not in given or given[name].shape[1:] != own[name].shape[1:]:
            return []
        theirs, ours = len(given[name]) / patch, len(own[name]) // patch
        if (theirs, ours) == (2 * C, C):
            given[name] = given[name].unflatten(0, (patch, 2 * C))[:, :C].flatten(0, 1).clone()
            said = "the outputs for variances are left out: model.learn_sigma is false"
        elif (theirs, ours) == (C, 2 * C):
            rows = given[name].unflatten(0, (patch, C))
            given[name] = torch.cat([rows, torch.zeros_like(rows)], dim=1).flatten(0, 1)
            said = "the outputs for variances begin at 0: the weights have none (model.learn_sigma)"
    return [said] if said else []


def _told(objective: ObjectiveConfig) -> str:
    return " ".join(str(value) for value in objective.active()[objective.name].values() if isinstance(value, str))


def _size(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape))
