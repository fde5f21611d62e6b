"""Exponential moving average of the weights."""

from collections.abc import Sequence

import torch
from torch import Tensor


def decay_at(step: int, decay: float, warmup: bool) -> float:
    """The decay of update number `step` (0-based).

    Without warm-up it is constant, as DiT was trained. With it, min(decay, (1 + step) / (10 + step)): a short run's
    average would else be ruled by its random start.
    """
    return min(decay, (1 + step) / (10 + step)) if warmup else decay


@torch.no_grad()
def update(averages: Sequence[Tensor], weights: Sequence[Tensor], decay: float) -> None:
    """averages <- decay * averages + (1 - decay) * weights, in place, all tensors in one call."""
    torch._foreach_lerp_(list(averages), list(weights), 1 - decay)
