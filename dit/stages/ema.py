"""ema: the self-contained checkpoint that everyone uses, chosen among the weights that training kept, or built of them."""

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from dit import entry
from dit.checkpoint import CONDITIONS, load_tensors, power_file, save_checkpoint
from dit.ema import SIGMA_REL_LIMIT, mixture
from dit.paths import Paths, publish

POOR, WRONG = 0.05, 0.5  # a rebuilt average whose profile is so far off is said to be poor, or is none


@dataclass(frozen=True)
class EmaConfig:
    """Which weights: the moving average or the last ones; of which step (null = the end).

    With `sigma_rel` a power-function average of that relative width, rebuilt from those that train.power_ema kept.
    """

    weights: Literal["ema", "raw"] = "ema"
    step: int | None = None
    sigma_rel: float | None = None

    def __post_init__(self) -> None:
        if self.sigma_rel is None:
            return
        if not 0 < self.sigma_rel < SIGMA_REL_LIMIT:
            raise ValueError(f"sigma_rel must be above 0 and below {SIGMA_REL_LIMIT:.4f}, got {self.sigma_rel}")
        if self.weights == "raw":
            raise ValueError("sigma_rel is the width of an average: set ema.weights to ema, or sigma_rel to null")


def ema(ema: EmaConfig, *, paths: Paths) -> None:
    """Write artifacts/ema: model.safetensors and config.json, and conditions.safetensors where the model needs some."""
    train = paths.artifacts / "train"
    config = json.loads((train / "config.json").read_text())
    step = config["step"] if ema.step is None else ema.step
    told: dict[str, Any] = {"step": step, "weights": ema.weights}
    if ema.sigma_rel is not None:
        tensors, error = rebuild(train / "ema", step, ema.sigma_rel)
        told |= {"sigma_rel": ema.sigma_rel, "sigma_rel_error": error}
        what = f"power-function average of width {ema.sigma_rel} at step {step}, its profile off by {error:.1%}"
        if not error <= WRONG:
            raise ValueError(
                f"ema.sigma_rel: {ema.sigma_rel} cannot be built from what training kept (its profile would be off by "
                f"{error:.0%}): keep more (train.snapshot_every_steps), or a width near it (train.power_ema)"
            )
        if error > POOR:
            what += ": keep more averages for a better one (train.snapshot_every_steps)"
    else:
        tensors, what = (
            load_tensors(kept(train, ema.weights, step, config["step"])),
            f"{ema.weights} weights of step {step}",
        )
    with publish(paths.artifacts / "ema", paths.scratch) as folder:
        save_checkpoint(folder, tensors, {**config, **told})
        if (train / "ema" / CONDITIONS).is_file():
            shutil.copyfile(train / "ema" / CONDITIONS, folder / CONDITIONS)
    print(what)


def kept(train: Path, weights: str, step: int, last: int) -> Path:
    """The file of weights that training kept. Raises ValueError where it did not."""
    if weights == "raw" and step != last:
        raise ValueError(f"ema.step: raw weights are kept of the last step {last} only, not of {step}")
    source = train / "ema" / f"step-{step:08d}.safetensors" if weights == "ema" else train / "model.safetensors"
    if not source.is_file():
        steps = ", ".join(str(int(file.stem.removeprefix("step-"))) for file in sorted((train / "ema").glob("step-*")))
        raise ValueError(
            f"ema.step: no average of step {step} was kept; there are those of {steps} (train.snapshot_every_steps)"
        )
    return source


def rebuild(folder: Path, step: int, sigma_rel: float) -> tuple[dict[str, Tensor], float]:
    """The power-function average of any width at a kept step, and the relative error of its profile.

    It is the sum of the kept averages up to then, with the factors of `dit.ema.mixture`.
    Raises ValueError where none were kept, or none of that step.
    """
    found = [re.fullmatch(r"power-(.+)-(\d{8})\.safetensors", file.name) for file in sorted(folder.glob("power-*"))]
    averages = [(int(match[2]), float(match[1])) for match in found if match]
    if not averages:
        raise ValueError(
            "ema.sigma_rel: training kept no power-function averages: set train.power_ema, say to [0.05, 0.1]"
        )
    if step not in {of_step for of_step, _ in averages}:
        steps = ", ".join(map(str, sorted({of_step for of_step, _ in averages})))
        raise ValueError(
            f"ema.step: no average of step {step} was kept; there are those of {steps} (train.snapshot_every_steps)"
        )
    averages = [(of_step, width) for of_step, width in averages if of_step <= step]
    factors, error = mixture(averages, step, sigma_rel)
    error = max(error, 2**-24 * factors.abs().sum().item())  # widths that hardly differ: what rounding grows to
    total: dict[str, Tensor] = {}
    for factor, (of_step, width) in zip(factors, averages, strict=True):
        for name, tensor in load_tensors(folder / power_file(width, of_step)).items():
            total[name] = total.get(name, 0) + factor * tensor.double()
    return {name: tensor.to(torch.float32) for name, tensor in total.items()}, error


if __name__ == "__main__":
    entry.main(ema)
