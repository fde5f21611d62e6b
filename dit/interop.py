"""Our names and diffusers', and where a result in another format may be written.

Our names are those of the published DiT and SiT files (arXiv 2212.09748, 2401.08740), so these load as they are.
diffusers' `DiTTransformer2DModel` holds the same numbers under other names, with q, k and v apart and the embedders of
timestep and label repeated in every block: `from_diffusers` and `to_diffusers` translate.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from dit.paths import Paths, publish

NAMES = {"x_embedder.proj": "pos_embed.proj", "final_layer.adaLN_modulation.1": "proj_out_1"}
NAMES |= {"final_layer.linear": "proj_out_2"}
EMBEDDERS = {"t_embedder.mlp.0": "timestep_embedder.linear_1", "t_embedder.mlp.2": "timestep_embedder.linear_2"}
EMBEDDERS |= {"y_embedder.embedding_table": "class_embedder.embedding_table"}
IN_BLOCK = {"adaLN_modulation.1": "norm1.linear", "attn.proj": "attn1.to_out.0"}
IN_BLOCK |= {"mlp.fc1": "ff.net.0.proj", "mlp.fc2": "ff.net.2"}
QKV = ("attn1.to_q", "attn1.to_k", "attn1.to_v")
RECORD = "_dit"  # what an export of ours tells in transformer/config.json; diffusers passes over such names
WEIGHTS = "diffusion_pytorch_model"


def from_diffusers(theirs: dict[str, Tensor], depth: int) -> dict[str, Tensor]:
    """Our names. Raises KeyError where a tensor is missing, ValueError where the blocks' embedders differ."""
    ours = {}
    for kind in ("weight", "bias"):
        for name, other in NAMES.items():
            ours[f"{name}.{kind}"] = theirs[f"{other}.{kind}"]
        for name, other in EMBEDDERS.items():
            if kind == "bias" and name.startswith("y_"):
                continue
            copies = [theirs[f"transformer_blocks.{i}.norm1.emb.{other}.{kind}"] for i in range(depth)]
            if not all(torch.equal(copies[0], copy) for copy in copies):
                raise ValueError(
                    f"the blocks' {other}.{kind} differ: this network embeds timestep and label once, for all blocks"
                )
            ours[f"{name}.{kind}"] = copies[0]
        for i in range(depth):
            block = f"transformer_blocks.{i}"
            ours[f"blocks.{i}.attn.qkv.{kind}"] = torch.cat([theirs[f"{block}.{part}.{kind}"] for part in QKV])
            for name, other in IN_BLOCK.items():
                ours[f"blocks.{i}.{name}.{kind}"] = theirs[f"{block}.{other}.{kind}"]
    return ours


def to_diffusers(ours: dict[str, Tensor], depth: int) -> dict[str, Tensor]:
    """diffusers' names: the inverse of `from_diffusers`. The position table is no part of it (diffusers computes it)."""
    theirs = {}
    for kind in ("weight", "bias"):
        for name, other in NAMES.items():
            theirs[f"{other}.{kind}"] = ours[f"{name}.{kind}"]
        for i in range(depth):
            block = f"transformer_blocks.{i}"
            for part, tensor in zip(QKV, ours[f"blocks.{i}.attn.qkv.{kind}"].chunk(3), strict=True):
                theirs[f"{block}.{part}.{kind}"] = tensor
            for name, other in IN_BLOCK.items():
                theirs[f"{block}.{other}.{kind}"] = ours[f"blocks.{i}.{name}.{kind}"]
            for name, other in EMBEDDERS.items():
                if f"{name}.{kind}" in ours:
                    theirs[f"{block}.norm1.emb.{other}.{kind}"] = ours[f"{name}.{kind}"].clone()
    return theirs


def require_place(output: Path, file: str, keys: set[str], names: set[str]) -> None:
    """Raise ValueError unless `output` is free, or holds an earlier result of the same command and nothing else.

    Such a result has a JSON `file` with all the `keys`, and no names but `names` in its folder.
    """
    place = output.resolve()
    if place.is_relative_to(Paths().artifacts.resolve()):
        raise ValueError(f"{output} belongs to the pipeline, which writes artifacts/ itself: choose another --output")
    above = next(folder for folder in place.parents if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise ValueError(f"{output} cannot be made: {above} is no folder that may be written to")
    if not place.exists() or (place.is_dir() and not any(place.iterdir())):
        return
    try:
        told = json.loads((place / file).read_text())
    except (OSError, ValueError):
        told = None
    if not isinstance(told, dict) or not keys <= told.keys() or {f.name for f in place.iterdir()} - names:
        raise ValueError(f"{output} is there and holds something else: choose another --output")


@contextmanager
def beside(output: Path) -> Iterator[Path]:
    """Yield an empty folder on the same disk as `output` that replaces it at the end: whole or not at all."""
    output = output.resolve()  # of a link: what it stands for
    scratch = output.parent / f".{output.name}.unfinished"
    try:
        with publish(output, scratch) as folder:
            yield folder
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
