"""The published design, adaLN-Zero with LayerNorm and GELU, written out for a CPU: without its modules, its products
by oneDNN. Once for drawing, without gradients, and once for training, with the blocks' gradients by hand.

In a small network, calling the modules takes a quarter of the time, and having autograd follow each of their steps as
much again. Every form is the network's function up to rounding, with the network's own parameters.
"""

import math
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from dit.blocks import EPS
from dit.embedders import FREQUENCY_EMBEDDING_SIZE, timestep_embedding, unpatchify
from dit.model import DiT, ModelConfig
from dit.onednn import Linear, input_gradient, linear, parameter_gradients

PUBLISHED = ("block", "norm", "mlp", "rotary", "qk_norm")  # the design: the defaults of these
SLOPE, CUBIC = 2 * math.sqrt(2 / math.pi), 0.044715  # GELU's tanh form is z sigmoid(SLOPE (z + CUBIC z^3))
VECTOR = 16  # float32 numbers in the widest vector of an x86 processor


def published(config: ModelConfig) -> bool:
    """Whether a network is of the design that is written out here."""
    return all(getattr(config, name) == getattr(ModelConfig, name) for name in PUBLISHED)


class Drawing(DiT):
    """The network where all of t (N,) is one time, without gradients. Hooks are the network's own.

    It has a copy of the modulations' parameters, a third of all: one matrix, and so one product for all blocks.
    """

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
        proj = self.x_embedder.proj
        x = linear(patches(x, self.patch_size), proj.weight.flatten(1), proj.bias) + self.pos_embed  # (N, T, D)
        c = self.t_embedder(t[:1]) + self.y_embedder(y).mean(dim=1)  # (N, D)
        m = iter(linear(F.silu(c), self.modulation, self.modulation_bias).view(N, 1, -1, D).unbind(2))  # (N, 1, D) each
        for qkv, proj, fc1, fc2 in self.products:
            shift, scale, gate = next(m), next(m), next(m)
            h = linear(torch.addcmul(shift, torch.layer_norm(x, (D,), eps=EPS), scale), *qkv)
            q, k, v = split(h, heads)
            h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(N, -1, D)
            x = torch.addcmul(x, gate, linear(h, *proj))
            shift, scale, gate = next(m), next(m), next(m)
            h = linear(torch.addcmul(shift, torch.layer_norm(x, (D,), eps=EPS), scale), *fc1, "gelu")
            x = torch.addcmul(x, gate, linear(h, *fc2))
        last = self.final_layer.linear
        x = torch.addcmul(next(m), torch.layer_norm(x, (D,), eps=EPS), next(m))
        return unpatchify(linear(x, last.weight, last.bias), self.patch_size)  # (N, out_channels, H, W)


class Training:
    """The network as it is trained; gradients go to the network's parameters through autograd."""

    def __init__(self, network: DiT):
        self.network, last = network, network.final_layer
        self.blocks = [
            of_layers(block.adaLN_modulation[1], block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2)
            for block in network.blocks
        ]
        self.last = of_layers(last.adaLN_modulation[1], last.linear)

    def __call__(self, x: Tensor, t: Tensor, y: Tensor, *, tap: int | None = None) -> Tensor | tuple[Tensor, Tensor]:
        net = self.network
        proj = net.x_embedder.proj
        x = Linear.apply(patches(x, net.patch_size), proj.weight.flatten(1), proj.bias) + net.pos_embed  # (N, T, D)
        t = timestep_embedding(t, FREQUENCY_EMBEDDING_SIZE, convention=net.config.timestep_embedding)
        first, _, second = net.t_embedder.mlp
        t = product(F.silu(product(t, first)), second)
        c = F.silu(t + net.y_embedder(y).mean(dim=1))  # (N, D)
        for number, weights in enumerate(self.blocks, start=1):
            x = Block.apply(x, c, net.config.num_heads, *weights)
            if number == tap:
                tapped = x
        x = unpatchify(Last.apply(x, c, *self.last), net.patch_size)  # (N, out_channels, H, W)
        return x if tap is None else (x, tapped)


class Block(Function):
    """`blocks.AdaLNZeroBlock` of tokens x (N, T, D) and the condition c (N, D), SiLU of it already taken."""

    @staticmethod
    def forward(ctx, x: Tensor, c: Tensor, heads: int, *weights: Tensor) -> Tensor:
        modulation, modulation_bias, qkv, qkv_bias, proj, proj_bias, fc1, fc1_bias, fc2, fc2_bias = weights
        N, _, D = x.shape
        m = linear(c, modulation, modulation_bias).view(N, 6, 1, D)
        m[:, 1::3] += 1  # modulate's 1 + scale
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = m.unbind(1)  # (N, 1, D) each
        a, *norm1 = modulated(x, shift_msa, scale_msa)
        h = linear(a, qkv, qkv_bias)
        o, logsumexp = attention(h, heads)
        p = linear(o, proj, proj_bias)
        inner = torch.addcmul(x, gate_msa, p)
        b, *norm2 = modulated(inner, shift_mlp, scale_mlp)
        g, slope = gelu(linear(b, fc1, fc1_bias))
        f = linear(g, fc2, fc2_bias)
        ctx.heads = heads
        of_attention, of_mlp = (x, *norm1, a, h, o, logsumexp, p), (inner, *norm2, b, g, slope, f)
        ctx.save_for_backward(c, m, *of_attention, *of_mlp, modulation, qkv, proj, fc1, fc2)
        return torch.addcmul(inner, gate_mlp, f)

    @staticmethod
    @once_differentiable
    def backward(ctx, d: Tensor) -> tuple[Tensor | None, ...]:
        # d_x is the gradient of x; `d`, of what the residual stream holds.
        c, m, *kept, modulation, qkv, proj, fc1, fc2 = ctx.saved_tensors
        (x, *norm1, a, h, o, logsumexp, p), (inner, *norm2, b, g, slope, f) = kept[:9], kept[9:]
        _, scale_msa, gate_msa, _, scale_mlp, gate_mlp = m.unbind(1)
        d_gate_mlp, d_f = (d * f).sum(1), d * gate_mlp
        d_fc2 = parameter_gradients(d_f, g)
        d_z = input_gradient(d_f, fc2).mul_(slope)
        d_fc1 = parameter_gradients(d_z, b)
        d_inner, *d_mlp = modulated_gradients(input_gradient(d_z, fc1), inner, norm2, scale_mlp)
        d = d + d_inner
        d_gate_msa, d_p = (d * p).sum(1), d * gate_msa
        d_proj = parameter_gradients(d_p, o)
        d_h = attention_gradient(input_gradient(d_p, proj), h, o, logsumexp, ctx.heads)
        d_qkv = parameter_gradients(d_h, a)
        d_x, *d_msa = modulated_gradients(input_gradient(d_h, qkv), x, norm1, scale_msa)
        d_m = torch.cat([*d_msa, d_gate_msa, *d_mlp, d_gate_mlp], dim=1)  # (N, 6 D)
        d_modulation, d_c = parameter_gradients(d_m, c), input_gradient(d_m, modulation)
        return d + d_x, d_c, None, *d_modulation, *d_qkv, *d_proj, *d_fc1, *d_fc2


class Last(Function):
    """`blocks.FinalLayer` of the same x and c."""

    @staticmethod
    def forward(ctx, x: Tensor, c: Tensor, *weights: Tensor) -> Tensor:
        modulation, modulation_bias, weight, bias = weights
        N, _, D = x.shape
        shift, scale = linear(c, modulation, modulation_bias).view(N, 2, 1, D).unbind(1)
        a, *norm = modulated(x, shift, scale.add_(1))
        ctx.save_for_backward(x, c, scale, a, *norm, modulation, weight)
        return linear(a, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, d: Tensor) -> tuple[Tensor, ...]:
        x, c, scale, a, *norm, modulation, weight = ctx.saved_tensors
        d_layer = parameter_gradients(d, a)
        d_x, *d_m = modulated_gradients(input_gradient(d, weight), x, norm, scale)
        d_m = torch.cat(d_m, dim=1)  # (N, 2 D)
        d_modulation, d_c = parameter_gradients(d_m, c), input_gradient(d_m, modulation)
        return d_x, d_c, *d_modulation, *d_layer


def of_layers(*layers: torch.nn.Linear) -> list[Tensor]:
    """Weight and bias of each."""
    return [parameter for layer in layers for parameter in (layer.weight, layer.bias)]


def patches(x: Tensor, p: int) -> Tensor:
    """(N, C, H, W) -> (N, T, C p p): as patches do not overlap, embedding them is a matrix product."""
    N, C, H, W = x.shape
    return x.view(N, C, H // p, p, W // p, p).permute(0, 2, 4, 1, 3, 5).reshape(N, -1, C * p * p)


def product(x: Tensor, layer: torch.nn.Linear) -> Tensor:
    """The layer's output, for autograd."""
    return Linear.apply(x, layer.weight, layer.bias)


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """LayerNorm of x times `scale` plus `shift`; and the norm, its means and its reciprocal deviations."""
    normed, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], None, None, EPS)
    return torch.addcmul(shift, normed, scale), normed, mean, rstd


def modulated_gradients(d: Tensor, x: Tensor, norm: list[Tensor], scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x (N, T, D), shift and scale (N, D) from that of `modulated`, which is used up."""
    normed, mean, rstd = norm
    d_shift, d_scale = d.sum(1), (d * normed).sum(1)
    backward, wanted = torch.ops.aten.native_layer_norm_backward.default, (True, False, False)
    return backward(d.mul_(scale), x, x.shape[-1:], mean, rstd, None, None, wanted)[0], d_shift, d_scale


def gelu(z: Tensor) -> tuple[Tensor, Tensor]:
    """GELU in its tanh form, written over z, and its derivative: they share all that is expensive.

    With u = SLOPE (z + CUBIC z^3), h = z sigmoid(u) and h' = sigmoid(u) + SLOPE (h - h sigmoid(u)) (1 + 3 CUBIC z^2).
    """
    squares = z * z
    s = torch.addcmul(z, z, squares, value=CUBIC).mul_(SLOPE).sigmoid_()
    h = z.mul_(s)
    rest = torch.addcmul(h, h, s, value=-1)
    return h, s.add_(rest.addcmul_(rest, squares, value=3 * CUBIC), alpha=SLOPE)


def split(qkv: Tensor, heads: int) -> tuple[Tensor, ...]:
    """(N, T, 3 D) -> q, k, v (N, heads, T, D/heads)."""
    N, T, width = qkv.shape
    return qkv.view(N, T, 3, heads, width // 3 // heads).permute(2, 0, 3, 1, 4).unbind(0)


def attention(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Of (N, T, 3 D): the heads' outputs (N, T, D), and what torch's backward pass asks for beside them."""
    rows, mask = together(qkv, heads)
    forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    o, logsumexp = forward(*split(rows, heads), attn_mask=mask)
    return o.transpose(1, 2).reshape(*qkv.shape[:2], -1), logsumexp


def attention_gradient(d: Tensor, qkv: Tensor, o: Tensor, logsumexp: Tensor, heads: int) -> Tensor:
    """The gradient of qkv (N, T, 3 D) from that of the heads' outputs (N, T, D)."""
    rows, mask = together(qkv, heads)
    d, o = (x.view(*rows.shape[:2], heads, -1).transpose(1, 2) for x in (d, o))
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
    gradients = backward(d, *split(rows, heads), o, logsumexp, 0.0, False, attn_mask=mask)
    return torch.stack([gradient.transpose(1, 2) for gradient in gradients], dim=2).view(qkv.shape)


def together(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor | None]:
    """Images of few tokens as one sequence that fills a vector of the processor, and the mask that keeps them apart."""
    N, T, width = qkv.shape
    images = VECTOR // T
    if images < 2 or VECTOR % T or N % images:
        return qkv, None
    return qkv.view(N // images, VECTOR, width), apart(T).expand(N // images, heads, -1, -1)


@cache
def apart(T: int) -> Tensor:
    """0 where two of VECTOR tokens are of one image, of T tokens each, and -inf elsewhere: (VECTOR, VECTOR)."""
    image = torch.arange(VECTOR) // T
    return torch.where(image[:, None] == image, 0.0, -math.inf)
