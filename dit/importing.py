"""`dit import`: somebody's weights become a checkpoint folder of ours, which explains itself and never runs their code.

What the network is, is read from its tensors; what they cannot tell (heads, objective, licence, classes' names) comes
from the files beside them, from the person, or from a rule that the output states.
"""

import math
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import get_args, get_type_hints

import torch
from torch import Tensor

from dit.checkpoint import WEIGHTS as MODEL
from dit.checkpoint import network_config, save_checkpoint
from dit.diffusers_folder import CONVERTED, read_diffusers
from dit.diffusion import DiffusionConfig
from dit.embedders import position_embedding
from dit.foreign import Foreign, Settings, read_json, read_published
from dit.interop import beside, require_place
from dit.model import SIZES, DiT, ModelConfig
from dit.objective import ObjectiveConfig
from dit.paths import file_sha256
from dit.transport import TransportConfig
from dit.vae import WEIGHTS as VAE
from dit.vae import digest_of

SCALE = 0.18215  # what the published models multiply raw latents by; diffusers' default, too
FACTOR = 8  # pixels per latent along one side, of the autoencoder that they were trained on
IMAGE_SIZE = 256  # of the published models, where nothing tells it
PUBLISHED = "CC-BY-NC-4.0"
POSITIONS, LABELS = "pos_embed", "y_embedder.embedding_table.weight"


@dataclass(frozen=True)
class Wanted:
    """What a person says about the weights, or wants of them; None: as the files tell, or by rule.

    Raises ValueError, in the words of the command's options.
    """

    license: str | None = None
    objective: str | None = None
    num_heads: int | None = None
    num_classes: int | None = None
    image_size: int | None = None
    factor: int | None = None
    timestep_embedding: str | None = None

    def __post_init__(self) -> None:
        told = Settings("--", {name.replace("_", "-"): value for name, value in vars(self).items()})
        told.get("license", str, None)
        for name in ("num-heads", "num-classes", "image-size", "factor"):
            told.get(name, int, None, above=0)
        if self.factor is not None and self.factor & (self.factor - 1):
            raise ValueError(f"--factor must be a power of two, as autoencoders have it, got {self.factor}")


def import_weights(source: Path, output: Path, wanted: Wanted = Wanted(), *, replace: bool = True) -> list[str]:
    """Write the checkpoint folder `output`, whole or not at all. Returns what a person should know about it.

    Raises ValueError with one line, and writes nothing, where `source` cannot be read safely or is no DiT or SiT, or
    `output` holds something else than an import; without `replace`, also than an import of the same weights.
    """
    require_place(output, "config.json", {"format", "source"}, {"config.json", MODEL})
    found = read(source)
    sha256 = file_sha256(found.files[0])
    if not replace and (output / "config.json").is_file():
        earlier = read_json(output / "config.json").within("source")
        if earlier.values.get("sha256") != sha256:
            raise ValueError(f"{output} is of other weights ({earlier.values.get('file')}): say a place with --output")
    sizes, num_heads = sizes_of(found, wanted)
    objective = objective_of(found, source, wanted)
    source_classes, classes = classes_of(found, wanted)
    factor, autoencoder, scale, shift = latents_of(found, wanted)
    side, size = input_size(found, wanted, factor, sizes)
    channels = found.sides("x_embedder.proj.weight", 4)[1]
    with torch.device("meta"):  # the shapes alone
        network = DiT(sizes, input_size=side, in_channels=channels, num_classes=len(classes))
    about = f"{len(classes) or 'no'} classes; {size}; latents {side} x {side} x {channels}"
    said = [f"{num_heads}; {objective.name} objective", about, *found.said]
    tensors = fitted(network, found, source_classes, said)
    weights_license, why = license_of(found, source, objective.name, wanted)
    said.append(f"licence {weights_license or 'none'} ({why})")
    config = {
        "model": network_config(network),
        "objective": asdict(objective),
        "latents": {"digest": None, "autoencoder": autoencoder, "mean": shift, "std": scale},
        "classes": classes,
        "image_size": side * factor,
        "step": 0,  # of a training here
        "weights": found.weights,
        "license": weights_license,
        "source": {"file": source.name, "sha256": sha256, "format": found.format},
    }
    with beside(output) as folder:
        save_checkpoint(folder, tensors, config)
    return said


def read(source: Path) -> Foreign:
    """Read a published file (.pt, .safetensors) or a diffusers folder. Raises ValueError with one line."""
    if source.is_dir():
        return read_diffusers(source)
    if not source.is_file():
        raise ValueError(f"{source} is not there: give a published .pt file, or a diffusers folder")
    return read_published(source)


def objective_of(found: Foreign, source: Path, wanted: Wanted) -> ObjectiveConfig:
    """diffusion for DiT, transport for SiT: as the person says, the training arguments, or else the file's name."""
    args = found.args
    told = " ".join((str(args.values.get("model", "")), source.resolve().name, source.name))
    name = wanted.objective
    if name is None and found.format == "diffusers":
        name = "diffusion"
    if name is None and ("path_type" in args.values or re.search(r"(?<![a-z])sit(?![a-z])", told, re.I)):
        name = "transport"
    if name is None and re.search(r"(?<![a-z])dit(?![a-z])", told, re.I):
        name = "diffusion"
    if name is None:
        raise ValueError(f"{source} does not tell whether it is a DiT or a SiT: say --objective diffusion or transport")
    if name == "diffusion":
        variance = "learned_range" if _learn_sigma(found) else "fixed_small"
        return ObjectiveConfig(name, diffusion=DiffusionConfig(found.schedule, found.prediction, variance))
    told = {}
    for theirs, ours in {"path_type": "path", "prediction": "prediction", "loss_weight": "weighting"}.items():
        value = (args.get(theirs, str, None) or getattr(TransportConfig(), ours)).lower()
        choices = get_args(get_type_hints(TransportConfig)[ours])
        told[ours] = Settings(args.place, {theirs: value}).one_of(theirs, choices)
    if told["prediction"] == "velocity":
        told["weighting"] = "uniform"  # which that script did not look at either
    return ObjectiveConfig(name, transport=TransportConfig(**told))


def sizes_of(found: Foreign, wanted: Wanted) -> tuple[ModelConfig, str]:
    """The network's sizes, read from its tensors, and a sentence on them: heads leave no trace in a tensor's shape."""
    hidden_size, _, patch_size, other = found.sides("x_embedder.proj.weight", 4)
    mlp_ratio = found.sides("blocks.0.mlp.fc1.weight", 2)[0] / hidden_size
    depth = len({told[1] for name in found.tensors if (told := re.match(r"blocks\.(\d+)\.", name))})
    if patch_size != other or hidden_size % 4:
        fault = f"patches of {patch_size} x {other}, {hidden_size} channels"
        raise ValueError(f"{found.files[0]} is no DiT or SiT: {fault}, by x_embedder.proj.weight")
    heads, why = wanted.num_heads or found.num_heads, "as said" if wanted.num_heads else "by its config.json"
    if heads is None:
        heads = next((heads for _, hidden, heads in SIZES.values() if hidden == hidden_size), None)
        why = "as the published network of this width has; --num-heads where that is wrong"
    if heads is None and (width := next((w for w in (64, 72) if hidden_size % w == 0), None)):
        heads, why = hidden_size // width, f"a guess: {width} channels each; --num-heads where that is wrong"
    if heads is None:
        raise ValueError(f"{found.files[0]}: {hidden_size} channels are of no published network: say --num-heads")
    if hidden_size % heads:
        raise ValueError(f"{found.files[0]}: its {hidden_size} channels cannot be {heads} heads ({why})")
    convention = wanted.timestep_embedding or found.timestep_embedding
    if found.timestep_reason and not wanted.timestep_embedding:
        found.said.append(f"timestep embedding: {convention}, since {found.timestep_reason} (--timestep-embedding)")
    sizes = ModelConfig(
        "custom", patch_size, hidden_size, depth, heads, mlp_ratio, _learn_sigma(found), timestep_embedding=convention
    )
    return sizes, f"{depth} blocks of {hidden_size} channels, patch {patch_size}, {heads} heads ({why})"


def classes_of(found: Foreign, wanted: Wanted) -> tuple[int, list[str]]:
    """The number of classes that the weights know, and the names of those that are wanted.

    A published table has a row for each class and, mostly, one for "no class": which it is, its files alone can say.
    """
    rows = found.sides(LABELS, 2)[0]
    known = rows - 1 if found.num_classes is None else found.num_classes
    if known > rows or (found.format == "published" and known < rows - 1):
        if wanted.num_classes is None:
            fault = f"{known} classes, as it says, do not fit a label table of {rows} rows"
            raise ValueError(f"{found.files[0]}: {fault}: say --num-classes")
        known = rows - 1
    count = known if wanted.num_classes is None else wanted.num_classes
    names = found.classes if found.classes and len(found.classes) == count else [str(i) for i in range(count)]
    return known, names


def latents_of(found: Foreign, wanted: Wanted) -> tuple[int, str | None, list[float], list[float]]:
    """Pixels per latent, the autoencoder's digest, and raw latents' scale and shift: raw = shift + scale latent."""
    channels = found.sides("x_embedder.proj.weight", 4)[1]
    if found.vae is not None and (found.vae / VAE).is_file():
        told = read_json(found.vae / "config.json")
        factor = 2 ** (len(told.each("block_out_channels", int, above=0)) - 1)
        scale = 1 / told.get("scaling_factor", float, SCALE, above=0)
        shift = told.get("shift_factor", float, None) or 0.0
        if (theirs := told.get("latent_channels", int, 4)) != channels:
            raise ValueError(f"{told.place}latent_channels is {theirs}, and the transformer takes {channels}")
        if wanted.factor not in (None, factor):
            raise ValueError(f"--factor {wanted.factor} is not that of the folder's own autoencoder, {factor}")
        return factor, digest_of(found.vae), [scale] * channels, [shift] * channels
    if found.vae is not None:
        found.said.append(f"{found.vae} holds no {VAE}: passed over, with its config.json")
    factor = wanted.factor or FACTOR
    found.said.append(f"latents: {factor} pixels each (--factor), multiplied by {SCALE}; of an unknown autoencoder")
    return factor, None, [1 / SCALE] * channels, [0.0] * channels


def input_size(found: Foreign, wanted: Wanted, factor: int, sizes: ModelConfig) -> tuple[int, str]:
    """Latents along one side, of the wanted image size, else as the weights were trained; and a sentence on it."""
    own, told = found.input_size, found.args.get("image_size", int, None, above=0)
    if POSITIONS in found.tensors:
        grid = math.isqrt(found.sides(POSITIONS, 3)[1])
        require_positions(found, sizes.hidden_size, grid)
        own = grid * sizes.patch_size
    if own is None and told is not None:
        if told % factor:
            raise ValueError(f"{found.args.place}image_size {told} is no multiple of {factor} (--factor)")
        own = told // factor
    size, why = wanted.image_size or (own or IMAGE_SIZE // factor) * factor, ""
    if wanted.image_size is None and own is None:
        why = " are assumed, since nothing tells it (--image-size)"
    if wanted.image_size is not None and own not in (None, size / factor):
        why = f", trained at {own * factor}: its position table is computed anew"
    if size % (factor * sizes.patch_size):
        named = "--image-size " if wanted.image_size else f"{found.files[0]}: its image size "
        raise ValueError(f"{named}{size} is no multiple of {factor * sizes.patch_size}, the pixels of a token")
    return size // factor, f"{size} pixels{why}"


def require_positions(found: Foreign, hidden_size: int, grid: int) -> None:
    """Raise ValueError unless the position table is the sine-cosine one, which this network always has."""
    table = found.tensors[POSITIONS]
    if tuple(table.shape) != (1, grid * grid, hidden_size):
        raise ValueError(f"{found.files[0]}: pos_embed is {_shape(table)}, no square grid of {hidden_size} channels")
    rounding = 0.01  # of a table that was kept in 16 bits
    if not torch.allclose(table[0], position_embedding(hidden_size, grid), atol=rounding, rtol=0):
        raise ValueError(f"{found.files[0]}: pos_embed is not the sine-cosine table, and this network has no other")


def fitted(network: DiT, found: Foreign, source_classes: int, said: list[str]) -> dict[str, Tensor]:
    """The weights for this network, of which only the shapes are looked at. What had to change is added to `said`.

    Raises ValueError where they do not fit.
    """
    tensors, state, sizes = dict(found.tensors), network.state_dict(), network.config
    table = tensors[LABELS]
    if network.num_classes != source_classes:
        said.append(
            f"the label table begins anew: {network.num_classes} classes, not the {source_classes} of the weights"
        )
        tensors[LABELS] = 0.02 * torch.randn(state[LABELS].shape, generator=torch.Generator().manual_seed(0))
    elif len(table) == source_classes:
        said.append("no row for 'no class' there: the mean of the others stands for it; train before guiding")
        tensors[LABELS] = torch.cat([table, table.mean(dim=0, keepdim=True)])
    else:
        tensors[LABELS] = torch.cat([table[:source_classes], table[-1:]])
    tensors[POSITIONS] = position_embedding(sizes.hidden_size, network.input_size // sizes.patch_size).unsqueeze(0)
    for name in sorted(tensors.keys() ^ state.keys()):
        raise ValueError(f"{found.files[0]}: {name} is {'missing' if name in state else 'in no DiT or SiT'}")
    for name, tensor in tensors.items():
        if tensor.shape != state[name].shape:
            raise ValueError(f"{found.files[0]}: {name} is {_shape(tensor)} and must be {_shape(state[name])}")
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{found.files[0]}: {name} holds numbers that are not finite")
    return {name: tensor.clone() for name, tensor in tensors.items()}  # theirs may share their memory


def license_of(found: Foreign, source: Path, objective: str, wanted: Wanted) -> tuple[str | None, str]:
    """The weights' licence and where it is known from."""
    if wanted.license:
        return wanted.license, "as said"
    if found.license:
        return found.license, "as its folder says"
    if found.own:
        return None, "its trainer's own, as the export says"
    named = CONVERTED.search(f"{source.resolve().name} {source.name}")
    if named or (found.format == "published" and objective == "diffusion"):
        return PUBLISHED, "of the published DiT weights; --license where it is another"
    if found.format == "published":
        why = "SiT's repository says MIT, but its network descends from DiT's, which is CC-BY-NC-4.0; say --license"
        return "unknown", f"warning: {why}"
    return "unknown", "warning: its folder does not tell; say --license"


def _learn_sigma(found: Foreign) -> bool:
    _, channels, patch_size, _ = found.sides("x_embedder.proj.weight", 4)
    rows, once = found.sides("final_layer.linear.weight", 2)[0], patch_size**2 * channels
    if rows not in (once, 2 * once):
        fault = f"final_layer.linear.weight has {rows} rows, not {once} or {2 * once}"
        raise ValueError(f"{found.files[0]} is no DiT or SiT: {fault}")
    return rows == 2 * once


def _shape(tensor: Tensor) -> str:
    return " x ".join(map(str, tensor.shape))
