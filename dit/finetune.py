"""Beginning a training with another model's weights: fitting them into the new network.

What depends on the new images (which classes there are, how large a picture is) is made anew and said; what makes the
two another network is refused. Where nothing is trained after (train.max_steps 0), whatever would have to be learned
anew is refused too.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dit.addresses import registered
from dit.checkpoint import WEIGHTS, load_tensors
from dit.initial import Initial, open_config, outlines
from dit.model import DiT, ModelConfig
from dit.objective import ObjectiveConfig, objective_from
from dit.paths import Paths

CONDITION = "y_embedder."
TABLE, POSITIONS = "y_embedder.embedding_table.weight", "pos_embed"
OUTPUT = ("final_layer.linear.weight", "final_layer.linear.bias")
UNTRAINED = "train.max_steps: 0 trains nothing, and"
DRAWN_BY = {"transport": ("path", "prediction"), "diffusion": ("schedule", "prediction", "variance")}
UNSEEN = ("num_heads", "block", "timestep_embedding", "norm", "mlp", "rotary", "qk_norm")  # what shapes need not tell


def require_fit(
    spec: str,
    root: Path,
    model: ModelConfig,
    objective: ObjectiveConfig,
    *,
    input_size: int | None,
    in_channels: int | None,
    num_classes: int | None = None,
    trained: bool,
) -> None:
    """Raise ValueError where a folder's weights cannot begin this training, as far as it shows without their numbers
    and without the images: what is not known yet (None) is taken as the weights have it.

    Of a registered model only the address is looked at.
    """
    if registered(spec):
        return
    folder = Paths(root).given(spec)
    config, tensors = open_config(spec, folder), outlines(folder / WEIGHTS)
    if not trained:
        _require_same_objective(config, objective)
    theirs, embedded = config.get("model") or {}, tensors.get("x_embedder.proj.weight")
    known = theirs.get("num_classes")
    if not trained and model.condition == "classes" and None not in (known, num_classes) and known != num_classes:
        raise ValueError(
            f"train.max_steps: 0 trains nothing, and the weights have {known} classes, not {num_classes}: "
            "give data.source and data.num_classes those, or let it train"
        )
    patch = model.resolved().patch_size
    side = input_size or theirs.get("input_size") or patch
    channels = in_channels or (embedded.shape[1] if embedded is not None and embedded.dim() == 4 else 1)
    with torch.device("meta"):
        network = DiT(
            model,
            input_size=-(-side // patch) * patch,
            in_channels=channels,
            num_classes=theirs.get("num_classes") or 0,
            condition_shape=theirs.get("condition_shape") or (1, 1),
        )
    adopt(network, tensors, config)


def adopt(
    network: DiT,
    tensors: dict[str, Tensor],
    config: dict[str, Any],
    classes: Sequence[str] | None = None,
    *,
    trained: bool = True,
) -> list[str]:
    """Load weights, which `config` (a checkpoint's config.json) explains, into `network`; return what there is to say.

    - The position table is the network's own: it is computed for its size of image.
    - The embedder of the condition begins anew where the number of classes, or the kind of condition, is another. Of as
      many classes, whose names (`classes`, and the config's) are both known, each takes the row of its name; what has
      none begins anew, and the row of "no class" is kept.
    - A network that also predicts variances gives the outputs that one without needs, and the other way round gets
      outputs of 0 for them.

    Raises ValueError that names the setting or the tensor where the two are not the same network otherwise, or where
    something begins anew and is not `trained` after; then `network` is as it was.
    """
    _require_same_design(network, config.get("model") or {})
    own = network.state_dict()
    given = {name: tensor.to(torch.float32) for name, tensor in tensors.items() if name != POSITIONS}
    said = _settle_positions(own, tensors, trained)
    said += _settle_condition(own, given, network, config, classes, trained)
    said += _settle_variance(own, given, network, trained)
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


def begin_with(
    network: DiT, initial: Initial, objective: ObjectiveConfig, index: dict[str, Any], *, trained: bool = True
) -> list[str]:
    """`adopt` from an opened folder, for latents that `index` tells of; what differs in the way of training is said
    too, and refused where nothing is `trained`."""
    if not trained:
        _require_same_objective(initial.config, objective)
        _require_same_scale(initial.config, index["normalization"])
    said = adopt(network, load_tensors(initial.folder / WEIGHTS), initial.config, index["classes"], trained=trained)
    if not trained:
        return said
    theirs = initial.config.get("objective") and objective_from(initial.config["objective"])
    if theirs and {**theirs.active(), "alignment": None} != {**objective.active(), "alignment": None}:
        before, after = (f"{one.name} {_told(one)}" for one in (theirs, objective))
        said.append(f"the weights learned {before} and go on with {after}")
    if not _same_scale(initial.config, index["normalization"]):
        said.append("latents are scaled in another way here than those of the weights were (encode.normalization)")
    return said


def _require_same_objective(config: dict[str, Any], ours: ObjectiveConfig) -> None:
    if not config.get("objective"):
        return
    theirs = objective_from(config["objective"])
    before, after = ({"name": one.name, **one.active()[one.name]} for one in (theirs, ours))
    for key in ("name", *DRAWN_BY[theirs.name]):
        if before[key] != after[key]:
            setting = f"objective.{key}" if key == "name" else f"objective.{theirs.name}.{key}"
            learned = before[key]
            raise ValueError(f"{UNTRAINED} the weights learned {learned}, not {after[key]}: set {setting} to {learned}")


def _same_scale(config: dict[str, Any], normalization: dict[str, Any]) -> bool:
    latents = config.get("latents") or {}
    pairs = [(latents.get(key), normalization[key]) for key in ("mean", "std")]
    return any(theirs is None for theirs, _ in pairs) or all(
        len(theirs) == len(ours)
        and all(math.isclose(a, b, rel_tol=1e-4, abs_tol=1e-6) for a, b in zip(theirs, ours, strict=True))
        for theirs, ours in pairs
    )


def _require_same_scale(config: dict[str, Any], normalization: dict[str, Any]) -> None:
    if not _same_scale(config, normalization):
        theirs, ours = (
            ", ".join(f"{key} " + " ".join(f"{value:.4g}" for value in told[key]) for key in ("mean", "std"))
            for told in (config["latents"], normalization)
        )
        raise ValueError(
            f"{UNTRAINED} the weights' latents have another scale ({theirs}) than these ({ours}): "
            "set encode.normalization and vae.pretrained as they were"
        )


def _require_same_design(network: DiT, model: dict[str, Any]) -> None:
    for name in UNSEEN:
        ours, theirs = getattr(network.config, name), model.get(name, getattr(ModelConfig, name, None))
        if theirs is not None and theirs != ours:
            raise ValueError(
                f"train.init_from: the weights are of a network with {name} {theirs}, not {ours}: set model.{name} to it"
            )


def _settle_positions(own: dict[str, Tensor], tensors: dict[str, Tensor], trained: bool) -> list[str]:
    theirs, ours = tensors.get(POSITIONS), own[POSITIONS]
    if theirs is None:
        return []
    if theirs.dim() != 3:
        raise ValueError(f"train.init_from: {POSITIONS} is {_size(theirs)} in the weights: it is no table of positions")
    if theirs.shape != ours.shape:
        return [f"the position table is computed anew: {ours.shape[-2]} tokens an image, not {theirs.shape[-2]}"]
    # Sines and cosines: what 16 bits leave of them is off by 0.004.
    if theirs.is_meta or torch.allclose(theirs.to(ours), ours, rtol=0, atol=0.01):
        return []
    if not trained:
        raise ValueError(
            f"{UNTRAINED} the weights' position table is none of sines and cosines, which `model` has: train further"
        )
    return ["the weights' position table is none of sines and cosines: it is replaced by the computed one"]


def _settle_condition(
    own: dict[str, Tensor],
    given: dict[str, Tensor],
    network: DiT,
    config: dict[str, Any],
    classes: Sequence[str] | None,
    trained: bool,
) -> list[str]:
    ours = {name: tensor for name, tensor in own.items() if name.startswith(CONDITION)}
    theirs = {name: given.pop(name) for name in list(given) if name.startswith(CONDITION)}
    same = ours.keys() == theirs.keys() and all(ours[name].shape == theirs[name].shape for name in ours)
    given |= theirs if same else ours
    if TABLE not in ours or TABLE not in theirs:
        if not same and not trained:
            told = (config.get("model") or {}).get("condition", "classes")
            raise ValueError(
                f"{UNTRAINED} the weights are conditioned on something else: set model.condition to {told}"
            )
        return [] if same else ["the condition's embedder begins anew: the weights were conditioned on something else"]
    if not same:
        rows = [f"{len(table[TABLE]) - 1}" for table in (theirs, ours)]
        said = f"the label table begins anew: {rows[1]} classes, not the {rows[0]} of the weights"
        if not trained:
            raise ValueError(f"{UNTRAINED} {said}: set data.source and data.num_classes to those, or train")
        return [said]
    if network.num_classes == 0:
        return []
    before, now = config.get("classes"), classes
    if not before or not now or len(before) != len(now) or not _named(before, now):
        names = f" ({_some(before)})" if before else ""
        return [f"the label table is kept: as many classes, {network.num_classes}, taken in the weights' order{names}"]
    return _rows_by_name(own, given, list(before), list(now), trained)


def _named(before: Sequence[str], now: Sequence[str]) -> bool:
    """Whether both lists are names, or numbers that mean the same classes; else they are only places in an order."""
    places = [str(i) for i in range(len(now))]
    return set(before) == set(now) or places not in (list(before), list(now))


def _rows_by_name(
    own: dict[str, Tensor], given: dict[str, Tensor], before: list[str], now: list[str], trained: bool
) -> list[str]:
    if before == now:
        return [f"the label table is kept: the same {len(now)} classes"]
    known = {name: row for row, name in enumerate(before)}
    anew = [name for name in now if name not in known]
    if anew and not trained:
        raise ValueError(
            f"{UNTRAINED} the weights do not know the classes {_some(anew)}, but {_some(before)}: "
            "name data.source's folders as theirs, or train"
        )
    rows = [given[TABLE][known[name]] if name in known else own[TABLE][i] for i, name in enumerate(now)]
    given[TABLE] = torch.stack([*rows, given[TABLE][-1]])
    if not anew:
        return ["the label table is kept: the same classes, brought into this order by their names"]
    kept = f"{len(now) - len(anew)} of {len(now)} classes have a row of their name"
    gone = [name for name in before if name not in now]
    return [f"the label table: {kept}; {_some(anew)} begin anew, {_some(gone)} are left out"]


def _settle_variance(own: dict[str, Tensor], given: dict[str, Tensor], network: DiT, trained: bool) -> list[str]:
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
            if not trained:
                raise ValueError(
                    f"{UNTRAINED} the weights have no outputs for variances: set model.learn_sigma to false"
                )
            rows = given[name].unflatten(0, (patch, C))
            given[name] = torch.cat([rows, torch.zeros_like(rows)], dim=1).flatten(0, 1)
            said = "the outputs for variances begin at 0: the weights have none (model.learn_sigma)"
    return [said] if said else []


def _some(names: Sequence[str]) -> str:
    return ", ".join(map(str, names[:3])) + (" ..." if len(names) > 3 else "")


def _told(objective: ObjectiveConfig) -> str:
    return " ".join(str(value) for value in objective.active()[objective.name].values() if isinstance(value, str))


def _size(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape))
