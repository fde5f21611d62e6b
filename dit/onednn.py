"""Matrix products by oneDNN, which uses the whole vector unit of any x86 processor, forward and backward.

MKL, which torch asks otherwise, uses half of it where the processor is not Intel's.
"""

import platform

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable


def available() -> bool:
    """Whether this is an x86 processor and a torch that has oneDNN, enabled."""
    return (
        platform.machine().lower() in ("x86_64", "amd64")
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str = "none") -> Tensor:
    """x W^T + b by oneDNN, and the tanh form of GELU of it where `activation` is "gelu"; autograd does not see it.

    This is what torch.compile makes of such layers; there is no public name for it.
    """
    algorithm = "tanh" if activation == "gelu" else ""
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, activation, [], algorithm)


def input_gradient(gradient: Tensor, weight: Tensor) -> Tensor:
    """The gradient (..., in) of a linear layer's input from that of its output (..., out)."""
    return linear(gradient, weight.t(), None)


def parameter_gradients(gradient: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of a linear layer's weight (out, in) and bias (out,) from its output's (..., out) and its input."""
    gradient, x = gradient.reshape(-1, gradient.shape[-1]), x.reshape(-1, x.shape[-1])
    return linear(gradient.t(), x.t(), None), gradient.sum(0)


class Linear(Function):
    """`linear` that autograd sees: Linear.apply(x, weight, bias)."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_x = input_gradient(gradient, weight) if ctx.needs_input_grad[0] else None
        return of_x, *parameter_gradients(gradient, x)
