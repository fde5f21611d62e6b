"""`dit export`: a checkpoint of ours becomes a folder for diffusers' own `DiTPipeline.from_pretrained`.

That pipeline denoises a discrete chain in the order that its scheduler says, asks one kind of network, multiplies
latents by one number, and takes label 1000 for "no class". What does not fit that is refused with the reason.
"""

import importlib.metadata
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dit.checkpoint import Checkpoint, load_checkpoint, load_tensors, save_tensors
from dit.foreign import Settings, read_json
from dit.interop import RECORD, WEIGHTS, beside, require_place, to_diffusers
from dit.model import DiT, ModelConfig
from dit.objective import objective_from
from dit.paths import write_json
from dit.vae import digest_of

NULL_LABEL = 1000  # fixed in DiTPipeline
PREDICTIONS = {"epsilon": "epsilon", "x": "sample", "v": "v_prediction"}
SCHEDULES = {"linear": "linear", "cosine": "squaredcos_cap_v2"}
MODULE = Path(__file__).with_name("published_dit.py")
OPEN = "DiTPipeline.from_pretrained({folder!r}{trust})"


def export_diffusers(source: Path, vae: Path, output: Path, *, with_code: bool = False) -> list[str]:
    """Write the folder `output`, whole or not at all. Returns what a person should know about it.

    Raises ValueError, and writes nothing, where diffusers has no words for the model.
    """
    parts = {"model_index.json", "README.md", "scheduler", "transformer", "vae"}
    require_place(output, "transformer/config.json", {RECORD}, parts)
    checkpoint = load_checkpoint(source)
    require_expressible(checkpoint, source)
    require_whole(checkpoint, source)
    require_vae(vae, checkpoint, source)
    network, said = checkpoint.model, []
    published = network.config.timestep_embedding == "published"
    coded = published and with_code
    if published and not with_code:
        worst, rms = timestep_error(network)
        said.append(
            f"warning: trained with the published timestep frequencies, which diffusers does not compute: one network "
            f"call there is off by {rms:.2%} (rms; at most {worst:.2%} of the largest value). --with-code is exact"
        )
    if checkpoint.config["latents"]["autoencoder"] is None:
        said.append(f"which autoencoder it was trained on is not known: {vae} is taken on trust")
    if checkpoint.config.get("license") == "unknown":
        said.append("warning: the weights' licence is not known")
    with beside(output) as folder:
        _write_transformer(folder / "transformer", checkpoint, coded)
        write_vae(folder / "vae", vae, checkpoint.config["latents"])
        write_json(folder / "scheduler" / "scheduler_config.json", scheduler_config(checkpoint.config))
        write_json(folder / "model_index.json", _index(checkpoint.config, coded))
        (folder / "README.md").write_text(card(checkpoint.config, said, coded))
    trust = ", trust_remote_code=True" if coded else ""
    return [*said, "open it with " + OPEN.format(folder=str(output), trust=trust)]


def require_expressible(checkpoint: Checkpoint, source: Path) -> None:
    """Raise ValueError with the first reason for which diffusers' DiTPipeline cannot hold this model."""
    config, network = checkpoint.model.config, checkpoint.model
    told = Settings(f"{source}/config.json: ", checkpoint.config)
    usual = ModelConfig("custom", 1, 4, 1, 1)
    modern = [key for key in ("norm", "mlp", "rotary", "qk_norm") if getattr(config, key) != getattr(usual, key)]
    reasons = {
        "its objective is transport, and DiTPipeline denoises a discrete chain": (
            told.within("objective").one_of("name", ("diffusion", "transport")) != "diffusion"
        ),
        f"its blocks are {config.block}, and diffusers has adaln_zero only": config.block != "adaln_zero",
        "its condition is no class, and DiTPipeline always asks for one": network.num_classes == 0,
        f"its condition is {config.condition}, and diffusers has classes only": config.condition == "embeddings",
        f"it has {network.num_classes} classes, and DiTPipeline takes label {NULL_LABEL} for 'no class'": (
            network.num_classes > NULL_LABEL
        ),
        f"its mlp_ratio is {config.mlp_ratio:g}, and diffusers fixes 4": config.mlp_ratio != 4,
        f"model.{', model.'.join(modern)} is none of diffusers' options": bool(modern),
    }
    for reason, holds in reasons.items():
        if holds:
            raise ValueError(f"{source} cannot be exported to diffusers: {reason}")


def require_whole(checkpoint: Checkpoint, source: Path) -> None:
    """Raise ValueError where config.json lacks something that the export is written from, or tells it wrongly."""
    told, network = Settings(f"{source}/config.json: ", checkpoint.config), checkpoint.model
    latents = told.within("latents")
    channels = len(latents.each("mean", float)), len(latents.each("std", float, above=0))
    if channels != (network.in_channels,) * 2 or len(told.each("classes", str)) != network.num_classes:
        raise ValueError(f"{told.place}classes or latents do not fit the network's tensors")
    latents.get("autoencoder", str, None)
    told.get("image_size", int, above=0)
    told.get("license", str, None)
    told.one_of("weights", ("ema", "raw"))
    try:
        objective_from(checkpoint.config["objective"])
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{told.place}objective is none that this code knows ({error})") from None


def require_vae(vae: Path, checkpoint: Checkpoint, source: Path) -> None:
    """Raise ValueError unless `vae` is the checkpoint's autoencoder, or, where that is not known, could be."""
    if missing := [name for name in ("config.json", f"{WEIGHTS}.safetensors") if not (vae / name).is_file()]:
        raise ValueError(f"--vae {vae} is not an autoencoder's folder: {missing[0]} is missing")
    config, network = read_json(vae / "config.json"), checkpoint.model
    own, side = checkpoint.config["latents"]["autoencoder"], checkpoint.config["image_size"]
    factor = 2 ** (len(config.each("block_out_channels", int, above=0)) - 1)
    fits = (config.get("latent_channels", int), factor * network.input_size) == (network.in_channels, side)
    if not fits or own not in (None, digest_of(vae)):
        raise ValueError(f"--vae {vae} is not the autoencoder that {source} was trained on")


def transformer_config(network: DiT, class_name: str, record: dict[str, Any]) -> dict[str, Any]:
    """transformer/config.json. The table holds 1001 rows whatever the classes: DiTPipeline's null label is row 1000."""
    config = network.config
    return {
        "_class_name": class_name,
        "_diffusers_version": importlib.metadata.version("diffusers"),
        RECORD: record,
        "num_attention_heads": config.num_heads,
        "attention_head_dim": config.hidden_size // config.num_heads,
        "in_channels": network.in_channels,
        "out_channels": network.out_channels,
        "num_layers": config.depth,
        "sample_size": network.input_size,
        "patch_size": config.patch_size,
        "num_embeds_ada_norm": NULL_LABEL,
        "activation_fn": "gelu-approximate",
        "norm_type": "ada_norm_zero",
        "norm_elementwise_affine": False,
        "norm_eps": 1e-6,
        "attention_bias": True,
    }


def scheduler_config(config: dict[str, Any]) -> dict[str, Any]:
    """A DDIMScheduler on the model's chain.

    Its "leading" timesteps, `1000 // N` apart from 0 up, are our spacing `stride` where N divides 1000 (10, 25, 50,
    100, 250). `set_alpha_to_one`: the last step ends at alpha_bar 1, as ours does. DiTPipeline drops learned variances,
    so ancestral sampling there (DDPMScheduler.from_config) has fixed ones, not those that this model learned.
    """
    chain = objective_from(config["objective"]).diffusion
    return {
        "_class_name": "DDIMScheduler",
        "_diffusers_version": importlib.metadata.version("diffusers"),
        "num_train_timesteps": 1000,
        "beta_schedule": SCHEDULES[chain.schedule],
        "beta_start": 1e-4,
        "beta_end": 0.02,
        "prediction_type": PREDICTIONS[chain.prediction],
        "clip_sample": False,
        "set_alpha_to_one": True,
        "steps_offset": 0,
        "timestep_spacing": "leading",
        "rescale_betas_zero_snr": False,
    }


def write_vae(folder: Path, vae: Path, latents: dict[str, Any]) -> None:
    """The autoencoder, such that decode(latent / scaling_factor) is ours of latent * std + mean.

    One factor is `scaling_factor`. A mean, or a factor for each channel, is folded into the two 1x1 convolutions on
    either side of the latents, which is exact: W (s z + m) + b = (W s) z + (W m + b).
    """
    folder.mkdir()
    config, weights = read_json(vae / "config.json").values, f"{WEIGHTS}.safetensors"
    mean, std = (torch.tensor(latents[key], dtype=torch.float64) for key in ("mean", "std"))
    config["scaling_factor"], config["shift_factor"] = 1 / latents["std"][0], None
    if not mean.any() and len(set(latents["std"])) == 1:
        shutil.copyfile(vae / weights, folder / weights)
    else:
        tensors = load_tensors(vae / weights)
        if not {"quant_conv.weight", "post_quant_conv.weight"} <= tensors.keys():
            raise ValueError(f"--vae {vae} has no 1x1 convolution to hold a latent scale for each channel")
        config["scaling_factor"] = 1.0
        save_tensors(folder / weights, tensors | folded(tensors, mean, std))
    write_json(folder / "config.json", config)


def folded(tensors: dict[str, Tensor], mean: Tensor, std: Tensor) -> dict[str, Tensor]:
    """quant_conv, whose channels are posterior means and log-variances, and post_quant_conv, for normalised latents."""
    after, after_bias, before, before_bias = (
        tensors[f"{name}.{kind}"].double() for name in ("quant_conv", "post_quant_conv") for kind in ("weight", "bias")
    )
    scale = torch.cat([std, torch.ones_like(std)])
    shift = torch.cat([-mean / std, -2 * std.log()])
    told = {
        "quant_conv.weight": after / scale.view(-1, 1, 1, 1),
        "quant_conv.bias": after_bias / scale + shift,
        "post_quant_conv.weight": before * std.view(1, -1, 1, 1),
        "post_quant_conv.bias": before_bias + before.flatten(1) @ mean,
    }
    return {name: tensor.float() for name, tensor in told.items()}


@torch.no_grad()
def timestep_error(network: DiT) -> tuple[float, float]:
    """How far outputs are off under diffusers' timestep frequencies: max |error| / max |output|, and rms / rms."""
    other = DiT(
        replace(network.config, timestep_embedding="diffusers"),
        input_size=network.input_size,
        in_channels=network.in_channels,
        num_classes=network.num_classes,
    )
    other.load_state_dict(network.state_dict())
    t = torch.tensor([0, 100, 250, 500, 750, 999])
    draws = torch.Generator().manual_seed(0)
    x = torch.randn(len(t), network.in_channels, network.input_size, network.input_size, generator=draws)
    y = torch.randint(network.num_classes, (len(t),), generator=draws)
    exact, approximate = network(x, t, y), other.eval()(x, t, y)
    error = approximate - exact
    return (error.abs().max() / exact.abs().max()).item(), (error.square().mean() / exact.square().mean()).sqrt().item()


def card(config: dict[str, Any], said: list[str], coded: bool) -> str:
    """README.md: a model card, whose front matter carries the licence."""
    license = config.get("license")
    name = license and (license.lower() if re.fullmatch(r"[\w.+-]+", license) else json.dumps(license))
    front = ["---", "library_name: diffusers", *([f"license: {name}"] if license else []), "---"]
    lines = ["A class-conditional diffusion transformer, exported by dit.", "", "```python"]
    lines += ["from diffusers import DiTPipeline", ""]
    lines += ["pipeline = " + OPEN.format(folder="this folder", trust=", trust_remote_code=True" if coded else "")]
    lines += ["pipeline(class_labels=[0], guidance_scale=1.5, num_inference_steps=25).images[0]", "```", ""]
    lines += ["Its DDIM steps are 1000 // N apart, from 0 up; DiTPipeline leaves learned variances unused.", ""]
    lines += [f"Licence of the weights: {license}." if license else "The weights are their trainer's own.", ""]
    return "\n".join([*front, "", *lines, *(f"* {line}" for line in said)]) + "\n"


def _write_transformer(folder: Path, checkpoint: Checkpoint, coded: bool) -> None:
    folder.mkdir()
    network = checkpoint.model
    tensors = {name: tensor for name, tensor in network.state_dict().items() if name != "pos_embed"}
    name = "y_embedder.embedding_table.weight"
    null = tensors[name][-1:].expand(NULL_LABEL - network.num_classes, -1)
    tensors[name] = torch.cat([tensors[name], null])
    save_tensors(folder / f"{WEIGHTS}.safetensors", to_diffusers(tensors, network.config.depth))
    record = {"license": checkpoint.config.get("license"), "num_classes": network.num_classes}
    record |= {"timestep_embedding": network.config.timestep_embedding, "weights": checkpoint.config["weights"]}
    class_name = "PublishedDiT" if coded else "DiTTransformer2DModel"
    write_json(folder / "config.json", transformer_config(network, class_name, record))
    if coded:
        shutil.copyfile(MODULE, folder / MODULE.name)


def _index(config: dict[str, Any], coded: bool) -> dict[str, Any]:
    transformer = [MODULE.stem, "PublishedDiT"] if coded else ["diffusers", "DiTTransformer2DModel"]
    return {
        "_class_name": "DiTPipeline",
        "_diffusers_version": importlib.metadata.version("diffusers"),
        "_license": config.get("license"),
        "id2label": {str(label): name for label, name in enumerate(config["classes"])},
        "scheduler": ["diffusers", "DDIMScheduler"],
        "transformer": transformer,
        "vae": ["diffusers", "AutoencoderKL"],
    }
