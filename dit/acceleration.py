"""The same network, faster: what evaluating it many times without gradients makes possible on a CPU.

`for_drawing` gives a twin with the same parameters: the same function up to rounding. What is here is here because
docs/benchmarks.md shows what it is worth:

* Matrix products go to oneDNN, which uses the whole vector unit of any x86 processor. MKL, which torch asks otherwise,
  uses half of it where the processor is not Intel's.
* oneDNN applies GELU to a product's tiles while they are in the cache: the widest tensor is written once.
* Patches do not overlap, so that embedding them is a matrix product too, and no convolution has to be set up.
* The batch has one time, which is embedded once, and all blocks' modulations are one matrix product.
* The published design is written out without its modules: in a small network, calling them takes a quarter of the time.

Which form is used follows from the design, the processor's kind and torch's build, never from a measurement: two runs
on a machine agree to the last bit. `torch.backends.mkldnn.flags(enabled=False)` brings the plain form back.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dit.blocks import EPS, MLP
from dit.embedders import PatchEmbed, unpatchify
from dit.model import DiT, ModelConfig
from dit.onednn import available, linear

PUBLISHED = ("block", "norm", "mlp", "rotary", "qk_norm")  # the design that `Written` has: the defaults of these


def for_drawing(network: DiT) -> DiT:
    """A twin of `network` for `twin(x, t, y)` without gradients, where all of t (N,) is one time.

    It shares the network's parameters, all but the modulations' (a third of them), of which it makes a copy: make a new
    one where the network has learned. Where nothing is known to be faster (an accelerator, another kind of processor,
    another precision than float32), it is the network itself.
    """
    if not (network.pos_embed.device.type == "cpu" and available()):
        return network
    if any(parameter.dtype != torch.float32 for parameter in network.parameters()):
        return network
    published = all(getattr(network.config, name) == getattr(ModelConfig, name) for name in PUBLISHED)
    return Written(network) if published else exchanged(network)


def patch_product(x: Tensor, proj: nn.Conv2d) -> Tensor:
    """Patches (N, C, H, W) -> (N, T, D), as `PatchEmbed` embeds them."""
    (N, C, H, W), p = x.shape, proj.stride[0]
    x = x.view(N, C, H // p, p, W // p, p).permute(0, 2, 4, 1, 3, 5)
    return linear(x.reshape(N, -1, C * p * p), proj.weight.flatten(1), proj.bias)


class Written(DiT):
    """The published design, adaLN-Zero with LayerNorm and GELU, without its modules. Hooks are the network's own."""

    def __init__(self, network: DiT):
        self.__dict__ = network.__dict__.copy()
        D, products = self.config.hidden_size, [layer.adaLN_modulation[1] for layer in (*self.blocks, self.final_layer)]
        self.modulation = torch.cat([product.weight for product in products])  # ((6 depth + 2) D, D)
        bias = torch.cat([product.bias for product in products]).view(-1, D)
        bias[1::3] += 1  # every scale, the blocks' and the last layer's: modulate's 1 + scale
        self.modulation_bias = bias.flatten()
        products = [(block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2) for block in self.blocks]
        self.products = [[(product.weight, product.bias) for product in block] for block in products]

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        N, D, heads = len(x), self.config.hidden_size, self.config.num_heads
        x = patch_product(x, self.x_embedder.proj) + self.pos_embed  # (N, T, D)
        c = self.t_embedder(t[:1]) + self.y_embedder(y).mean(dim=1)  # (N, D)
        m = iter(linear(F.silu(c), self.modulation, self.modulation_bias).view(N, 1, -1, D).unbind(2))  # (N, 1, D) each
        for qkv, proj, fc1, fc2 in self.products:
            shift, scale, gate = next(m), next(m), next(m)
            h = linear(torch.addcmul(shift, torch.layer_norm(x, (D,), eps=EPS), scale), *qkv)
            q, k, v = h.view(N, -1, 3, heads, D // heads).permute(2, 0, 3, 1, 4).unbind(0)  # (N, heads, T, D/heads)
            h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(N, -1, D)
            x = torch.addcmul(x, gate, linear(h, *proj))
            shift, scale, gate = next(m), next(m), next(m)
            h = linear(torch.addcmul(shift, torch.layer_norm(x, (D,), eps=EPS), scale), *fc1, "gelu")
            x = torch.addcmul(x, gate, linear(h, *fc2))
        last = self.final_layer.linear
        x = torch.addcmul(next(m), torch.layer_norm(x, (D,), eps=EPS), next(m))
        return unpatchify(linear(x, last.weight, last.bias), self.patch_size)  # (N, out_channels, H, W)


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
    """`linear` with a layer's parameters."""

    def __init__(self, layer: nn.Linear, activation: str = "none"):
        super().__init__()
        self.weight, self.bias, self.activation = layer.weight, layer.bias, activation

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias, self.activation)


class PatchProduct(nn.Module):
    """`patch_product` with an embedder's parameters."""

    def __init__(self, embedder: PatchEmbed):
        super().__init__()
        self.proj = embedder.proj

    def forward(self, x: Tensor) -> Tensor:
        return patch_product(x, self.proj)
