"""What a training tells of its losses, exactly and whatever it was cut into.

A step leaves one small vector on the device, and nothing waits for it. The vectors are fetched at the log interval or
when a state is saved, summed over the processes in the order of their ranks, and added up step by step in float64: so
a row of loss.csv is the same wherever training was stopped and went on.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dit import diffusion
from dit.objective import ObjectiveConfig
from dit.parallel import World

LEVELS = 4
COLUMNS = ("step", "loss", "lr", "grad_norm", "skipped", *(f"loss_t{level + 1}" for level in range(LEVELS)))  # a row


def scaled_time(t: Tensor, objective: ObjectiveConfig) -> Tensor:
    """The objective's times (N,) in [0, 1], from 0 (noise) to 1 (data)."""
    return t if objective.name == "transport" else 1 - t / diffusion.NUM_TIMESTEPS


class Monitor:
    """Losses and gradient norms of the steps since the last row, and how many in a row had to be skipped.

    `record` takes a part of a step's images, as often as there are parts, and `end_step` closes the step; neither waits
    for the device. `row` and `values` do, and every process has to call them: all get the same.
    """

    def __init__(
        self,
        device: torch.device,
        global_batch_size: int,
        world: World,
        *,
        levels: int = LEVELS,
        max_bad_steps: int = 10,
        last_good: Callable[[], str | None] = lambda: None,  # the name of the state to go back to
    ):
        self.world, self.global_batch_size, self.max_bad_steps = world, global_batch_size, max_bad_steps
        self._last_good, self._levels = last_good, torch.arange(levels, device=device)
        self._parts: list[Tensor] = []  # of the step in work: (2, levels) each, sums and counts
        self._steps: list[Tensor] = []  # not fetched yet: (2 + 2 levels,) each
        self._sums = [0.0] * (2 + 2 * levels)  # since the last row: steps applied, their norms, losses, images
        self._skipped = self._in_a_row = self._done = 0

    def record(self, losses: Tensor, t: Tensor) -> None:
        """Losses (n,) of some images of this process, at times t (n,) from 0 (noise) to 1 (data)."""
        count = len(self._levels)
        level = (t.detach() * count).long().clamp(0, count - 1)
        here = level[:, None] == self._levels  # (n, levels)
        sums = torch.where(here, losses.detach().float()[:, None], 0.0).sum(0)
        self._parts.append(torch.stack([sums, here.sum(0).float()]))

    def end_step(self, norm: Tensor, applied: Tensor) -> None:
        """The step's gradient norm (), before it is clipped, and whether its update was made (): both the same at all
        processes. A step that was skipped has no part in any mean."""
        parts = self._parts[0] if len(self._parts) == 1 else torch.stack(self._parts).sum(0)
        step = torch.cat([torch.stack([torch.ones_like(parts[0, 0]), norm.detach().float()]), parts.flatten()])
        self._steps.append(torch.where(applied.detach().bool(), step, 0.0))
        self._parts = []

    def values(self) -> dict[str, Any]:
        """All that a monitor must know to go on, as JSON can tell it. Raises ValueError as `row` does."""
        self._settle()
        return {"sums": list(self._sums), "skipped": self._skipped, "in_a_row": self._in_a_row, "done": self._done}

    def load(self, values: dict[str, Any]) -> None:
        """Go on from `values()`."""
        self._parts, self._steps, self._sums = [], [], list(values["sums"])
        self._skipped, self._in_a_row, self._done = (values[name] for name in ("skipped", "in_a_row", "done"))

    def row(self, step: int, lr: float) -> dict[str, float | None]:
        """A row of loss.csv: means over the steps since the last row; None where there is nothing to average.

        loss: of all images. grad_norm: of the applied steps. skipped: how many were not. loss_t1 (the noisiest quarter
        of times) to loss_t4: of the images there. Raises ValueError where `max_bad_steps` in a row were skipped.
        """
        self._settle()
        levels = len(self._levels)
        applied, norm, losses, images = (
            self._sums[0],
            self._sums[1],
            self._sums[2 : 2 + levels],
            self._sums[2 + levels :],
        )
        row = {"step": step, "loss": _over(sum(losses), applied * self.global_batch_size), "lr": lr}
        row |= {"grad_norm": _over(norm, applied), "skipped": self._skipped}
        row |= {f"loss_t{level + 1}": _over(losses[level], images[level]) for level in range(levels)}
        self._sums, self._skipped = [0.0] * len(self._sums), 0
        return row

    def _settle(self) -> None:
        """Fetch the steps that are not fetched yet, and add them up."""
        mine = torch.stack(self._steps).cpu().double() if self._steps else torch.zeros(0, len(self._sums))
        self._steps = []
        parts = self.world.gather(mine)  # not reduced: how a reduction rounds depends on how much it is given
        steps = None
        if parts is not None:
            total = torch.cat([parts[0][:, :2], sum(part[:, 2:] for part in parts)], dim=1)
            steps = total.tolist()
        for step in self.world.share(steps):
            self._done += 1
            self._sums = [a + b for a, b in zip(self._sums, step, strict=True)]
            self._skipped, self._in_a_row = (self._skipped, 0) if step[0] else (self._skipped + 1, self._in_a_row + 1)
            if self._in_a_row >= self.max_bad_steps:
                self._give_up()

    def _give_up(self) -> None:
        good, count = self._last_good(), self._in_a_row
        steps = f"steps {self._done - count + 1} to {self._done}" if count > 1 else f"step {self._done}"
        raise ValueError(
            f"train.lr: loss or gradient is not finite at {steps} (run.max_bad_steps), "
            f"{f'the last good state is {good}' if good else 'nothing of it was saved'}: "
            "lower train.lr, set train.grad_clip, or train.precision to fp32"
        )


def _over(total: float, count: float) -> float | None:
    return total / count if count else None
