"""Learning-rate schedules, as factors of the peak rate."""

import math


def warmup_cosine(step: int, max_steps: int, warmup_steps: int) -> float:
    """A factor for the learning rate: up in a straight line, then down to 0 along a half cosine."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, max_steps - warmup_steps)))
