"""Where a training step's time goes: some steps of the very loop that trains, traced operator by operator.

The loop marks its phases (`trainer.phase`); the backward pass is known by what torch itself calls it. On a CPU a phase
is as long as it took; on a CUDA device it is as long as the device worked for it, and what is left, its waiting
included, is `other`.
"""

import time
from collections import Counter
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.autograd.profiler import profile
from torch.autograd.profiler_util import FunctionEvent, Kernel

from dit.dataset import LatentDataset
from dit.model import DiT
from dit.objective import ObjectiveConfig
from dit.paths import replacing, write_atomic
from dit.runtime import RunConfig
from dit.trainer import fit
from dit.training import TrainConfig

PHASES = ("data", "forward", "backward", "optimizer", "average")
MARK = "train/"  # begins the name of a mark
BACKWARD = "autograd::engine::evaluate_function"  # begins the name of what autograd runs, on a thread of its own or not
WARM = 3  # steps before anything is timed
OPERATORS = 12  # the costliest, in the table


@dataclass(frozen=True)
class Profile:
    """Of one step, on average: its seconds untraced and traced, the seconds of each phase while traced, and the
    costliest operators (name, calls, seconds of its own)."""

    step_seconds: float
    traced_seconds: float
    phases: dict[str, float]
    operators: list[tuple[str, float, float]]

    def table(self) -> str:
        """Both tables, in milliseconds and shares of a traced step."""
        whole = self.traced_seconds
        lines = [f"a step takes {1e3 * self.step_seconds:.2f} ms, and {1e3 * whole:.2f} ms while it is traced", ""]
        lines.append(f"{'phase':<56}{'ms':>17}{'share':>8}")
        for name, seconds in self.phases.items():
            lines.append(f"{name:<56}{1e3 * seconds:>17.3f}{seconds / whole:>8.1%}")
        lines += ["", f"{'operator':<56}{'calls':>8}{'ms':>9}{'share':>8}"]
        for name, calls, seconds in self.operators:
            lines.append(
                f"{name.removeprefix('aten::')[:55]:<56}{calls:>8.1f}{1e3 * seconds:>9.3f}{seconds / whole:>8.1%}"
            )
        return "\n".join(lines)


class _Watch:
    """Asked after every step whether to stop: it warms up, takes the time of some steps, traces as many, and stops."""

    def __init__(self, steps: int, device: torch.device):
        self.device, self.done = device, 0
        self.turns = [WARM, WARM + steps, WARM + 2 * steps]
        # torch.profiler.profile is this one with the imports of a compiler, seconds of them.
        self.profiler = profile(use_device="cuda" if device.type == "cuda" else None)
        self._tracing, self.times = ExitStack(), []

    def __call__(self) -> bool:
        self.done += 1
        if self.done in self.turns:
            self._take_time()
            if self.done == self.turns[1]:
                self._tracing.enter_context(self.profiler)
                self._take_time()  # starting takes its own
            elif self.done == self.turns[2]:
                self._tracing.close()
        return self.done >= self.turns[2]

    def _take_time(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize()
        self.times.append(time.perf_counter())


def profile_training(
    network: DiT,
    data: LatentDataset,
    objective: ObjectiveConfig,
    train: TrainConfig,
    run: RunConfig,
    folder: Path,
    steps: int = 20,
) -> Profile:
    """Train `network` (on its device already) for a few steps, `steps` of them traced, and keep nothing of it.

    Writes trace.json (Chrome's format: chrome://tracing, ui.perfetto.dev) and table.txt into `folder`. Raises
    ValueError where `steps` is below 1.
    """
    if steps < 1:
        raise ValueError(f"--steps must be at least 1, got {steps}")
    train = replace(train, init_from=None, max_steps=max(train.max_steps, WARM + 2 * steps + 1), snapshot_every_steps=0)
    run = replace(run, checkpoint_every_steps=2**62, preview_every_steps=0, score_every_steps=0)
    watch = _Watch(steps, network.pos_embed.device)
    fit(network, data, objective, train, run, should_stop=watch)
    started, half, traced, end = watch.times
    found = measured(
        watch.profiler.function_events, watch.device, steps, (half - started) / steps, (end - traced) / steps
    )
    with replacing(folder / "trace.json") as file:
        watch.profiler.export_chrome_trace(str(file))
    write_atomic(folder / "table.txt", f"{found.table()}\n".encode())
    return found


def measured(
    events: Iterable[FunctionEvent], device: torch.device, steps: int, step_seconds: float, traced_seconds: float
) -> Profile:
    """What the events of `steps` traced steps tell."""
    phases, operators, calls = Counter(), Counter(), Counter()
    for event in events:
        if event.device_type.name != "CPU":  # a kernel: it is counted with the operator that launched it
            continue
        seconds = _own_seconds(event, device) / steps
        if phase := _phase(event):
            phases[phase] += seconds
        if not event.name.startswith(MARK):
            operators[event.name] += seconds
            calls[event.name] += 1
    told = {name: phases[name] for name in PHASES}
    told["other"] = max(0.0, traced_seconds - sum(told.values()))
    costly = [(name, calls[name] / steps, seconds) for name, seconds in operators.most_common(OPERATORS) if seconds]
    return Profile(step_seconds, traced_seconds, told, costly)


def _own_seconds(event: FunctionEvent, device: torch.device) -> float:
    if device.type == "cpu":
        return event.self_cpu_time_total / 1e6
    kernels: list[Kernel] = event.kernels
    return sum(kernel.duration for kernel in kernels) / 1e6


def _phase(event: Any) -> str | None:
    """The phase that an event belongs to: that of itself or of the innermost event around it which has one."""
    while event is not None:
        if event.name.startswith(MARK):
            return event.name.removeprefix(MARK)
        if event.name.startswith(BACKWARD):
            return "backward"
        event = event.cpu_parent
    return None
