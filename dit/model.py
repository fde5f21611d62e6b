"""The diffusion transformer of "Scalable Diffusion Models with Transformers" (arXiv 2212.09748), adaLN-Zero blocks.

Shapes: N batch, C latent channels, H W latent side, p patch size, T tokens = (H/p)(W/p), D hidden size.
"""

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# depth, hidden size, heads (table 1 of the paper)
SIZES = {
    "DiT-S": (12, 384, 6),
    "DiT-B": (12, 768, 12),
    "DiT-L": (24, 1024, 16),
    "DiT-XL": (28, 1152, 16),
}
PATCH_SIZES = (2, 4, 8)
FREQUENCY_EMBEDDING_SIZE = 256


@dataclass(frozen=True)
class ModelConfig:
    """The network's size: a name of the paper's (`DiT-XL/2`), or `custom` and the sizes below it."""

    name: str
    patch_size: int | None = None
    hidden_size: int | None = None
    depth: int | None = None
    num_heads: int | None = None
    mlp_ratio: float = 4.0
    learn_sigma: bool = True  # two output channels per latent channel: prediction and variance

    def __post_init__(self) -> None:
        sizes = {k: getattr(self, k) for k in ("patch_size", "hidden_size", "depth", "num_heads")}
        if self.name != "custom":
            size, _, patch = self.name.partition("/")
            if size not in SIZES or patch not in map(str, PATCH_SIZES):
                raise ValueError(f"name must be custom or one of {{{','.join(SIZES)}}}/{{2,4,8}}, got {self.name!r}")
            given = [k for k, v in sizes.items() if v is not None]
            if given:
                raise ValueError(
                    f"{given[0]} is already said by model.name {self.name!r}: set it to null, or name to custom"
                )
            return
        for key, value in sizes.items():
            if value is None or value < 1:
                raise ValueError(f"{key} must be a whole number of at least 1 where model.name is custom, got {value}")
        if self.hidden_size % self.num_heads or self.hidden_size % 4:
            raise ValueError(f"hidden_size must be a multiple of num_heads and of 4, got {self.hidden_size}")
        if self.mlp_ratio <= 0:
            raise ValueError(f"mlp_ratio must be above 0, got {self.mlp_ratio}")

    def resolved(self) -> "ModelConfig":
        """The same network with every size spelled out."""
        if self.name == "custom":
            return self
        size, _, patch = self.name.partition("/")
        depth, hidden_size, num_heads = SIZES[size]
        return replace(
            self, name="custom", patch_size=int(patch), hidden_size=hidden_size, depth=depth, num_heads=num_heads
        )


class DiT(nn.Module):
    """`forward(x, t, y)` with x (N, C, H, W), t (N,) and labels y (N,) gives (N, C or 2C, H, W).

    t may be fractional. The label `null_label` (= num_classes) stands for "no class"; an unconditional network has
    num_classes 0 and sees nothing else. Guidance, label dropout and losses are not the network's business.

    Raises ValueError where the patch size does not divide the latent side.
    """

    def __init__(self, config: ModelConfig, *, input_size: int, in_channels: int, num_classes: int):
        super().__init__()
        config = config.resolved()
        if input_size % config.patch_size:
            raise ValueError(f"model.patch_size {config.patch_size} does not divide the latent side {input_size}")
        self.config, self.input_size, self.in_channels, self.num_classes = config, input_size, in_channels, num_classes
        self.null_label = num_classes
        self.out_channels = in_channels * (2 if config.learn_sigma else 1)
        self.patch_size = config.patch_size
        D, grid = config.hidden_size, input_size // config.patch_size
        self.x_embedder = PatchEmbed(in_channels, D, config.patch_size)
        self.t_embedder = TimestepEmbedder(D)
        self.y_embedder = LabelEmbedder(num_classes, D)
        # A buffer: fixed, yet part of the state dict as in the published checkpoints.
        self.register_buffer("pos_embed", position_embedding(D, grid).unsqueeze(0))
        self.blocks = nn.ModuleList(DiTBlock(D, config.num_heads, config.mlp_ratio) for _ in range(config.depth))
        self.final_layer = FinalLayer(D, config.patch_size, self.out_channels)
        initialize(self)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        x = self.x_embedder(x) + self.pos_embed  # (N, T, D)
        c = self.t_embedder(t) + self.y_embedder(y)  # (N, D)
        for block in self.blocks:
            x = block(x, c)  # (N, T, D)
        x = self.final_layer(x, c)  # (N, T, p*p*out_channels)
        return unpatchify(x, self.patch_size)  # (N, out_channels, H, W)


class DiTBlock(nn.Module):
    """Attention and MLP, each shifted, scaled and gated by the condition (section 3.2, adaLN-Zero)."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(hidden_size, num_heads)
        self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.mlp = MLP(hidden_size, int(hidden_size * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        m = self.adaLN_modulation(c).unsqueeze(1).chunk(6, dim=-1)  # 6 x (N, 1, D)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = m
        x = x + gate_msa * self.attn(modulate(self.norm1(x), shift_msa, scale_msa))
        return x + gate_mlp * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))


class Attention(nn.Module):
    """Multi-head self-attention with one fused projection; (N, T, D) -> (N, T, D)."""

    def __init__(self, hidden_size: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        N, T, D = x.shape
        q, k, v = self.qkv(x).view(N, T, 3, self.num_heads, D // self.num_heads).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v)  # (N, heads, T, D/heads)
        return self.proj(x.transpose(1, 2).reshape(N, T, D))


class MLP(nn.Module):
    """Two linear layers with the tanh form of GELU between them."""

    def __init__(self, hidden_size: int, mlp_size: int):
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, mlp_size)
        self.fc2 = nn.Linear(mlp_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class FinalLayer(nn.Module):
    """Modulated norm and the projection to pixels of a patch; (N, T, D) -> (N, T, p*p*out_channels)."""

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int):
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).unsqueeze(1).chunk(2, dim=-1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class PatchEmbed(nn.Module):
    """(N, C, H, W) -> (N, T, D), tokens row by row."""

    def __init__(self, in_channels: int, hidden_size: int, patch_size: int):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden_size, patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class TimestepEmbedder(nn.Module):
    """Sinusoidal features of t (N,), then a two-layer MLP; gives (N, D)."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(FREQUENCY_EMBEDDING_SIZE, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )

    def forward(self, t: Tensor) -> Tensor:
        return self.mlp(timestep_embedding(t, FREQUENCY_EMBEDDING_SIZE).to(self.mlp[0].weight.dtype))


class LabelEmbedder(nn.Module):
    """A table of num_classes + 1 rows; the last is the null label's."""

    def __init__(self, num_classes: int, hidden_size: int):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, hidden_size)

    def forward(self, y: Tensor) -> Tensor:
        return self.embedding_table(y)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (1 + scale) + shift."""
    return torch.addcmul(shift, x, 1 + scale)


def timestep_embedding(t: Tensor, dim: int, max_period: float = 10000.0) -> Tensor:
    """cos and sin of t at `dim`/2 frequencies max_period^(-k/(dim/2)), in float32; (N,) -> (N, dim)."""
    half = dim // 2
    frequencies = torch.exp(-math.log(max_period) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angles = t.float()[:, None] * frequencies
    embedding = torch.cat([angles.cos(), angles.sin()], dim=-1)
    return F.pad(embedding, (0, dim % 2))


def position_embedding(dim: int, grid: int) -> Tensor:
    """Fixed 2-D sine-cosine table (grid*grid, dim): the column's half first, then the row's; computed in float64."""
    k = torch.arange(dim // 4, dtype=torch.float64)
    omega = 10000 ** (-k / (dim / 4))
    row, column = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
    halves = []
    for position in (column, row):
        angles = position.reshape(-1, 1).double() * omega
        halves += [angles.sin(), angles.cos()]
    return torch.cat(halves, dim=1).float()


def unpatchify(x: Tensor, patch_size: int) -> Tensor:
    """(N, T, p*p*C), each token laid out row, column, channel -> (N, C, H, W)."""
    N, T, _ = x.shape
    p, grid = patch_size, math.isqrt(T)
    x = x.view(N, grid, grid, p, p, -1)
    return torch.einsum("nhwpqc->nchpwq", x).reshape(N, -1, grid * p, grid * p)


def initialize(model: DiT) -> None:
    """Draw all weights.

    | parameter                                   | distribution                                    |
    |---------------------------------------------|-------------------------------------------------|
    | every linear weight not named below         | Xavier uniform (qkv on the fused (3D, D) matrix) |
    | every bias                                  | 0                                               |
    | x_embedder.proj.weight                      | Xavier uniform on its (D, C p p) view            |
    | y_embedder.embedding_table, t_embedder.mlp  | N(0, 0.02)                                      |
    | blocks.*.adaLN_modulation.1                 | 0: each block begins as the identity            |
    | final_layer.adaLN_modulation.1, .linear     | 0: the network begins by predicting 0           |
    """
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    nn.init.xavier_uniform_(model.x_embedder.proj.weight.view(model.config.hidden_size, -1))
    nn.init.zeros_(model.x_embedder.proj.bias)
    nn.init.normal_(model.y_embedder.embedding_table.weight, std=0.02)
    for layer in (model.t_embedder.mlp[0], model.t_embedder.mlp[2]):
        nn.init.normal_(layer.weight, std=0.02)
    for layer in [block.adaLN_modulation[1] for block in model.blocks] + [
        model.final_layer.adaLN_modulation[1],
        model.final_layer.linear,
    ]:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
