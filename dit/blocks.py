"""The transformer's blocks, in the four designs of "Scalable Diffusion Models with Transformers" (arXiv 2212.09748).

Section 3.2 compares four ways to tell a block the time and the class. Two have no modulation anywhere, the last layer
included: `in_context` (a plain block; the condition's tokens stand among the image's) and `cross_attention` (a second
attention, to the condition's tokens). Two modulate their norms: `adaln` (shift and scale) and `adaln_zero` (and gates
that start at 0).

A norm without weights of its own stands where a modulation follows, since that gives it shift and scale. Elsewhere a
norm has them, as in any plain transformer. The paper does not say; its rounded counts (449M, 598M) fit both.
"""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dit.embedders import rotate

EPS = 1e-6


class Sizes(Protocol):
    """What a block reads of the network's configuration."""

    hidden_size: int
    num_heads: int
    mlp_ratio: float
    norm: str
    mlp: str
    qk_norm: bool


class AdaLNZeroBlock(nn.Module):
    """Attention and MLP, each shifted, scaled and gated by the condition c (N, D)."""

    def __init__(self, sizes: Sizes):
        super().__init__()
        self.norm1 = normalization(sizes.norm, sizes.hidden_size, affine=False)
        self.attn = Attention(sizes)
        self.norm2 = normalization(sizes.norm, sizes.hidden_size, affine=False)
        self.mlp = feed_forward(sizes)
        self.adaLN_modulation = modulation(sizes.hidden_size, 6)

    def forward(self, x: Tensor, c: Tensor, rotary: Tensor | None) -> Tensor:
        m = self.adaLN_modulation(c).unsqueeze(1).chunk(6, dim=-1)  # 6 x (N, 1, D)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = m
        x = x + gate_msa * self.attn(modulate(self.norm1(x), shift_msa, scale_msa), rotary)
        return x + gate_mlp * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))


class AdaLNBlock(nn.Module):
    """Attention and MLP, each shifted and scaled by the condition c (N, D)."""

    def __init__(self, sizes: Sizes):
        super().__init__()
        self.norm1 = normalization(sizes.norm, sizes.hidden_size, affine=False)
        self.attn = Attention(sizes)
        self.norm2 = normalization(sizes.norm, sizes.hidden_size, affine=False)
        self.mlp = feed_forward(sizes)
        self.adaLN_modulation = modulation(sizes.hidden_size, 4)

    def forward(self, x: Tensor, c: Tensor, rotary: Tensor | None) -> Tensor:
        shift_msa, scale_msa, shift_mlp, scale_mlp = self.adaLN_modulation(c).unsqueeze(1).chunk(4, dim=-1)
        x = x + self.attn(modulate(self.norm1(x), shift_msa, scale_msa), rotary)
        return x + self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))


class CrossAttentionBlock(nn.Module):
    """Self-attention, attention to the condition's tokens c (N, 1 + L, D), MLP."""

    def __init__(self, sizes: Sizes):
        super().__init__()
        self.norm1 = normalization(sizes.norm, sizes.hidden_size)
        self.attn = Attention(sizes)
        self.norm_cross = normalization(sizes.norm, sizes.hidden_size)
        self.cross_attn = CrossAttention(sizes)
        self.norm2 = normalization(sizes.norm, sizes.hidden_size)
        self.mlp = feed_forward(sizes)

    def forward(self, x: Tensor, c: Tensor, rotary: Tensor | None) -> Tensor:
        x = x + self.attn(self.norm1(x), rotary)
        x = x + self.cross_attn(self.norm_cross(x), c)
        return x + self.mlp(self.norm2(x))


class InContextBlock(nn.Module):
    """A plain transformer block: the condition's tokens are among those of x already."""

    def __init__(self, sizes: Sizes):
        super().__init__()
        self.norm1 = normalization(sizes.norm, sizes.hidden_size)
        self.attn = Attention(sizes)
        self.norm2 = normalization(sizes.norm, sizes.hidden_size)
        self.mlp = feed_forward(sizes)

    def forward(self, x: Tensor, c: Tensor, rotary: Tensor | None) -> Tensor:
        x = x + self.attn(self.norm1(x), rotary)
        return x + self.mlp(self.norm2(x))


DESIGNS = {
    "adaln_zero": AdaLNZeroBlock,
    "adaln": AdaLNBlock,
    "cross_attention": CrossAttentionBlock,
    "in_context": InContextBlock,
}
MODULATED = ("adaln_zero", "adaln")


class Attention(nn.Module):
    """Multi-head self-attention with one fused projection; (N, T, D) -> (N, T, D)."""

    def __init__(self, sizes: Sizes):
        super().__init__()
        D, self.num_heads = sizes.hidden_size, sizes.num_heads
        self.qkv = nn.Linear(D, 3 * D)
        self.q_norm, self.k_norm = query_key_norms(sizes)
        self.proj = nn.Linear(D, D)

    def forward(self, x: Tensor, rotary: Tensor | None = None) -> Tensor:
        N, T, D = x.shape
        q, k, v = self.qkv(x).view(N, T, 3, self.num_heads, D // self.num_heads).permute(2, 0, 3, 1, 4)
        q, k = self.q_norm(q), self.k_norm(k)  # (N, heads, T, D/heads)
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        x = F.scaled_dot_product_attention(q.type_as(v), k.type_as(v), v)
        return self.proj(x.transpose(1, 2).reshape(N, T, D))


class CrossAttention(nn.Module):
    """Multi-head attention of x (N, T, D) to c (N, L, D); gives (N, T, D)."""

    def __init__(self, sizes: Sizes):
        super().__init__()
        D, self.num_heads = sizes.hidden_size, sizes.num_heads
        self.q = nn.Linear(D, D)
        self.kv = nn.Linear(D, 2 * D)
        self.q_norm, self.k_norm = query_key_norms(sizes)
        self.proj = nn.Linear(D, D)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        (N, T, D), L, heads = x.shape, c.shape[1], self.num_heads
        q = self.q(x).view(N, T, heads, D // heads).transpose(1, 2)  # (N, heads, T, D/heads)
        k, v = self.kv(c).view(N, L, 2, heads, D // heads).permute(2, 0, 3, 1, 4)  # 2 x (N, heads, L, D/heads)
        q, k = self.q_norm(q), self.k_norm(k)
        x = F.scaled_dot_product_attention(q.type_as(v), k.type_as(v), v)
        return self.proj(x.transpose(1, 2).reshape(N, T, D))


class MLP(nn.Module):
    """Two linear layers with the tanh form of GELU between them."""

    def __init__(self, hidden_size: int, mlp_size: int):
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, mlp_size)
        self.fc2 = nn.Linear(mlp_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class SwiGLU(nn.Module):
    """(SiLU(x A) * x B) C (arXiv 2002.05202, equation 6); fc1 holds A and B, fc2 is C."""

    def __init__(self, hidden_size: int, mlp_size: int):
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, 2 * mlp_size)
        self.fc2 = nn.Linear(mlp_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(F.silu(gate) * value)


class FinalLayer(nn.Module):
    """Norm, modulated where the blocks are, and the projection to a patch's pixels; (N, T, D) -> (N, T, p*p*out)."""

    def __init__(self, sizes: Sizes, patch_size: int, out_channels: int, modulated: bool):
        super().__init__()
        D = sizes.hidden_size
        self.norm_final = normalization(sizes.norm, D, affine=not modulated)
        self.linear = nn.Linear(D, patch_size * patch_size * out_channels)
        self.adaLN_modulation = modulation(D, 2) if modulated else None

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        x = self.norm_final(x)
        if self.adaLN_modulation is not None:
            shift, scale = self.adaLN_modulation(c).unsqueeze(1).chunk(2, dim=-1)
            x = modulate(x, shift, scale)
        return self.linear(x)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (1 + scale) + shift."""
    return torch.addcmul(shift, x, 1 + scale)


def modulation(hidden_size: int, chunks: int) -> nn.Sequential:
    """The condition (N, D) -> (N, chunks D)."""
    return nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, chunks * hidden_size))


def normalization(kind: str, size: int, affine: bool = True) -> nn.Module:
    """LayerNorm, or RMSNorm (arXiv 1910.07467), of the last dimension."""
    kinds = {"layer": nn.LayerNorm, "rms": nn.RMSNorm}
    return kinds[kind](size, eps=EPS, elementwise_affine=affine)


def query_key_norms(sizes: Sizes) -> tuple[nn.Module, nn.Module]:
    """Norms of queries and keys over each head's channels (arXiv 2302.05442, section 2), or nothing."""
    if not sizes.qk_norm:
        return nn.Identity(), nn.Identity()
    head_size = sizes.hidden_size // sizes.num_heads
    return normalization(sizes.norm, head_size), normalization(sizes.norm, head_size)


def feed_forward(sizes: Sizes) -> nn.Module:
    """The block's MLP: both kinds have as many parameters, within 1%."""
    kinds = {"gelu": MLP, "swiglu": SwiGLU}
    return kinds[sizes.mlp](sizes.hidden_size, mlp_size(sizes))


def mlp_size(sizes: Sizes) -> int:
    """The MLP's inner width.

    SwiGLU has three matrices where GELU has two, so two thirds of the width: the largest power of two (128 at most,
    which tensor cores like) of which a multiple keeps the parameters within 1%; else the nearest whole number.
    """
    D, gelu = sizes.hidden_size, int(sizes.hidden_size * sizes.mlp_ratio)
    if sizes.mlp == "gelu":
        return gelu
    equal = gelu * (2 * D + 1) / (3 * D + 2)  # from gelu (2 D + 1) = width (3 D + 2), weights and biases
    for multiple in (128, 64, 32, 16, 8, 4, 2):
        width = round(equal / multiple) * multiple
        if abs(width / equal - 1) <= 0.01:
            return width
    return max(1, round(equal))
