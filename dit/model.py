"""The diffusion transformer of "Scalable Diffusion Models with Transformers" (arXiv 2212.09748): sizes, assembly, init.

Shapes: N batch, C latent channels, H W latent side, p patch size, T tokens = (H/p)(W/p), D hidden size; the condition y
is a label or a sequence of L embeddings of E channels.
"""

from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from dit.blocks import DESIGNS, MODULATED, FinalLayer
from dit.embedders import (
    Convention,
    LabelEmbedder,
    PatchEmbed,
    SequenceEmbedder,
    TimestepEmbedder,
    position_embedding,
    rotary_embedding,
    unpatchify,
)

# depth, hidden size, heads (table 1 of the paper)
SIZES = {
    "DiT-S": (12, 384, 6),
    "DiT-B": (12, 768, 12),
    "DiT-L": (24, 1024, 16),
    "DiT-XL": (28, 1152, 16),
}
PATCH_SIZES = (2, 4, 8)

Block = Literal["adaln_zero", "adaln", "cross_attention", "in_context"]
Condition = Literal["classes", "none", "embeddings"]
Norm = Literal["layer", "rms"]
Mlp = Literal["gelu", "swiglu"]
CHOICES = {"block": Block, "condition": Condition, "timestep_embedding": Convention, "norm": Norm, "mlp": Mlp}


@dataclass(frozen=True)
class ModelConfig:
    """The network's size, a name of the paper's (`DiT-XL/2`) or `custom` and the sizes below it, and its design.

    The defaults after the sizes are the published network. Raises ValueError that begins with the field's name.
    """

    name: str
    patch_size: int | None = None
    hidden_size: int | None = None
    depth: int | None = None
    num_heads: int | None = None
    mlp_ratio: float = 4.0
    learn_sigma: bool = True  # two output channels per latent channel: prediction and variance
    block: Block = "adaln_zero"
    condition: Condition = "classes"
    timestep_embedding: Convention = "published"  # frequencies k/128; diffusers: k/127
    norm: Norm = "layer"
    mlp: Mlp = "gelu"  # swiglu: two thirds of the width, as many parameters, within 1%
    rotary: bool = False  # 2-D rotary positions on queries and keys, beside the sine-cosine table
    qk_norm: bool = False

    def __post_init__(self) -> None:
        for key, choices in CHOICES.items():
            if getattr(self, key) not in get_args(choices):
                raise ValueError(f"{key} must be one of {', '.join(get_args(choices))}, got {getattr(self, key)!r}")
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
        else:
            for key, value in sizes.items():
                if value is None or value < 1:
                    raise ValueError(
                        f"{key} must be a whole number of at least 1 where model.name is custom, got {value}"
                    )
            if self.hidden_size % self.num_heads or self.hidden_size % 4:
                raise ValueError(f"hidden_size must be a multiple of num_heads and of 4, got {self.hidden_size}")
            if self.rotary and self.hidden_size // self.num_heads % 4:
                raise ValueError(
                    f"rotary needs heads of a multiple of 4 channels, got hidden_size {self.hidden_size} / "
                    f"num_heads {self.num_heads} = {self.hidden_size // self.num_heads}: change one, or rotary to false"
                )
        if self.mlp_ratio <= 0:
            raise ValueError(f"mlp_ratio must be above 0, got {self.mlp_ratio}")
        width = self.hidden_size if self.name == "custom" else SIZES[size][1]
        if width * self.mlp_ratio < 1:
            raise ValueError(f"mlp_ratio must leave the MLP a width of at least 1, got {self.mlp_ratio}")

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
    """`forward(x, t, y)` with x (N, C, H, W), t (N,) and y gives (N, C or 2C, H, W).

    t may be fractional. y is what `config.condition` says: labels (N,), where `null_label` (= num_classes) stands for
    "no class"; "none": labels that are all 0; "embeddings": (N, L, E), where `condition_shape` is (L, E) and zeros
    stand for "no condition". `null(N)` is the y of no condition. Guidance, dropout of conditions and losses are not
    the network's business.

    Raises ValueError where the patch size does not divide the latent side, or embeddings come without their shape.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        input_size: int,
        in_channels: int,
        num_classes: int,
        condition_shape: tuple[int, int] | None = None,
    ):
        super().__init__()
        config = config.resolved()
        if input_size % config.patch_size:
            raise ValueError(f"model.patch_size {config.patch_size} does not divide the latent side {input_size}")
        by_sequence = config.condition == "embeddings"
        if by_sequence and (condition_shape is None or min(condition_shape) < 1):
            raise ValueError(
                f"model.condition embeddings needs the shape (tokens, channels) of an image's, got {condition_shape}"
            )
        self.config, self.input_size, self.in_channels = config, input_size, in_channels
        self.num_classes = self.null_label = 0 if config.condition == "none" else num_classes
        self.condition_shape = tuple(condition_shape) if by_sequence else None
        self.out_channels = in_channels * (2 if config.learn_sigma else 1)
        self.patch_size = config.patch_size
        D, grid, modulated = config.hidden_size, input_size // config.patch_size, config.block in MODULATED
        self.x_embedder = PatchEmbed(in_channels, D, config.patch_size)
        self.t_embedder = TimestepEmbedder(D, config.timestep_embedding)
        self.y_embedder = (
            SequenceEmbedder(self.condition_shape[1], D) if by_sequence else LabelEmbedder(self.num_classes, D)
        )
        # A buffer: fixed, yet part of the state dict as in the published checkpoints.
        self.register_buffer("pos_embed", position_embedding(D, grid).unsqueeze(0))
        appended = (1 + (condition_shape[0] if by_sequence else 1)) if config.block == "in_context" else 0
        rotary = rotary_embedding(D // config.num_heads, grid, appended) if config.rotary else None
        self.register_buffer("rotary", rotary, persistent=False)
        self.blocks = nn.ModuleList(DESIGNS[config.block](config) for _ in range(config.depth))
        self.final_layer = FinalLayer(config, config.patch_size, self.out_channels, modulated)
        initialize(self)

    def forward(self, x: Tensor, t: Tensor, y: Tensor, *, tap: int | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """The prediction; with `tap` = k also the image's tokens (N, T, D) as they leave block k (counted from 1)."""
        if tap is not None and not 1 <= tap <= len(self.blocks):
            raise ValueError(f"tap must be a block from 1 to {len(self.blocks)}, got {tap}")
        x = self.x_embedder(x) + self.pos_embed  # (N, T, D)
        t, y, T = self.t_embedder(t), self.y_embedder(y), x.shape[1]  # (N, D), (N, L, D)
        c = t + y.mean(dim=1) if self.config.block in MODULATED else torch.cat([t.unsqueeze(1), y], dim=1)
        if self.config.block == "in_context":
            x = torch.cat([x, c], dim=1)  # (N, T + 1 + L, D)
        for number, block in enumerate(self.blocks, start=1):
            x = block(x, c, self.rotary)
            if number == tap:
                tapped = x[:, :T]
        x = self.final_layer(x[:, :T], c)  # (N, T, p*p*out_channels)
        x = unpatchify(x, self.patch_size)  # (N, out_channels, H, W)
        return x if tap is None else (x, tapped)

    def null(self, N: int) -> Tensor:
        """The y of N images that stands for "no condition", on the network's device."""
        device = self.pos_embed.device
        if self.condition_shape:
            return torch.zeros(N, *self.condition_shape, device=device)
        return torch.full((N,), self.null_label, device=device)


def initialize(model: DiT) -> None:
    """Draw all weights.

    | parameter                                   | distribution                                    |
    |---------------------------------------------|-------------------------------------------------|
    | every linear weight not named below         | Xavier uniform (qkv on the fused (3D, D) matrix) |
    | every bias                                  | 0                                               |
    | x_embedder.proj.weight                      | Xavier uniform on its (D, C p p) view            |
    | t_embedder.mlp; y_embedder's table or mlp   | N(0, 0.02)                                      |
    | blocks.*.adaLN_modulation.1                 | 0: adaln_zero's blocks begin as the identity,   |
    |                                             | adaln's as plain blocks                         |
    | final_layer.adaLN_modulation.1, .linear     | 0: the network begins by predicting 0           |
    | norms with weights of their own             | weight 1, bias 0                                |
    """
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    nn.init.xavier_uniform_(model.x_embedder.proj.weight.view(model.config.hidden_size, -1))
    nn.init.zeros_(model.x_embedder.proj.bias)
    by_sequence = isinstance(model.y_embedder, SequenceEmbedder)
    conditions = (
        [model.y_embedder.mlp[0], model.y_embedder.mlp[2]] if by_sequence else [model.y_embedder.embedding_table]
    )
    for layer in (*conditions, model.t_embedder.mlp[0], model.t_embedder.mlp[2]):
        nn.init.normal_(layer.weight, std=0.02)
    modulations = (
        [layer.adaLN_modulation for layer in (*model.blocks, model.final_layer)]
        if model.config.block in MODULATED
        else []
    )
    for layer in [*(modulation[1] for modulation in modulations), model.final_layer.linear]:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
