"""A whole set of artifacts, real and tiny: a 32-wide transformer, an 8-channel autoencoder, a reference, a training."""

import json
from pathlib import Path

import numpy as np
import torch

from dit.checkpoint import network_config, save_checkpoint, save_tensors
from dit.classifier import Classifier, extract, save_classifier
from dit.features import Moments
from dit.model import DiT, ModelConfig
from dit.paths import Paths, write_json
from dit.vae import Autoencoder, import_diffusers

CLASSES = ["zero", "one", "two"]
SIZE = 16
EXTRACTOR = "digits_classifier"


def write_model(
    artifacts: Path,
    seed: int = 0,
    classes: list[str] = CLASSES,
    objective: str | dict = "transport",
    condition_shape: tuple[int, int] | None = None,
) -> None:
    """artifacts/ema and artifacts/vae: random weights, drawn with `seed`. `objective` is its name, or as in config.json.

    With a `condition_shape` (L, E) the network is conditioned on embeddings, and has a bank of seven.
    """
    objective = {"name": objective} if isinstance(objective, str) else objective
    torch.manual_seed(seed)
    network = import_diffusers()(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        latent_channels=4,
        norm_num_groups=8,
        sample_size=SIZE,
        mid_block_add_attention=False,
    )
    network.save_pretrained(artifacts / "vae")
    sizes = {"patch_size": 4, "hidden_size": 32, "depth": 1, "num_heads": 2}
    sizes |= {"learn_sigma": objective["name"] == "diffusion"} | (
        {"condition": "embeddings"} if condition_shape else {}
    )
    shape = {"input_size": SIZE // 2, "in_channels": 4, "num_classes": len(classes)}
    model = DiT(ModelConfig("custom", **sizes), **shape, condition_shape=condition_shape)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    config = {
        "model": network_config(model),
        "objective": objective,
        "latents": {
            "digest": "d" * 64,
            "autoencoder": Autoencoder.load(artifacts / "vae").digest,
            "mean": [0.0] * 4,
            "std": [1.0] * 4,
        },
        "classes": classes,
        "image_size": SIZE,
        "step": 10,
        "weights": "ema",
        "license": "CC0-1.0",
        "data": {"name": "tiny", "digest": "t" * 64},
    }
    (artifacts / "ema").mkdir(parents=True, exist_ok=True)
    save_checkpoint(artifacts / "ema", model.state_dict(), config)
    (artifacts / "ema" / "conditions.safetensors").unlink(missing_ok=True)
    if condition_shape:
        bank = {"features": torch.randn(7, *condition_shape).half(), "label": torch.arange(7) % max(1, len(classes))}
        save_tensors(artifacts / "ema" / "conditions.safetensors", bank)


def write_reference(artifacts: Path, seed: int = 0) -> str:
    """artifacts/reference, of random images and a random classifier. Returns its digest."""
    torch.manual_seed(seed)
    folder = artifacts / "reference"
    folder.mkdir(parents=True, exist_ok=True)
    images = np.random.default_rng(seed).integers(0, 256, (24, SIZE, SIZE, 3), np.uint8)
    classifier = Classifier(len(CLASSES)).eval()
    for name in ("classifier", "judge"):
        save_classifier(folder / f"{name}.safetensors", classifier)
    features, tensors = extract(classifier, images), {}
    for layer in ("hidden", "pooled"):
        tensors[layer] = features[layer].float()
        moments = Moments.of(features[layer])
        tensors |= {f"{layer}.mu": moments.mean, f"{layer}.sigma": moments.covariance}
    save_tensors(folder / "features.safetensors", tensors)
    told = {"digest": f"reference{seed}", "extractor": EXTRACTOR, "num_classes": len(CLASSES)}
    write_json(folder / "reference.json", told)
    return told["digest"]


def write_metrics(artifacts: Path, fid: float, reference: str = "reference0", num_images: int = 12) -> None:
    """artifacts/evaluate/metrics.json with a made-up FID for the setting `plain`."""
    row = {f"fid_{EXTRACTOR}_{num_images}": fid, f"fid_{EXTRACTOR}_pooled_{num_images}": fid / 10}
    row[f"class_agreement_{num_images}"] = 0.5
    told = {"extractor": EXTRACTOR, "reference": reference, "num_images": num_images, "floors": {}}
    write_json(artifacts / "evaluate" / "metrics.json", {**told, "settings": {"plain": row}})


def write_training(paths: Paths, run_id: str | None = None) -> None:
    """artifacts/train as a training leaves it, and params.yaml."""
    folder = paths.artifacts / "train"
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "run.json", {"mlflow_run_id": run_id, "tracking_uri": None})
    write_json(folder / "config.json", {"step": 10})
    (folder / "loss.csv").write_text("step,loss,lr\n" + "".join(f"{i},{1 / i},0.1\n" for i in range(1, 11)))
    paths.params.write_text(json.dumps({"preset": "tiny", "train": {"max_steps": 10, "betas": [0.9, 0.999]}}))
