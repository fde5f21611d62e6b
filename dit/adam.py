"""AdamW (arXiv 1711.05101, algorithm 2, decoupled decay) that can skip a step without anybody having to ask the device."""

from collections.abc import Sequence

import torch
from torch import Tensor

EPS = 1e-8
FUSED = ("cpu", "cuda")  # where torch has one kernel for all parameters, which can be told on the device to do nothing


class Adam:
    """The moments of some parameters, and how many steps they have learned in.

    `first` and `second` are like the parameters, sharded where those are; `count` () float32 lies beside them: steps
    that were skipped do not count.
    """

    def __init__(self, parameters: Sequence[Tensor], *, betas: tuple[float, float], weight_decay: float):
        self.parameters, self.betas, self.weight_decay = list(parameters), betas, weight_decay
        self.first, self.second = ([torch.zeros_like(p).detach() for p in self.parameters] for _ in range(2))
        self._moments = here(self.first), here(self.second)
        self._weights = here(self.parameters)
        self.count = torch.zeros((), device=self._weights[0].device)

    def gradients(self) -> list[Tensor]:
        """This process's part of each gradient."""
        return here([parameter.grad for parameter in self.parameters])

    @torch.no_grad()
    def step(self, lr: float, skip: Tensor) -> None:
        """One update by the gradients; where `skip` () is 1 and not 0, nothing changes."""
        update = self._fused if self.count.device.type in FUSED else self._written
        update(self._weights, self.gradients(), *self._moments, lr, skip)

    def _fused(
        self, weights: list[Tensor], gradients: list[Tensor], first: list[Tensor], second: list[Tensor], lr: float,
        skip: Tensor,
    ) -> None:  # fmt: skip
        self.count += 1
        torch._fused_adamw_(
            weights,
            gradients,
            first,
            second,
            [],
            [self.count] * len(weights),
            lr=lr,
            beta1=self.betas[0],
            beta2=self.betas[1],
            weight_decay=self.weight_decay,
            eps=EPS,
            amsgrad=False,
            maximize=False,
            found_inf=skip,
        )
        self.count -= skip

    def _written(
        self, weights: list[Tensor], gradients: list[Tensor], first: list[Tensor], second: list[Tensor], lr: float,
        skip: Tensor,
    ) -> None:  # fmt: skip
        """The formulas, for a device without the kernel: with a rate and a memory of 0 where the step is skipped."""
        beta1, beta2 = self.betas
        keep = 1 - skip
        self.count += keep
        t = self.count.clamp(min=1)  # 0 where the very first is skipped
        unbias1, unbias2 = 1 - beta1**t, (1 - beta2**t).sqrt()
        for weight, gradient, m, v in zip(weights, gradients, first, second, strict=True):
            gradient = torch.where(skip.bool(), 0.0, gradient)
            m.lerp_(gradient, keep * (1 - beta1))
            v.lerp_(gradient.square(), keep * (1 - beta2))
            weight.mul_(1 - keep * lr * self.weight_decay)
            weight.sub_(keep * lr / unbias1 * m / (v.sqrt() / unbias2 + EPS))


def here(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The parts that this process holds, of the same memory: a sharded tensor's (DTensor) own, all of any other."""
    tensors = [tensor.detach() for tensor in tensors]
    return [tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors]
