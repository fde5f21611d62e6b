"""`dit evaluate --snapshots`: how far a training had come at each step whose average it kept.

Every average draws the same images from the same noise, and the reference is read once, so that the weights alone make
the difference. The figures are as comparable among each other as they are few: no intervals, no estimate of the bias.
"""

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from dit import config, snapshots
from dit.evaluation import EvaluateConfig, evaluate_images, judge_of
from dit.imagesets import from_array, open_images
from dit.metrics import lower_is_better
from dit.parallel import world
from dit.paths import Paths, write_json
from dit.runtime import pick_device
from dit.scorecard import Asked, open_both, require_places, scratch_beside, spoken
from dit.scoretable import aligned, number
from dit.setting import SampleConfig, Setting

PLOTTED = ("fid", "sfid", "precision", "recall")


def evaluate_snapshots(
    asked: Asked,
    train: Path,
    setting: str | None = None,
    num_images: int | None = None,
    *,
    paths: Paths,
    say: Callable[[str], None] = print,
) -> dict[str, Any] | None:
    """Measure every kept average of the training in `train` (artifacts/train); its autoencoder lies beside it.

    `setting` names one of params.yaml's sample.settings. Prints a table, writes the record and a plot, and returns the
    record; None at every process but the main one. Raises ValueError as `scorecard.evaluate` does.
    """
    output = asked.output or Path("snapshots.metrics.json")
    require_places(asked, output, output.with_suffix(".png"))
    wanted, sample = _wanted(paths.params, setting, num_images)
    snapshots.snapshots(train)  # so that a folder that has none is told first
    side, device, rows = snapshots.image_side(train), pick_device(asked.device), {}
    with scratch_beside(output) as folder:
        one = from_array(np.zeros((1, side, side, 3), np.uint8), name=f"the training in {train}")
        reference, extractor = open_both(asked, one, device, folder)  # before hours of drawing
        drawn = snapshots.drawn(
            train, train.parent / "vae", wanted, sample, paths.scratch / "snapshots", device=device, say=spoken(say)
        )
        for step, file in drawn:
            images = open_images(file)
            found = evaluate_images(
                images,
                reference,
                extractor,
                EvaluateConfig(bootstrap=0),
                folder=folder / "samples",
                labels=images.labels,
                judge=judge_of(reference),
                heavy=False,
            )
            if found:
                rows[step] = found.values
    if not world().main:
        return None
    terms = {"reference": reference.digest, "reference_form": reference.form, "extractor": extractor.name}
    terms |= {"extractor_digest": extractor.digest, "setting": asdict(wanted), "labels": sample.labels}
    terms |= {"num_images": sample.num_images, "seed": sample.seed}
    told = {**terms, "steps": [{"step": step, "metrics": values} for step, values in rows.items()], "best": best(rows)}
    write_json(output, told)
    curves = {name: [(step, values[name]) for step, values in rows.items()] for name in next(iter(rows.values()))}
    shown = {name: points for name, points in curves.items() if name.startswith(PLOTTED)}
    snapshots.plot(shown, output.with_suffix(".png"))
    say(table(rows))
    say(f"{output}, {output.with_suffix('.png').name}: the same for programs, and as curves")
    return told


def best(rows: dict[int, dict[str, float]]) -> dict[str, int]:
    """The step of each metric's best figure; the earliest of equals."""
    names = next(iter(rows.values()))
    return {
        name: snapshots.best([(step, values[name]) for step, values in rows.items()], lower_is_better(name))[0]
        for name in names
    }


def table(rows: dict[int, dict[str, float]]) -> str:
    """A line for each metric, a column for each step; the best of a line is starred."""
    winners = best(rows)
    lines = [("", *(f"step {step}" for step in rows))]
    for name, winner in winners.items():
        lines.append(
            (name, *(number(values[name]) + (" *" if step == winner else "  ") for step, values in rows.items()))
        )
    return aligned(lines)


def _wanted(params: Path, name: str | None, num_images: int | None) -> tuple[Setting, SampleConfig]:
    sample = config.parse("sample", config.read_params(params).get("sample"), SampleConfig, source=params.name)
    known = {setting.name: setting for setting in sample.settings}
    if name is not None and name not in known:
        raise ValueError(f"--setting: {name!r} is none of sample.settings: use {' or '.join(known)}")
    if num_images is not None and num_images < 4:
        raise ValueError(f"--num-images must be at least 4, got {num_images}")
    return known[name or sample.settings[0].name], replace(sample, num_images=num_images or sample.num_images)
