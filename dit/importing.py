"""`dit import`: somebody's weights become a checkpoint folder of ours, which explains itself and never runs their code.

What the network is, is read from its tensors; what they cannot tell (heads, objective, licence, classes' names) comes
from the files beside them, from the person, or from a rule that the output states.
"""

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from dit import interop
from dit.checkpoint import FORMAT, network_config, save_checkpoint
from dit.diffusion import DiffusionConfig
from dit.interop import Foreign
from dit.model import SIZES, DiT, ModelConfig
from dit.objective import ObjectiveConfig
from dit.paths import file_sha256
from dit.transport import TransportConfig
from dit.vae import digest_of

SCALE = 0.18215  # what the published models multiply raw latents by
FACTOR = 8  # pixels per latent along one side, of the autoencoder that they were trained on
PUBLISHED = "CC-BY-NC-4.0"


@dataclass(frozen=True)
class Wanted:
    """What a person says about the weights, or wants of them; None: as the files tell, or by rule."""

    license: str | None = None
    objective: str | None = None
    num_heads: int | None = None
    num_classes: int | None = None
    image_size: int | None = None
    factor: int | None = None
    timestep_embedding: str | None = None


def import_weights(source: Path, output: Path, wanted: Wanted = Wanted()) -> list[str]:
    """Write the checkpoint folder `output`, whole or not at all. Returns what a person should know about it.

    Raises ValueError with one line, and writes nothing, where `source` cannot be read safely or is no DiT or SiT.
    """
    interop.require_place(output, "config.json", FORMAT)
    found = interop.read(source)
    sizes, num_heads = sizes_of(found, wanted)
    objective = objective_of(found, source, wanted)
    source_classes, classes = classes_of(found, wanted)
    factor, autoencoder, scale, shift = latents_of(found, wanted)
    side = input_size(found, wanted, factor, sizes.patch_size)
    network = DiT(sizes, input_size=side, in_channels=_channels(found), num_classes=len(classes))
    said = [f"{num_heads}; {objective.name} objective", *found.said]
    said += fill(network, found, source_classes, source)
    weights_license, why = license_of(found, source, objective.name, wanted)
    said.append(f"licence {weights_license} ({why})")
    config = {
        "model": network_config(network),
        "objective": asdict(objective),
        "latents": {"digest": None, "autoencoder": autoencoder, "mean": shift, "std": scale},
        "classes": classes,
        "image_size": side * factor,
        "step": 0,  # of a training here
        "weights": found.weights,
        "license": weights_license,
        "source": {"file": source.name, "sha256": file_sha256(found.files[0]), "format": found.format},
    }
    with interop.beside(output) as folder:
        save_checkpoint(folder, network.state_dict(), config)
    return said


def objective_of(found: Foreign, source: Path, wanted: Wanted) -> ObjectiveConfig:
    """diffusion for DiT, transport for SiT: as the person says, the training arguments, or else the file's name."""
    args = found.args
    told = " ".join((str(args.get("model", "")), source.resolve().name, source.name))
    name = wanted.objective
    if name is None and found.format == "diffusers":
        name = "diffusion"
    if name is None and ("path_type" in args or re.search(r"(?<![a-z])sit(?![a-z])", told, re.I)):
        name = "transport"
    if name is None and re.search(r"(?<![a-z])dit(?![a-z])", told, re.I):
        name = "diffusion"
    if name is None:
        raise ValueError(f"{source} does not tell whether it is a DiT or a SiT: say --objective diffusion or transport")
    if name == "diffusion":
        variance = "learned_range" if _learn_sigma(found) else "fixed_small"
        return ObjectiveConfig(name, diffusion=DiffusionConfig(found.schedule, found.prediction, variance))
    told = {"path": args.get("path_type", "linear"), "prediction": args.get("prediction", "velocity")}
    told["weighting"] = args.get("loss_weight") or "uniform"
    told = {key: str(value).lower() for key, value in told.items()}
    if told["prediction"] == "velocity":
        told["weighting"] = "uniform"  # which that script did not look at either
    return ObjectiveConfig(name, transport=TransportConfig(**told))


def sizes_of(found: Foreign, wanted: Wanted) -> tuple[ModelConfig, str]:
    """The network's sizes, read from its tensors, and a sentence on them: heads leave no trace in a tensor's shape."""
    tensors = found.tensors
    try:
        hidden_size, _, patch_size, _ = tensors["x_embedder.proj.weight"].shape
        mlp_ratio = len(tensors["blocks.0.mlp.fc1.weight"]) / hidden_size
        depth = 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("blocks."))
        learn_sigma = _learn_sigma(found)
    except (KeyError, ValueError):
        told = "x_embedder.proj, blocks.0.mlp.fc1 or final_layer.linear is missing or of another shape"
        raise ValueError(f"{found.files[0]} is no DiT or SiT: {told}") from None
    heads, why = wanted.num_heads or found.num_heads, "as said" if wanted.num_heads else "by its config.json"
    if heads is None:
        heads = next((heads for _, hidden, heads in SIZES.values() if hidden == hidden_size), None)
        why = "as the published network of this width has; --num-heads where that is wrong"
    if heads is None and (width := next((w for w in (64, 72) if hidden_size % w == 0), None)):
        heads, why = hidden_size // width, f"a guess: {width} channels each; --num-heads where that is wrong"
    if heads is None:
        raise ValueError(f"{found.files[0]}: {hidden_size} channels are of no published network: say --num-heads")
    convention = wanted.timestep_embedding or found.timestep_embedding
    sizes = ModelConfig(
        "custom", patch_size, hidden_size, depth, heads, mlp_ratio, learn_sigma, timestep_embedding=convention
    )
    return sizes, f"{depth} blocks of {hidden_size} channels, patch {patch_size}, {heads} heads ({why})"


def classes_of(found: Foreign, wanted: Wanted) -> tuple[int, list[str]]:
    """The number of classes that the weights know, and the names of those that are wanted."""
    table = found.tensors.get("y_embedder.embedding_table.weight")
    if table is None or table.ndim != 2:
        raise ValueError(f"{found.files[0]} is no DiT or SiT: y_embedder.embedding_table.weight is missing")
    # A table without a row for "no class" says so only through the number of classes.
    known = found.num_classes if found.num_classes is not None else len(table) - (wanted.num_classes != len(table))
    if not 0 <= known <= len(table):
        raise ValueError(f"{found.files[0]}: {known} classes do not fit a label table of {len(table)} rows")
    count = known if wanted.num_classes is None else wanted.num_classes
    names = found.classes if found.classes and len(found.classes) == count else [str(i) for i in range(count)]
    return known, names


def latents_of(found: Foreign, wanted: Wanted) -> tuple[int, str | None, list[float], list[float]]:
    """Pixels per latent, the autoencoder's digest, and raw latents' scale and shift: raw = shift + scale latent."""
    scaling_factor, shift, factor, digest = SCALE, 0.0, FACTOR, None
    if found.vae is not None:
        try:
            told = json.loads((found.vae / "config.json").read_text())
            scaling_factor, shift = told["scaling_factor"], told.get("shift_factor") or 0.0
            factor, digest = 2 ** (len(told["block_out_channels"]) - 1), digest_of(found.vae)
        except (KeyError, TypeError, json.JSONDecodeError, OSError):
            found.said.append(f"{found.vae} is no whole autoencoder: passed over")
    elif wanted.factor is None:
        found.said.append(f"latents: {FACTOR} pixels each (--factor), multiplied by {SCALE}; of an unknown autoencoder")
    channels = _channels(found)
    return wanted.factor or factor, digest, [1 / scaling_factor] * channels, [shift] * channels


def input_size(found: Foreign, wanted: Wanted, factor: int, patch_size: int) -> int:
    """Latents along one side: of the wanted image size, else as the weights were trained."""
    table = found.tensors.get("pos_embed")
    own = found.input_size or (table is not None and round(table.shape[-2] ** 0.5) * patch_size) or 0
    own = own or int(found.args.get("image_size", 256)) // factor
    size = wanted.image_size or own * factor
    if size % (factor * patch_size):
        raise ValueError(f"--image-size {size} is no multiple of {factor * patch_size}, the pixels of a token")
    if size != own * factor:
        found.said.append(f"{size} pixels, trained at {own * factor}: its position table is computed anew")
    return size // factor


def fill(network: DiT, found: Foreign, source_classes: int, source: Path) -> list[str]:
    """Put the weights into the network. Returns what had to change. Raises ValueError where they do not fit."""
    said, tensors, state = [], dict(found.tensors), network.state_dict()
    name = "y_embedder.embedding_table.weight"
    table = tensors[name]
    if network.num_classes != source_classes:
        said.append(
            f"the label table begins anew: {network.num_classes} classes, not the {source_classes} of the weights"
        )
        tensors[name] = state[name]
    elif len(table) == source_classes:
        said.append("no row for 'no class' there: the mean of the others stands for it; train before guiding")
        tensors[name] = torch.cat([table, table.mean(dim=0, keepdim=True)])
    else:
        tensors[name] = torch.cat([table[:source_classes], table[-1:]])
    if tensors.get("pos_embed", table).shape != state["pos_embed"].shape:
        tensors["pos_embed"] = state["pos_embed"]
    for name in sorted(tensors.keys() ^ state.keys()):
        raise ValueError(f"{source}: {name} is {'missing' if name in state else 'in no DiT or SiT'}")
    for name, tensor in tensors.items():
        if tensor.shape != state[name].shape:
            raise ValueError(f"{source}: {name} is {_shape(tensor)} and must be {_shape(state[name])}")
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{source}: {name} holds numbers that are not finite")
    network.load_state_dict(tensors)
    return said


def license_of(found: Foreign, source: Path, objective: str, wanted: Wanted) -> tuple[str, str]:
    """The weights' licence and where it is known from."""
    if wanted.license:
        return wanted.license, "as said"
    if found.license:
        return found.license, "as its folder says"
    named = interop.CONVERTED.search(f"{source.resolve().name} {source.name}")
    if named or (found.format == "published" and objective == "diffusion"):
        return PUBLISHED, "of the published DiT weights; --license where it is another"
    if found.format == "published":
        why = "SiT's repository says MIT, but its network descends from DiT's, which is CC-BY-NC-4.0; say --license"
        return "unknown", f"warning: {why}"
    return "unknown", "warning: its folder does not tell; say --license"


def _channels(found: Foreign) -> int:
    return found.tensors["x_embedder.proj.weight"].shape[1]


def _learn_sigma(found: Foreign) -> bool:
    _, channels, patch_size, _ = found.tensors["x_embedder.proj.weight"].shape
    rows = len(found.tensors["final_layer.linear.weight"])
    per_channel = rows / (patch_size**2 * channels)
    if per_channel not in (1, 2):
        raise ValueError("final_layer.linear.weight")
    return per_channel == 2


def _shape(tensor: Tensor) -> str:
    return " x ".join(map(str, tensor.shape))
