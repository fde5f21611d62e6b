"""Matrix products by oneDNN, which uses the whole vector unit of any x86 processor.

MKL, which torch asks otherwise, uses half of it where the processor is not Intel's.
"""

import platform

import torch
from torch import Tensor


def available() -> bool:
    """Whether this is an x86 processor and a torch that has oneDNN, enabled."""
    return (
        platform.machine().lower() in ("x86_64", "amd64")
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor, activation: str = "none") -> Tensor:
    """x W^T + b by oneDNN, and the tanh form of GELU of it where `activation` is "gelu".

    This is what torch.compile makes of such layers; there is no public name for it.
    """
    algorithm = "tanh" if activation == "gelu" else ""
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, activation, [], algorithm)
