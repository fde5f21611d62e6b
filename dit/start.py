"""From a folder of images to settings: which preset fits images and device, what of it they change, what to expect.

The rules are few and plain, so that a person can see why, and every one of their results stands in params.yaml, to be
changed there.
"""

import re
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from dit import presets, survey
from dit.expectations import FEW, GIB, Machine, Weights, device_batch_size, expectations, look
from dit.model import ModelConfig
from dit.paths import Paths, write_atomic
from dit.sources import DataConfig, content_hash
from dit.survey import Survey

EMBEDDED = "digits"  # the name that the embedded source has in metrics and registry


def imported(root: Path, image_size: int) -> Weights | None:
    """The weights in weights/ that were trained for images of this size; the first by name where there are more."""
    for file in sorted((root / "weights").glob("*/config.json")):
        try:
            weights = weights_in(root, file.parent.relative_to(root).as_posix())
            if weights and weights.config["image_size"] == image_size:
                return weights
        except (KeyError, TypeError):
            continue
    return None


def weights_in(root: Path, folder: str) -> Weights | None:
    """The weights in a checkpoint's folder, below `root`; none where there are none, or their config.json is not sound."""
    from dit.initial import open_config

    try:
        config = open_config(folder, root / Path(folder).expanduser())
    except ValueError:
        return None
    return Weights(folder, config) if config.get("model") and config.get("objective") else None


def choose(found: Survey, machine: Machine, weights: Weights | None) -> tuple[str, str]:
    """A preset's name, and why."""
    if machine.device != "cuda":
        return "own-64", "there is no CUDA device, and 256 pixels are days of work without"
    if machine.memory_bytes < 10 * GIB:
        return "own-64", f"{machine.name} has {machine.memory_bytes / GIB:.0f} GiB, and 256 pixels need 10"
    if found.sides[1] < 192:
        return "own-64", f"half of the images have {found.sides[1]} pixels or fewer"
    if found.count < FEW and weights and machine.memory_bytes >= 20 * GIB:
        return "finetune-256", f"few images of 192 pixels and more, and imported weights in {weights.folder}"
    return "own-256", f"half of the images have {found.sides[1]} pixels or more, and there is a {machine.name}"


def overlay(
    found: Survey, machine: Machine, weights: Weights | None, preset: dict[str, Any], name: str, mirror: bool
) -> dict[str, Any]:
    """What images and device change in the preset's settings."""
    data = {
        "name": name,
        "source": str(Path(found.folder).expanduser().resolve()),
        "labels": "folder" if found.classes else "none",
        "num_classes": len(found.classes),
        "mirror": mirror,
        "held_out_fraction": held_out_fraction(found.count),
    }
    changed: dict[str, Any] = {"data": data, "register": {"model_name": f"dit-{name.replace('_', '-')}"}}
    if preset["preset"] == "own-64" and found.sides[1] < 48:
        data["image_size"] = 32
    if preset["preset"] == "own-256" and machine.memory_bytes < 16 * GIB:
        changed["model"] = {"name": "DiT-S/2"}
    if preset["preset"] == "finetune-256" and weights:
        changed["train"] = {"init_from": weights.folder}
        changed |= network_of(weights, preset)
    if not found.classes:  # nothing to guide with
        first = (changed.get("sample") or preset["sample"])["settings"][0]
        first = {key: value for key, value in first.items() if not key.startswith("cfg_")}
        changed["sample"] = {"settings": [{**first, "name": "plain", "cfg_scale": 1.0}]}
        changed["register"]["setting"] = "plain"
    return changed


def network_of(weights: Weights, preset: dict[str, Any]) -> dict[str, Any]:
    """The sections that imported weights decide, where they are of another network or objective than the preset's."""
    changed: dict[str, Any] = {}
    names = {field.name for field in fields(ModelConfig)}
    theirs = ModelConfig(**{key: value for key, value in weights.config["model"].items() if key in names}).resolved()
    if theirs != ModelConfig(**preset["model"]).resolved():
        changed["model"] = asdict(theirs)
    objective = weights.config["objective"]
    if objective["name"] != preset["objective"]["name"]:
        drawn = [{**old, "sampler": "heun"} for old in preset["sample"]["settings"]]
        changed |= {"objective": objective, "sample": {"settings": drawn}}
    return changed


def held_out_fraction(count: int) -> float:
    """Enough images to judge by, and not many more: they are lost to training."""
    return next(
        fraction for most, fraction in ((2_000, 0.2), (20_000, 0.1), (200_000, 0.05), (1e18, 0.01)) if count < most
    )


def name_of(folder: str) -> str:
    """A folder's name as `data.name` may be, and not the embedded digits'."""
    name = re.sub(r"[^a-z0-9]+", "_", Path(folder).expanduser().resolve().name.lower()).strip("_") or "images"
    return f"{name}_images" if name == EMBEDDED else name


def init(
    folder: str,
    paths: Paths,
    *,
    name: str | None = None,
    preset: str | None = None,
    mirror: bool = True,
    write: bool = True,
) -> list[str]:
    """Write params.yaml for the images in `folder`; returns what a person should know, in lines.

    Raises ValueError, one line, where nothing can be trained on the folder, or a name does not fit; nothing is written.
    """
    place = paths.root / "presets"
    if not place.is_dir():
        raise ValueError(f"{place} is not there: run in the project's folder")
    if name == EMBEDDED:
        raise ValueError(f"--name {name}: the embedded digits have it, in metrics and registry: choose another")
    found = survey.survey(folder)
    machine, weights = look(), imported(paths.root, 256)
    chosen, why = (preset, "asked for") if preset else choose(found, machine, weights)
    base = presets.resolve(chosen, place)
    changed = overlay(found, machine, weights, base, name or name_of(folder), mirror)
    changed["run"] = {"device_batch_size": device_batch_size(machine, presets.merged(base, changed))}
    settings = presets.merged(base, changed)
    if source := settings["train"].get("init_from"):
        weights = weights_in(paths.root, source)
    try:
        data = DataConfig(**settings["data"])
    except ValueError as error:
        raise ValueError(f"data.{error}") from None
    learned = sum(survey.learnable(found, data).values())
    kept = keep(paths, settings) if write else None
    difference = presets.apply(chosen, paths.params, place, overlay=changed, write=write)
    lines = [*survey.describe(found, data.max_bad_fraction), f"preset {chosen}: {why}"]
    lines += expectations(found, machine, weights, settings, learned)
    if kept:
        lines.append(f"params.yaml is written; the one before, which had been edited, is kept as {kept}")
    elif write:
        lines.append("params.yaml is written" if difference else "params.yaml holds these settings already")
    if difference and (kept or not write):
        lines = [*difference.splitlines(), "", *lines]
    first = "repair or remove what cannot be read, then " if survey.refused(found, data.max_bad_fraction) else ""
    return [*lines, f"Next: {first}make repro (or: dit check && dvc repro)"]


def keep(paths: Paths, settings: dict[str, Any]) -> Path | None:
    """Copy params.yaml to scratch/ where a person edited it, so that no one's settings are lost."""
    before = presets.current(paths.params)
    if before is None or presets.written_by_apply(paths.params):
        return None
    try:
        plain = before == presets.resolve(str(before.get("preset")), paths.root / "presets")
    except ValueError:
        plain = False
    if plain or before == settings:
        return None
    content = paths.params.read_bytes()
    copy = paths.scratch / f"params-{content_hash(content)[:8]}.yaml"
    copy.parent.mkdir(exist_ok=True)
    write_atomic(copy, content)
    return copy
