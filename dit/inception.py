"""The Inception network that published FIDs are made with, as a table of convolutions and one forward pass.

Rethinking the Inception Architecture, arXiv 1512.00567, in the shape of TensorFlow's graph of 2015-12-05: average pools
that leave the padding out, a maximum pool in the last block, 1008 classes. The names are those of the weights file.
Batch normalisation is a scale and a shift once the weights stand still, so it is folded into the convolutions.
"""

import pickle
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

SIDE = 299
SPATIAL_CHANNELS = 7  # sFID's: the first of `mixed_6/conv`, which the weights file calls Mixed_6d.branch1x1
WIDTHS = {"pooled": 2048, "spatial": 17 * 17 * SPATIAL_CHANNELS, "logits": 1008}
BATCH_NORM_EPSILON = 1e-3


class Inception:
    """uint8 images (N, 3, H, W) -> pooled (N, 2048), spatial (N, 2023), logits (N, 1008) without bias, float32."""

    def __init__(self, tensors: dict[str, Tensor], device: torch.device | str = "cpu"):
        self.device = torch.device(device)
        self.convolutions = {name: _placed(folded, self.device) for name, folded in _fold(tensors).items()}
        self.classes = tensors["fc.weight"].float().to(self.device)

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        x = resized(images.to(self.device).float())
        x = ((x - 128) / 128).contiguous(memory_format=torch.channels_last)
        x = self._conv(x, "Conv2d_1a_3x3", stride=2, padding=0)  # (N, 32, 149, 149)
        x = self._conv(x, "Conv2d_2a_3x3", padding=0)
        x = F.max_pool2d(self._conv(x, "Conv2d_2b_3x3"), 3, 2)  # (N, 64, 73, 73)
        x = self._conv(self._conv(x, "Conv2d_3b_1x1"), "Conv2d_4a_3x3", padding=0)
        x = F.max_pool2d(x, 3, 2)  # (N, 192, 35, 35)
        for block in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
            x = self._block_a(x, block)
        x = self._reduce(x, "Mixed_6a", ("branch3x3",), ("branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"))
        for block in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"):
            x = self._block_c(x, block)  # (N, 768, 17, 17)
            if block == "Mixed_6d":
                spatial = spatial_features(x)
        long = ("branch7x7x3_1", "branch7x7x3_2", "branch7x7x3_3", "branch7x7x3_4")
        x = self._reduce(x, "Mixed_7a", ("branch3x3_1", "branch3x3_2"), long)
        x = self._block_e(x, "Mixed_7b", mean_of_neighbours)
        x = self._block_e(x, "Mixed_7c", lambda x: F.max_pool2d(x, 3, 1, 1))  # (N, 2048, 8, 8)
        pooled = x.mean(dim=(2, 3))
        return {"pooled": pooled, "spatial": spatial, "logits": pooled @ self.classes.T}

    def _conv(self, x: Tensor, name: str, stride: int = 1, padding: int | None = None) -> Tensor:
        """Convolution, batch normalisation and ReLU; the side stays as it is unless `padding` or `stride` tell."""
        weight, bias = self.convolutions[name]
        same = [side // 2 for side in weight.shape[2:]]
        return F.relu_(F.conv2d(x, weight, bias, stride, same if padding is None else padding))

    def _chain(self, x: Tensor, block: str, *names: str) -> Tensor:
        for name in names:
            x = self._conv(x, f"{block}.{name}")
        return x

    def _block_a(self, x: Tensor, block: str) -> Tensor:
        branches = (
            self._chain(x, block, "branch1x1"),
            self._chain(x, block, "branch5x5_1", "branch5x5_2"),
            self._chain(x, block, "branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"),
            self._chain(mean_of_neighbours(x), block, "branch_pool"),
        )
        return torch.cat(branches, 1)

    def _block_c(self, x: Tensor, block: str) -> Tensor:
        branches = (
            self._chain(x, block, "branch1x1"),
            self._chain(x, block, *(f"branch7x7_{i}" for i in (1, 2, 3))),
            self._chain(x, block, *(f"branch7x7dbl_{i}" for i in (1, 2, 3, 4, 5))),
            self._chain(mean_of_neighbours(x), block, "branch_pool"),
        )
        return torch.cat(branches, 1)

    def _block_e(self, x: Tensor, block: str, pool) -> Tensor:
        short = self._chain(x, block, "branch3x3_1")
        long = self._chain(x, block, "branch3x3dbl_1", "branch3x3dbl_2")
        branches = (
            self._chain(x, block, "branch1x1"),
            self._chain(short, block, "branch3x3_2a"),
            self._chain(short, block, "branch3x3_2b"),
            self._chain(long, block, "branch3x3dbl_3a"),
            self._chain(long, block, "branch3x3dbl_3b"),
            self._chain(pool(x), block, "branch_pool"),
        )
        return torch.cat(branches, 1)

    def _reduce(self, x: Tensor, block: str, *chains: tuple[str, ...]) -> Tensor:
        """Halve the side: the last convolution of each chain has stride 2, and so has the pool."""
        ends = [
            self._conv(self._chain(x, block, *names[:-1]), f"{block}.{names[-1]}", stride=2, padding=0)
            for names in chains
        ]
        return torch.cat([*ends, F.max_pool2d(x, 3, 2)], 1)


def spatial_features(x: Tensor) -> Tensor:
    """sFID's features of a block's output (N, C, H, W): its first seven channels by height, width, channel."""
    return x[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)


def mean_of_neighbours(x: Tensor) -> Tensor:
    """The mean of 3 x 3 places; at the border, of those that there are."""
    return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


def resized(images: Tensor, side: int = SIDE) -> Tensor:
    """Images (N, C, H, W) float32 -> (N, C, side, side) as TensorFlow 1 does it.

    Bilinear, and an output pixel's place is its number times the ratio of the sides: no half pixels, no antialiasing.
    """
    down, right = (_places(length, side, images.device) for length in images.shape[2:])
    left = images[..., right[0]]
    x = left + (images[..., right[1]] - left) * right[2]
    top = x[:, :, down[0]]
    return top + (x[:, :, down[1]] - top) * down[2][:, None]


def _places(length: int, side: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """For each output pixel: the pixel before its place, the one after it, and how far between them it lies."""
    place = torch.arange(side, dtype=torch.float32, device=device) * torch.tensor(length / side, dtype=torch.float32)
    low = place.long()
    return low, (low + 1).clamp_max(length - 1), place - low


def _fold(tensors: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Each convolution's weight and bias with the batch normalisation after it, folded in float64."""
    folded = {}
    for name in (key.removesuffix(".conv.weight") for key in tensors if key.endswith(".conv.weight")):
        gamma, beta, mean, variance = (
            tensors[f"{name}.bn.{part}"].double() for part in ("weight", "bias", "running_mean", "running_var")
        )
        scale = gamma / (variance + BATCH_NORM_EPSILON).sqrt()
        weight = tensors[f"{name}.conv.weight"].double() * scale[:, None, None, None]
        folded[name] = (weight.float(), (beta - mean * scale).float())
    return folded


def _placed(folded: tuple[Tensor, Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    weight, bias = folded
    return weight.to(device, memory_format=torch.channels_last), bias.to(device)


def load_inception(path: Path, device: torch.device | str = "cpu") -> Inception:
    """Raises ValueError where the file does not hold this network's weights. Nothing in it is run."""
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
        told = Inception(tensors)(torch.zeros(1, 3, 1, 1, dtype=torch.uint8))
    except (KeyError, TypeError, AttributeError, RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:120]
        raise ValueError(
            f"{path} does not hold the weights of Inception ({reason}): name torch-fidelity's file"
        ) from None
    assert {layer: features.shape[1] for layer, features in told.items()} == WIDTHS
    return Inception(tensors, device)
