"""ema: the self-contained checkpoint that everyone uses, chosen among the weights that training kept."""

import json
from dataclasses import dataclass
from typing import Literal

from dit import entry
from dit.checkpoint import load_tensors, save_checkpoint
from dit.paths import Paths, publish


@dataclass(frozen=True)
class EmaConfig:
    """Which weights: the moving average or the last ones; of which step (null = the end)."""

    weights: Literal["ema", "raw"] = "ema"
    step: int | None = None


def ema(ema: EmaConfig, *, paths: Paths) -> None:
    """Write artifacts/ema: model.safetensors and config.json."""
    train = paths.artifacts / "train"
    config = json.loads((train / "config.json").read_text())
    step = config["step"] if ema.step is None else ema.step
    if ema.weights == "raw" and step != config["step"]:
        raise ValueError(f"ema.step: raw weights are kept of the last step {config['step']} only, not of {step}")
    source = train / "ema" / f"step-{step:08d}.safetensors" if ema.weights == "ema" else train / "model.safetensors"
    if not source.is_file():
        kept = ", ".join(str(int(file.stem.removeprefix("step-"))) for file in sorted((train / "ema").iterdir()))
        raise ValueError(
            f"ema.step: no average of step {step} was kept; there are those of {kept} (train.snapshot_every_steps)"
        )
    with publish(paths.artifacts / "ema", paths.scratch) as folder:
        save_checkpoint(folder, load_tensors(source), {**config, "step": step, "weights": ema.weights})
    print(f"{ema.weights} weights of step {step}")


if __name__ == "__main__":
    entry.main(ema)
