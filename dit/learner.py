"""All tensors that a training changes: the weights and their moments, the averages, the alignment's projector; and how
they are packed into a TrainingState and unpacked again, bit for bit.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dit import ema
from dit.checkpoint import TrainingState, build, network_config
from dit.model import DiT

PROJECTOR = "align."  # what the projector's tensors are called by: the network's have no such prefix


class Learner:
    """A network on its device, with the optimizer and the averages of its weights.

    Names in a state: model.X the weight, ema.X its average, power.W.X its power-function average of relative width W,
    exp_avg.X and exp_avg_sq.X Adam's moments. The projector's weight is align.X, and averages are not made of it.
    """

    def __init__(
        self,
        network: DiT,
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        power_ema: Sequence[float] = (),
        projector: nn.Module | None = None,
        projector_steps: int = 0,
    ):
        self.network, self.projector = network, projector
        self.projector_steps = projector_steps  # it learns in so many steps, and then no more
        self.names, self.weights = map(list, zip(*network.named_parameters(), strict=True))
        extra = projector.named_parameters(PROJECTOR.rstrip(".")) if projector is not None else ()
        self.trained: dict[str, Tensor] = dict(zip(self.names, self.weights, strict=True)) | dict(extra)
        self.averages = [weight.detach().clone() for weight in self.weights]
        self.power = {width: [weight.detach().clone() for weight in self.weights] for width in power_ema}
        self.gammas = {width: ema.gamma_of(width) for width in power_ema}
        self.fused = network.pos_embed.device.type in ("cpu", "cuda")
        self.optimizer = torch.optim.AdamW(
            list(self.trained.values()),
            lr=lr,
            betas=betas,
            weight_decay=weight_decay,
            fused=self.fused,
        )

    def average(self, step: int, decay: float) -> None:
        """Take the weights after update number `step` (0-based) into the averages; `decay` is the exponential one's."""
        ema.update(self.averages, self.weights, decay)
        for width, averages in self.power.items():
            ema.update(averages, self.weights, ema.power_decay_at(step, self.gammas[width]))

    def averaged_network(self) -> DiT:
        """The average as a network of its own, in eval mode."""
        copy = build(network_config(self.network)).to(self.network.pos_embed.device)
        fixed = {name: buffer for name, buffer in self.network.state_dict().items() if name not in self.trained}
        copy.load_state_dict(dict(zip(self.names, self.averages, strict=True)) | fixed)
        return copy.eval().requires_grad_(False)

    def pack(self, step: int, losses: Sequence[Tensor], rows: list[list[float]]) -> TrainingState:
        """The state after `step` steps, on the CPU. `losses` are those not yet in `rows`."""
        tensors = {"pending_losses": torch.stack(list(losses)) if losses else torch.zeros(0)}
        tensors |= {f"model.{name}": self.trained[name] for name in self.names}
        tensors |= {name: weight for name, weight in self.trained.items() if name.startswith(PROJECTOR)}
        tensors |= {f"ema.{name}": average for name, average in zip(self.names, self.averages, strict=True)}
        for width, averages in self.power.items():
            tensors |= {f"power.{width}.{name}": average for name, average in zip(self.names, averages, strict=True)}
        for name, weight in self.trained.items():
            for moment in ("exp_avg", "exp_avg_sq"):  # there are none before the first step
                tensors[f"{moment}.{name}"] = self.optimizer.state[weight].get(moment, torch.zeros_like(weight))
        copies = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
        return TrainingState(step, copies, {"rows": list(rows)})

    @torch.no_grad()
    def unpack(self, state: TrainingState) -> None:
        """Go on from `state`."""
        for name, weight in self.trained.items():
            mine = name.startswith(PROJECTOR)
            weight.copy_(state.tensors[name if mine else f"model.{name}"])
            step = min(state.step, self.projector_steps) if mine else state.step
            self.optimizer.state[weight] = {
                # a fused optimizer counts on the device; else a count there would be fetched for every parameter
                "step": torch.tensor(float(step), device=weight.device if self.fused else "cpu"),
                "exp_avg": state.tensors[f"exp_avg.{name}"].to(weight.device, copy=True),
                "exp_avg_sq": state.tensors[f"exp_avg_sq.{name}"].to(weight.device, copy=True),
            }
        for prefix, averages in [("ema", self.averages), *((f"power.{w}", a) for w, a in self.power.items())]:
            for name, average in zip(self.names, averages, strict=True):
                average.copy_(state.tensors[f"{prefix}.{name}"])
