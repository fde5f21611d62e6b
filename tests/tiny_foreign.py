"""Tiny models in other people's formats, with random weights everywhere: nothing is zero, so nothing hides."""

import json
from dataclasses import replace

import torch
from tiny_model import SIZE, write_model

from dit.checkpoint import load_checkpoint, network_config, save_checkpoint
from dit.model import DiT, ModelConfig


def network(num_classes=3, input_size=8, seed=0, **change):
    """A 32-wide DiT of two blocks in eval mode, matrices N(0, 1/fan_in), the rest N(0, 0.1), labels N(0, 1)."""
    sizes = replace(ModelConfig("custom", patch_size=2, hidden_size=32, depth=2, num_heads=2), **change)
    model = DiT(sizes, input_size=input_size, in_channels=4, num_classes=num_classes)
    randomize(model, seed)
    return model.eval().requires_grad_(False)


def randomize(model, seed):
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 100
        torch.nn.init.normal_(parameter, std=1.0 if "embedding_table" in name else fan_in**-0.5)


def inputs(model, num_images=4, seed=1):
    """x, t over the whole chain, and labels of which the last is the null label."""
    draws = torch.Generator().manual_seed(seed)
    x = torch.randn(num_images, model.in_channels, model.input_size, model.input_size, generator=draws)
    labels = torch.arange(num_images) % (model.num_classes + 1)
    labels[-1] = model.null_label
    return x, torch.linspace(0, 999, num_images).long(), labels


def write_diffusion(artifacts, *, latents=None, objective=None, seed=0, **change):
    """artifacts/{ema,vae}: a small model with the `diffusion` objective, 16 pixels, 3 classes. Returns the network."""
    write_model(artifacts, seed, objective="diffusion")
    config = json.loads((artifacts / "ema" / "config.json").read_text())
    model = network(3, SIZE // 2, seed, **change)
    # Latents of the size that this autoencoder makes pictures of, so that pictures are not one grey.
    config["latents"] |= latents or {"mean": [0.0] * 4, "std": [3.0] * 4}
    config |= {"model": network_config(model), "objective": {"name": "diffusion", "diffusion": objective or {}}}
    save_checkpoint(artifacts / "ema", model.state_dict(), config)
    return load_checkpoint(artifacts / "ema").model
