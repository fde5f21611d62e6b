"""How fast a training step is, beside a plain one as the published recipe describes it.

    python benchmarks/train.py                                   # digits model, DiT-S/4, DiT-S/2 on one CPU thread
    python benchmarks/train.py --case digits --tricks            # what each trick is worth there
    python benchmarks/train.py --device cuda --case S/2 B/2 L/2 XL/2 --best   # images/s, MFU and memory in bf16
    python benchmarks/train.py --json > result.json

Plain is: the network called eagerly, torch.optim.AdamW as it comes, a Python loop over the parameters for their average,
`.item()` of every loss. Ours is `acceleration.for_training` and `learner.Learner` as the pipeline calls them; guard and
gradient norm are in it. Both take the same steps from the same weights on inputs drawn beforehand; that their losses
agree is checked first. They take turns, with matrix products between them that tell what the machine had to give.
Where others share the machine, --processor-time counts what this process got of it, and not how long it waited.
"""

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from sample import MATRIX_SIDE, matrix_products, seconds
from telling import tell
from torch import Tensor

from dit import ema, runtime
from dit.acceleration import exchanged, for_training
from dit.cost import macs
from dit.estimate import device_named
from dit.learner import Learner
from dit.model import DiT, ModelConfig
from dit.objective import ObjectiveConfig, loss_of, times

Step = Callable[[dict[str, Tensor]], Tensor | float]
SEED, LR, DECAY, CHANNELS = 0, 1e-4, 0.9999, 4
TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2}  # of a loss after some steps


@dataclass(frozen=True)
class Case:
    """A network, what it learns, how many images a step has, and how many steps are timed together."""

    model: dict[str, Any]
    input_size: int = 32
    num_classes: int = 1000
    objective: str = "diffusion"
    batch_size: int = 8
    steps: int = 1


CASES = {name: Case({"name": f"DiT-{name}"}) for name in ("S/4", "S/2", "B/2", "L/2", "XL/2")}
CUSTOM = {"name": "custom", "patch_size": 4, "hidden_size": 128, "depth": 4, "num_heads": 4, "learn_sigma": False}
CASES["digits"] = Case(CUSTOM, 8, 10, "transport", batch_size=64, steps=10)
CASES["tiny"] = Case(CUSTOM | {"hidden_size": 32, "depth": 2}, 8, 3, "transport", batch_size=4, steps=2)


@dataclass(frozen=True)
class Trick:
    """A step with some of the tricks: how the network is called, and how it is updated."""

    predict: Callable[[DiT], Callable[..., Any]] = lambda network: network
    fused: bool = False
    foreach: bool = False
    item: bool = True


TRICKS = {  # each has those before it
    "plain": Trick(),
    "no .item()": Trick(item=False),
    "averages in one call": Trick(item=False, foreach=True),
    "AdamW fused": Trick(item=False, foreach=True, fused=True),
    "products by oneDNN": Trick(exchanged, item=False, foreach=True, fused=True),
    "written out": Trick(lambda network: for_training(network, precision="fp32"), True, True, False),
}


@dataclass(frozen=True)
class Row:
    """What was measured: seconds of a step in each turn, and multiply-accumulates per second of each matrix product."""

    case: str
    batch_size: int
    macs: int  # of a step: three forward passes, as cost.macs counts
    steps: dict[str, list[float]]
    matrix: dict[str, list[float]]
    difference: float  # the largest, of a loss


@dataclass(frozen=True)
class Best:
    """The fastest batch size of a case on an accelerator."""

    case: str
    batch_size: int
    images_per_second: float
    mfu: float  # of the device's peak, by the network's own count; nan where the peak is not known
    memory_gb: float
    tried: dict[int, float] = field(default_factory=dict)  # images a second of each batch size


def network_of(case: Case, device: torch.device) -> DiT:
    """The case's network; what would begin at 0 is random, so that every gradient flows."""
    torch.manual_seed(SEED)
    sizes = {"input_size": case.input_size, "in_channels": CHANNELS, "num_classes": case.num_classes}
    network = DiT(ModelConfig(**case.model), **sizes)
    for parameter in network.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    return network.to(device).train()


def inputs_of(case: Case, batch_size: int, device: torch.device) -> dict[str, Tensor]:
    """Latents, labels, times and noise of one step."""
    generator = torch.Generator(device).manual_seed(SEED)
    shape = batch_size, CHANNELS, case.input_size, case.input_size
    x, noise = (torch.randn(shape, generator=generator, device=device) for _ in range(2))
    uniform = torch.rand(batch_size, generator=generator, device=device)
    y = torch.arange(batch_size, device=device) % (case.num_classes + 1)
    return {"x": x, "y": y, "t": times(uniform, ObjectiveConfig(case.objective)), "noise": noise}


def step_of(trick: Trick, network: DiT, objective: ObjectiveConfig, precision: str) -> Step:
    """A step with these tricks, on a network of its own."""
    device, weights, predict = network.pos_embed.device, list(network.parameters()), trick.predict(network)
    averages = [weight.detach().clone() for weight in weights]
    optimizer = torch.optim.AdamW(weights, lr=LR, weight_decay=0.0, fused=trick.fused)

    def step(inputs: dict[str, Tensor]) -> Tensor | float:
        with runtime.autocast(device, precision):
            loss = loss_of(predict, objective, **inputs).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if trick.foreach:
            ema.update(averages, weights, DECAY)
        else:
            for average, weight in zip(averages, weights, strict=True):
                average.mul_(DECAY).add_(weight.detach(), alpha=1 - DECAY)
        return loss.item() if trick.item else loss.detach()

    return step


def ours(network: DiT, objective: ObjectiveConfig, precision: str, compiled: bool = False) -> Step:
    """The pipeline's own step, on a network of its own."""
    device, learner = network.pos_embed.device, Learner(network)
    predict = for_training(network, precision=precision, compile="on" if compiled else "off")

    def step(inputs: dict[str, Tensor]) -> Tensor:
        learner.forget_gradients()
        with runtime.autocast(device, precision):
            loss = loss_of(predict, objective, **inputs).sum() / len(inputs["x"])
        loss.backward()
        learner.update(LR)
        learner.average(0, DECAY)
        return loss.detach()

    return step


def measure(
    name: str, repeats: int, device: torch.device, precision: str,
    *, tricks: bool = False, compiled: bool = False, clock: Callable[[], float] = time.perf_counter,
) -> Row:  # fmt: skip
    """Each kind of step in turn, `repeats` times. Raises RuntimeError where they do not learn the same."""
    case = CASES[name]
    objective, inputs = ObjectiveConfig(case.objective), inputs_of(case, case.batch_size, device)
    chosen = TRICKS if tricks else {"plain": TRICKS["plain"]}
    kinds = {kind: step_of(trick, network_of(case, device), objective, precision) for kind, trick in chosen.items()}
    kinds["ours"] = ours(network_of(case, device), objective, precision, compiled)
    losses = {kind: [float(step(inputs)) for _ in range(3)] for kind, step in kinds.items()}  # a warm-up, too
    difference = max(abs(a / b - 1) for got in losses.values() for a, b in zip(got, losses["plain"], strict=True))
    if not difference <= TOLERANCE[precision]:
        raise RuntimeError(f"{name}: the losses differ by {difference:.1e}")
    products = matrix_products(device)
    turns = {kind: [] for kind in (*kinds, *products)}
    for _ in range(repeats):
        for kind, step in kinds.items():
            together = seconds(lambda step=step: [step(inputs) for _ in range(case.steps)], device, clock)
            turns[kind].append(together / case.steps)
        for kind, product in products.items():
            turns[kind].append(MATRIX_SIDE**3 / seconds(product, device, clock))
    work = 3 * case.batch_size * _macs(case)
    steps, rates = ({kind: turns[kind] for kind in some} for some in (kinds, products))
    return Row(name, case.batch_size, work, steps, rates, difference)


def best(name: str, device: torch.device, precision: str, steps: int, largest: int = 4096) -> Best:
    """Batch sizes are doubled until memory ends; the blocks are compiled where there is a compiler."""
    case, tried, memory, size = CASES[name], {}, {}, 8
    objective = ObjectiveConfig(case.objective)
    network = network_of(case, device)
    step = ours(network, objective, precision, compiled=device.type == "cuda")
    while size <= largest:
        try:
            inputs = inputs_of(case, size, device)
            for _ in range(3):
                step(inputs)
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            tried[size] = steps * size / seconds(lambda inputs=inputs: [step(inputs) for _ in range(steps)], device)
            memory[size] = torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else math.nan
        except torch.OutOfMemoryError:
            break
        size *= 2
    fastest = max(tried, key=tried.get)
    mfu = 6 * _macs(case) * tried[fastest] / peak_flops(device)
    return Best(name, fastest, tried[fastest], mfu, memory[fastest], tried)


def peak_flops(device: torch.device) -> float:
    """Of a device that the table of `dit.estimate` has, in bf16; else nan."""
    try:
        return device_named(torch.cuda.get_device_name(device)).peak_flops if device.type == "cuda" else math.nan
    except ValueError:
        return math.nan


def _macs(case: Case) -> int:
    return macs(ModelConfig(**case.model), input_size=case.input_size, in_channels=CHANNELS)


def table(rows: list[Row]) -> str:
    """Medians (least to most); how many times faster; the share of each kind of matrix product that each reaches."""
    kinds = list(rows[0].matrix)
    told = [f"{kind}'s product, GMAC/s" for kind in kinds]
    told += [f"{who} reaches of {kind}'s" for kind in kinds for who in ("plain", "ours")]
    lines = [f"| case | batch | plain, ms | ours, ms | faster | {' | '.join(told)} |", "|---" * (5 + len(told)) + "|"]
    for row in rows:
        plain, mine = (statistics.median(row.steps[who]) for who in ("plain", "ours"))
        cells = [row.case, str(row.batch_size), *(spread(row.steps[who], 1e3) for who in ("plain", "ours"))]
        cells.append(f"{plain / mine:.2f}x")
        cells += [spread(row.matrix[kind], 1e-9, ".0f") for kind in kinds]
        rates = [statistics.median(row.matrix[kind]) for kind in kinds]
        cells += [f"{row.macs / time / rate:.0%}" for rate in rates for time in (plain, mine)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def tricks_table(row: Row) -> str:
    """Every trick on top of those before it, and how many times faster than the plain step it is with it."""
    lines = [f"| {row.case}, {row.batch_size} images | ms | faster than plain |", "|---|---|---|"]
    plain = statistics.median(row.steps["plain"])
    for kind, turns in row.steps.items():
        lines.append(f"| {kind} | {spread(turns, 1e3)} | {plain / statistics.median(turns):.2f}x |")
    return "\n".join(lines)


def best_table(found: list[Best]) -> str:
    lines = ["| case | batch | images/s | MFU | memory, GB |", "|---|---|---|---|---|"]
    for row in found:
        cells = row.case, row.batch_size, f"{row.images_per_second:.0f}", f"{row.mfu:.1%}", f"{row.memory_gb:.1f}"
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def spread(values: list[float], scale: float, form: str = ".1f") -> str:
    """The median (least to most)."""
    median, least, most = (f"{scale * f(values):{form}}" for f in (statistics.median, min, max))
    return f"{median} ({least} to {most})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="+", choices=CASES, default=["digits", "S/4", "S/2"])
    parser.add_argument("--repeats", type=int, default=9, help="turns (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of a CPU (default: %(default)s, as run.num_threads)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="default: fp32, and bf16 with --best")
    parser.add_argument("--compile", action="store_true", help="compile our blocks")
    parser.add_argument("--tricks", action="store_true", help="one trick after the other, in fp32")
    parser.add_argument("--best", action="store_true", help="images a second at the best batch size")
    parser.add_argument("--processor-time", action="store_true", help="of a CPU, in place of the clock's")
    parser.add_argument("--json", action="store_true", help="print every measurement instead of the table")
    given = parser.parse_args()
    if given.tricks and given.precision == "bf16":
        parser.error("--tricks is for fp32")
    device, precision = runtime.pick_device(given.device), given.precision or ("bf16" if given.best else "fp32")
    torch.set_num_threads(given.threads)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # as the pipeline does
    if given.best:
        found = [best(name, device, precision, given.repeats) for name in given.case]
        tables = [best_table(found)]
    else:
        clock = time.process_time if given.processor_time else time.perf_counter
        settings = {"tricks": given.tricks, "compiled": given.compile, "clock": clock}
        found = [measure(name, given.repeats, device, precision, **settings) for name in given.case]
        tables = [table(found), *(tricks_table(row) for row in found if given.tricks)]
    tell(
        found,
        *tables,
        as_json=given.json,
        device=device.type,
        precision=precision,
        threads=given.threads,
        time="the processor's" if given.processor_time else "the clock's",
    )


if __name__ == "__main__":
    main()
