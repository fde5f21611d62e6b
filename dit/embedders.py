"""What the transformer is given: patches, times, labels and embeddings as vectors, positions as tables.

Shapes: N batch, C latent channels, H W latent side, p patch size, T tokens = (H/p)(W/p), D hidden size; a condition is
a sequence of L tokens (a label: one).
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FREQUENCY_EMBEDDING_SIZE = 256
Convention = Literal["published", "diffusers"]


class PatchEmbed(nn.Module):
    """(N, C, H, W) -> (N, T, D), tokens row by row."""

    def __init__(self, in_channels: int, hidden_size: int, patch_size: int):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden_size, patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class TimestepEmbedder(nn.Module):
    """Sinusoidal features of t (N,), then a two-layer MLP; gives (N, D).

    Autocast has no part in it: in bf16 it would give times in [0, 1] that lie close together one and the same embedding.
    """

    def __init__(self, hidden_size: int, convention: Convention = "published"):
        super().__init__()
        self.convention = convention
        self.mlp = nn.Sequential(
            nn.Linear(FREQUENCY_EMBEDDING_SIZE, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )

    def forward(self, t: Tensor) -> Tensor:
        features = timestep_embedding(t, FREQUENCY_EMBEDDING_SIZE, convention=self.convention)
        kind = t.device.type
        with torch.autocast(kind if torch.amp.is_autocast_available(kind) else "cpu", enabled=False):  # meta has none
            return self.mlp(features.to(self.mlp[0].weight.dtype))


class LabelEmbedder(nn.Module):
    """A table of num_classes + 1 rows, the last one the null label's; labels (N,) -> (N, 1, D)."""

    def __init__(self, num_classes: int, hidden_size: int):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, hidden_size)

    def forward(self, y: Tensor) -> Tensor:
        return self.embedding_table(y).unsqueeze(1)


class SequenceEmbedder(nn.Module):
    """A two-layer MLP on every token of a sequence of embeddings; (N, L, E) -> (N, L, D).

    Zeros stand for "no condition": what the MLP makes of them, by its biases, is learned.
    """

    def __init__(self, channels: int, hidden_size: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(channels, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, y: Tensor) -> Tensor:
        return self.mlp(y.to(self.mlp[0].weight.dtype))


def timestep_embedding(
    t: Tensor, dim: int, max_period: float = 10000.0, convention: Convention = "published"
) -> Tensor:
    """cos and sin of t at h = `dim`/2 frequencies max_period^(-k/h), in float32; (N,) -> (N, dim).

    The published models divide k by h. diffusers' DiT divides it by h - 1, for which no weights can make up.
    """
    half = dim // 2
    last = half if convention == "published" else half - 1
    frequencies = torch.exp(-math.log(max_period) * torch.arange(half, dtype=torch.float32, device=t.device) / last)
    angles = t.float()[:, None] * frequencies
    embedding = torch.cat([angles.cos(), angles.sin()], dim=-1)
    return F.pad(embedding, (0, dim % 2))


def position_embedding(dim: int, grid: int) -> Tensor:
    """Fixed 2-D sine-cosine table (grid*grid, dim): the column's half first, then the row's; computed in float64."""
    halves = []
    for angles in _position_angles(dim // 4, grid):
        halves += [angles.sin(), angles.cos()]
    return torch.cat(halves, dim=1).float()


def rotary_embedding(head_size: int, grid: int, num_appended: int = 0) -> Tensor:
    """cos and sin of the angles by which `rotate` turns a head's channels: (2, grid*grid + num_appended, head_size/2).

    Rotary positions (arXiv 2104.09864, section 3.2) in two dimensions: half of the pairs of channels turn with the
    column, half with the row. Tokens appended to the image's stay as they are (angle 0).
    """
    angles = torch.cat(_position_angles(head_size // 4, grid), dim=1)
    angles = F.pad(angles, (0, 0, 0, num_appended))
    return torch.stack([angles.cos(), angles.sin()]).float()


def rotate(x: Tensor, rotary: Tensor) -> Tensor:
    """Turn channels i and i + half of each head of x (N, heads, T, head_size) by the angles of `rotary`."""
    cos, sin = rotary
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).type_as(x)


def unpatchify(x: Tensor, patch_size: int) -> Tensor:
    """(N, T, p*p*C), each token laid out row, column, channel -> (N, C, H, W)."""
    N, T, _ = x.shape
    p, grid = patch_size, math.isqrt(T)
    x = x.view(N, grid, grid, p, p, -1)
    return torch.einsum("nhwpqc->nchpwq", x).reshape(N, -1, grid * p, grid * p)


def _position_angles(num_frequencies: int, grid: int) -> list[Tensor]:
    # Column, then row, of each token times 10000^(-k/num_frequencies): 2 x (grid*grid, num_frequencies), float64.
    k = torch.arange(num_frequencies, dtype=torch.float64)
    omega = 10000 ** (-k / num_frequencies)
    row, column = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
    return [position.reshape(-1, 1).double() * omega for position in (column, row)]
