"""Compiling a network's blocks: where the work ahead repays it, and a compiler is there."""

import os
import shutil
import sys
from collections.abc import Callable
from functools import cache, partial
from importlib.util import find_spec

import torch
from torch import Tensor

from dit.estimate import ASSUMED_MFU, device_named
from dit.model import DiT
from dit.runtime import device_name

SECONDS, GAIN = 120.0, 0.2  # what compiling takes, and the share of a step's time that it then saves: both assumed
COMPILERS = {
    "cpu": ("CXX", ("c++", "g++", "clang++")),  # of the kernels
    "cuda": ("CC", ("cc", "gcc", "clang")),  # of what Triton starts its kernels with
}


def worthwhile(device: torch.device, precision: str, work_ahead_flops: float) -> bool:
    """Whether compiling pays before this process has done that many floating-point operations.

    Never on a CPU: what `dit.acceleration` has for it is faster, and there at once. Never without a compiler.
    """
    if device.type not in ("cuda", "tpu") or not compiler(device.type):
        return False
    return GAIN * work_ahead_flops / rate(device, precision) > SECONDS


def rate(device: torch.device, precision: str) -> float:
    """Floating-point operations a second in training, assumed; of a device that the table lacks, an H100's."""
    try:
        known = device_named(device_name(device) or "")
    except ValueError:
        known = device_named("H100")
    return known.peak_flops * ASSUMED_MFU[precision]


def compiler(kind: str) -> bool:
    """Whether what torch.compile needs for this kind of device is on this machine."""
    if kind == "cuda" and find_spec("triton") is None:
        return False
    variable, names = COMPILERS.get(kind, ("", ()))
    return kind not in COMPILERS or any(shutil.which(name) for name in (os.environ.get(variable), *names) if name)


def compile_blocks(network: DiT) -> bool:
    """Have each block's forward compiled, in place, for the shapes that come; without a compiler say so and do nothing.

    Parameters, names and hooks stay as they are. The blocks are alike, so that one graph serves them all.
    """
    kind = network.pos_embed.device.type
    if not compiler(kind):
        say(f"run.compile: this machine has no compiler for {kind}, the network runs uncompiled")
        return False
    # Else several processes' graphs are cut where gradients are exchanged; a block is small enough to overlap with that.
    torch._dynamo.config.optimize_ddp = False
    for block in network.blocks:
        block.forward = partial(row_by_row, torch.compile(block.forward, dynamic=False))
    return True


def row_by_row(forward: Callable[..., Tensor], x: Tensor, *rest: Tensor | None) -> Tensor:
    """The block of tokens x (N, T, D) that lie in memory in that order.

    The patches' convolution leaves them in another one, for which torch 2.13 compiles on a CPU a forward pass that is
    right and a backward pass that is wrong.
    """
    return forward(x.contiguous(), *rest)


@cache
def say(line: str) -> None:
    """Once a process, to stderr."""
    print(line, file=sys.stderr, flush=True)
