"""The same network, faster: what drawing from it many times, or training it, makes possible on this machine.

`for_drawing` and `for_training` give a twin with the same parameters: the same function up to rounding. What is here is
here because docs/benchmarks.md shows what it is worth on a CPU:

* Matrix products go to oneDNN, which uses the whole vector unit of any x86 processor, in the backward pass too. MKL,
  which torch asks otherwise, uses half of it where the processor is not Intel's.
* In drawing, oneDNN applies GELU to a product's tiles while they are in the cache: the widest tensor is written once.
  In training, GELU and its derivative are computed together, since they share all that is expensive.
* Patches do not overlap, so that embedding them is a matrix product too, and no convolution has to be set up.
* In drawing, the batch has one time, which is embedded once, and all blocks' modulations are one matrix product.
* The published design is written out without its modules, and a block is one step for autograd (`dit.written`).
* A training process keeps the memory that a step has freed: to give it back and ask for it again costs page faults.

On an accelerator the blocks are compiled where the work ahead repays it (`dit.compiling`).

Which form is used follows from the design, the kind of processor and torch's build, never from a measurement: two runs
on a machine agree to the last bit. `torch.backends.mkldnn.flags(enabled=False)` brings the plain form back.
"""

import copy
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dit import heap, onednn
from dit.blocks import MLP
from dit.compiling import compile_blocks, worthwhile
from dit.embedders import PatchEmbed
from dit.model import DiT
from dit.onednn import available
from dit.written import Drawing, Training, patches, published


def for_drawing(network: DiT) -> DiT:
    """A twin of `network` for `twin(x, t, y)` without gradients, where all of t (N,) is one time.

    It shares the network's parameters, all but the modulations' (a third of them), of which it makes a copy: make a new
    one where the network has learned. Where nothing is known to be faster (an accelerator, another kind of processor,
    another precision than float32), it is the network itself.
    """
    if not multiplied_by_onednn(network):
        return network
    return Drawing(network) if published(network.config) else exchanged(network)


def for_training(
    network: DiT,
    *,
    precision: Literal["fp32", "bf16"],
    compile: Literal["auto", "on", "off"] = "auto",
    work_ahead_flops: float = 0.0,
) -> Callable[..., Tensor | tuple[Tensor, Tensor]]:
    """`step(x, t, y, tap=None)`, as the network is called, for training it: gradients reach its own parameters.

    `compile` is run.compile, and `work_ahead_flops` what this process has still to do, forward and backward. Where
    compiling is wanted or worthwhile, the network's blocks are compiled in place and it is the network itself, as where
    nothing is known to be faster: sharded parameters, or bf16 on a CPU, which torch gives to oneDNN anyway. Make it
    after the network has been moved, sharded, or had its blocks' forward wrapped.
    """
    device = network.pos_embed.device
    if compile == "on" or (compile == "auto" and worthwhile(device, precision, work_ahead_flops)):
        compile_blocks(network)
    elif precision == "fp32" and multiplied_by_onednn(network):
        heap.keep()
        return Training(network) if published(network.config) else exchanged(network)
    return network


def multiplied_by_onednn(network: DiT) -> bool:
    """Whether this network's products go to oneDNN: plain float32 tensors on an x86 processor."""
    if not (network.pos_embed.device.type == "cpu" and available()):
        return False
    return all(type(p) is nn.Parameter and p.dtype == torch.float32 for p in network.parameters())


def exchanged(module: nn.Module) -> nn.Module:
    """A module like this one, of any design, whose matrix products are oneDNN's."""
    if isinstance(module, nn.Linear):
        return Linear(module)
    if isinstance(module, PatchEmbed):
        return PatchProduct(module)
    if isinstance(module, MLP):
        return nn.Sequential(Linear(module.fc1, "gelu"), Linear(module.fc2))
    twin = copy.copy(module)
    twin._modules = {name: part if part is None else exchanged(part) for name, part in module._modules.items()}
    return twin


class Linear(nn.Module):
    """oneDNN's product with a layer's parameters, and GELU of it where it is asked for."""

    def __init__(self, layer: nn.Linear, activation: str = "none"):
        super().__init__()
        self.weight, self.bias, self.activation = layer.weight, layer.bias, activation

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return onednn.linear(x, self.weight, self.bias, self.activation)
        x = onednn.Linear.apply(x, self.weight, self.bias)
        return F.gelu(x, approximate="tanh") if self.activation == "gelu" else x


class PatchProduct(nn.Module):
    """The product that embeds patches, with an embedder's parameters."""

    def __init__(self, embedder: PatchEmbed):
        super().__init__()
        self.proj = embedder.proj

    def forward(self, x: Tensor) -> Tensor:
        product = onednn.Linear.apply if torch.is_grad_enabled() else onednn.linear
        return product(patches(x, self.proj.stride[0]), self.proj.weight.flatten(1), self.proj.bias)
