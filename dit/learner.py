"""All tensors that a training changes: the weights and their moments, the averages, the alignment's projector; and what
each is called in a saved state.

Where the network is sharded (FSDP), all of them are: every process holds and changes its part.
"""

from collections.abc import Sequence

import torch
import torch.distributed
from torch import Tensor, nn

from dit import ema
from dit.adam import Adam, here
from dit.checkpoint import build, network_config
from dit.model import DiT

PROJECTOR = "align."  # what the projector's tensors are called by: the network's have no such prefix


class Learner:
    """A network on its device, with the optimizer and the averages of its weights.

    Names in a state: model.X the weight, ema.X its average, power.W.X its power-function average of relative width W,
    exp_avg.X and exp_avg_sq.X Adam's moments, adam.count its steps. The projector's weight is align.X, its optimizer's
    steps adam.align.count, and averages are not made of it.
    """

    def __init__(
        self,
        network: DiT,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        power_ema: Sequence[float] = (),
        projector: nn.Module | None = None,
    ):
        self.network, self.projector = network, projector
        self.names, self.weights = map(list, zip(*network.named_parameters(), strict=True))
        self.averages = [weight.detach().clone() for weight in self.weights]
        self.power = {width: [weight.detach().clone() for weight in self.weights] for width in power_ema}
        self.gammas = {width: ema.gamma_of(width) for width in power_ema}
        self.adam = Adam(self.weights, betas=betas, weight_decay=weight_decay)
        self.projector_adam = None
        if projector is not None:
            self.projector_adam = Adam(list(projector.parameters()), betas=betas, weight_decay=weight_decay)
        self.sharded = hasattr(self.weights[0], "to_local")
        self._here, self._averages_here = here(self.weights), [here(self.averages)]
        self._averages_here += [here(averages) for averages in self.power.values()]

    def forget_gradients(self) -> None:
        """Before a step's first backward pass."""
        for weight in (*self.weights, *(self.projector.parameters() if self.projector is not None else ())):
            weight.grad = None

    def update(self, lr: float, grad_clip: float = 0.0) -> tuple[Tensor, Tensor]:
        """Take the gradients into the weights, unless one of them is not finite: then nothing changes.

        Returns the gradients' norm () before it is held to `grad_clip` (0: it is not), and whether the update was made,
        () bool: both on the device, nobody waits for them. The projector learns while it has gradients.
        """
        adams = [self.adam]
        if self.projector_adam is not None and self.projector_adam.parameters[0].grad is not None:
            adams.append(self.projector_adam)
        gradients = [gradient for adam in adams for gradient in adam.gradients()]
        norm = self._norm(gradients)
        if grad_clip:
            torch._foreach_mul_(gradients, (grad_clip / (norm + 1e-6)).clamp(max=1.0))
        applied = torch.isfinite(norm)
        skip = (~applied).float()
        for adam in adams:
            adam.step(lr, skip)
        return norm, applied

    def _norm(self, gradients: list[Tensor]) -> Tensor:
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        if self.sharded:
            squares = norm.square()
            torch.distributed.all_reduce(squares)
            norm = squares.sqrt()
        return norm

    def average(self, step: int, decay: float) -> None:
        """Take the weights after update number `step` (0-based) into the averages; `decay` is the exponential one's.

        A skipped update counts: the weights after it are those before it.
        """
        decays = [decay, *(ema.power_decay_at(step, gamma) for gamma in self.gammas.values())]
        for averages, decay in zip(self._averages_here, decays, strict=True):
            ema.update(averages, self._here, decay)

    def averaged_network(self, wanted: bool = True) -> DiT | None:
        """The average as a network of its own, in eval mode. Of a sharded one every process has to ask; it is given to
        those by whom it is `wanted`."""
        whole = (a.full_tensor() if self.sharded else a for a in self.averages)
        averages = {name: average for name, average in zip(self.names, whole, strict=True) if wanted}
        if not wanted:
            return None
        copy = build(network_config(self.network)).to(self.network.pos_embed.device)
        fixed = {name: buffer for name, buffer in self.network.state_dict().items() if name not in averages}
        copy.load_state_dict(averages | fixed)
        return copy.eval().requires_grad_(False)

    def tensors(self) -> dict[str, Tensor]:
        """Everything by its name in a state: the tensors themselves, which the next step changes."""
        tensors = {f"model.{name}": weight.detach() for name, weight in zip(self.names, self.weights, strict=True)}
        for prefix, averages in [("ema", self.averages), *((f"power.{width}", a) for width, a in self.power.items())]:
            tensors |= {f"{prefix}.{name}": average for name, average in zip(self.names, averages, strict=True)}
        tensors |= _moments(self.adam, self.names) | {"adam.count": self.adam.count}
        if self.projector is not None:
            extra = {f"{PROJECTOR}{name}": weight.detach() for name, weight in self.projector.named_parameters()}
            tensors |= extra | _moments(self.projector_adam, list(extra))
            tensors[f"adam.{PROJECTOR}count"] = self.projector_adam.count
        return tensors


def _moments(adam: Adam, names: Sequence[str]) -> dict[str, Tensor]:
    moments = {f"exp_avg.{name}": moment for name, moment in zip(names, adam.first, strict=True)}
    return moments | {f"exp_avg_sq.{name}": moment for name, moment in zip(names, adam.second, strict=True)}
