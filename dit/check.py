"""All settings of all stages at once, before any work starts: each section by itself, then what must fit together."""

import importlib
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dit import entry
from dit.addresses import registered
from dit.config import check_sections, read_params
from dit.paths import Paths
from dit.pipeline import STAGES
from dit.retraining import RetrainConfig

OPTIONAL = {"retrain": RetrainConfig}  # sections that are no stage's: they may be missing


def stage_functions() -> list[Callable[..., None]]:
    """The function of each stage, in the order of the pipeline."""
    return [getattr(importlib.import_module(f"dit.stages.{name}"), name) for name in STAGES]


def check(paths: Paths, *, files: bool = True) -> dict[str, Any]:
    """The sections of params.yaml, valid and fitting together. Raises ValueError with a line for each fault.

    With `files` what they name on this disk is looked at too: train.init_from's folder, the files of encode.features and
    of reference.
    """
    require_git(paths)
    sections = check_sections(stage_functions(), read_params(paths.params), optional=OPTIONAL)
    faults = list(conflicts(sections, paths.root if files else None))
    if faults:
        raise ValueError("\n".join(faults))
    return sections


def check_in_dvc(paths: Paths) -> dict[str, Any]:
    """As `check`, inside a command of DVC's (dvc.yaml's scan): what is refused is that stage's outcome.

    Where DIT_ANYWAY is set, as by a flow that shall start all the same, missing files are left to the stages.
    """
    try:
        return check(paths, files=not os.environ.get(entry.ANYWAY))
    except ValueError as error:
        if stage := os.environ.get("DVC_STAGE"):
            entry.tell_refused(stage.rpartition(":")[2], str(error), paths)
        raise


def require_git(paths: Paths) -> None:
    """Raise ValueError outside a git repository: DVC, and a model's provenance, rest on one."""
    try:
        found = subprocess.run(["git", "rev-parse", "--git-dir"], cwd=paths.root, capture_output=True)
    except FileNotFoundError:
        raise ValueError("git is not installed: DVC needs it") from None
    if found.returncode:
        raise ValueError(
            "this folder is in no git repository, and DVC needs one: git init && git add -A && git commit -m begin"
        )


def conflicts(sections: dict[str, Any], root: Path | None = None):
    """Yield a line for each pair of settings that cannot go together; with the project's `root` also for files that they
    name and that are not there, or are of no use."""
    from dit.alignment import require_alignment
    from dit.embeddings import read_header, require_source
    from dit.evaluation import full_names, metric_names
    from dit.objective import require_objective
    from dit.setting import require_sampler
    from dit.weights import require_weights

    data, vae, model, sample = (sections[name] for name in ("data", "vae", "model", "sample"))
    factor = latent_factor(vae, root or Path("."))
    if factor and data.image_size % factor:
        yield f"data.image_size: {data.image_size} is no multiple of {factor}, the autoencoder's factor"
    elif factor and (side := data.image_size // factor) % (patch := model.resolved().patch_size):
        yield f"model.patch_size: {patch} does not divide the latent side {side} (image size {data.image_size} / {factor})"
    aligned, features = sections["objective"].alignment, sections["encode"].features
    rules = [lambda: require_objective(model, sections["objective"])]
    shape, mirrored = (1, 1) if features else None, True
    if features and root is not None:
        try:
            require_source(features, Paths(root).given)
            count, mirrored = read_header(features, Paths(root).given)
            shape = (count, 1)
        except ValueError as error:
            yield str(error)
    mirrored = mirrored or not data.mirror
    rules += [lambda: require_alignment(aligned, model.resolved().depth, shape, mirrored=mirrored)]
    conditional = model.condition == "embeddings" or (model.condition == "classes" and data.num_classes)
    rules += [lambda s=s: require_sampler(s, sections["objective"].name, conditional) for s in sample.settings]
    extractor, weights = sections["reference"].extractor, sections["reference"].weights
    if root is not None:
        made = Paths(root).artifacts / "reference"  # then it may be that nobody needs them any more
        rules.append(
            lambda: require_weights(extractor, weights and Paths(root).given(weights), probe=not made.is_dir())
        )
    if root is not None and sections["train"].init_from is not None:
        rules.append(lambda: require_initial(sections, root, factor))
    for rule in rules:
        try:
            rule()
        except ValueError as error:
            yield str(error)
    if model.condition == "embeddings" and not features:
        yield "model.condition: embeddings are those of encode.features, which is null: name a file or an extractor"
    if data.held_out_fraction == 0:
        yield "data.held_out_fraction: 0 leaves nothing to judge the model by: give it some images"
    if sample.num_images <= sections["evaluate"].nearest_k:
        yield f"sample.num_images: {sample.num_images} is too few for evaluate.nearest_k {sections['evaluate'].nearest_k}"
    train, ema, register = sections["train"], sections["ema"], sections["register"]
    run, batch = sections["run"], train.global_batch_size
    if run.processes > 1 and batch % run.processes:
        yield f"run.processes: {run.processes} do not divide train.global_batch_size {batch}: choose a number that does"
    if run.latents == "streamed" and run.latents_from is None:
        yield "run.latents: streamed needs run.latents_from, which is null: name a bucket or a folder"
    if train.classes != "natural" and not data.num_classes:
        yield "train.classes: images without labels have no classes: set it to natural"
    guided = [setting.name for setting in sample.settings if setting.cfg_scale != 1]
    if guided and train.class_dropout_prob == 0 and train.max_steps:
        yield f"train.class_dropout_prob: 0 leaves the null label untrained, and sample.settings {guided[0]!r} guides with it"
    if conditional and train.class_dropout_prob == 1 and train.max_steps:
        yield "train.class_dropout_prob: 1 drops every condition, so none is learned: lower it, or model.condition none"
    every = train.snapshot_every_steps
    kept = {train.max_steps, *(range(every, train.max_steps, every) if every else ())}
    if ema.weights == "raw" and ema.step not in (None, train.max_steps):
        yield f"ema.step: raw weights are kept of the last step {train.max_steps} only: use null, or ema.weights ema"
    elif ema.step is not None and ema.step not in kept:
        yield f"ema.step: no average of step {ema.step} is kept: use null, or a multiple of train.snapshot_every_steps"
    if ema.sigma_rel is not None and not train.power_ema:
        yield "ema.sigma_rel: training keeps no power-function averages: set train.power_ema, say to [0.05, 0.1]"
    if sections["reference"].max_shift_pixels >= data.image_size // 2:
        yield f"reference.max_shift_pixels: must be below half of data.image_size, got {sections['reference'].max_shift_pixels}"
    metrics = metric_names(bool(data.num_classes), extractor=extractor, conditional=model.condition != "none")
    if register.metric not in {*metrics, *full_names(metrics, extractor, data, sample.num_images)}:
        yield f"register.metric: {register.metric!r} is not among the metrics: use one of {', '.join(metrics)}"
    names = [setting.name for setting in sample.settings]
    if register.setting not in names:
        yield f"register.setting: {register.setting!r} is not one of sample.settings ({', '.join(names)})"


def require_initial(sections: dict[str, Any], root: Path, factor: int | None) -> None:
    """Raise ValueError where train.init_from's folder holds no weights, or those of another network than `model`."""
    from dit.finetune import require_fit

    data, vae, train = (sections[name] for name in ("data", "vae", "train"))
    require_fit(
        train.init_from,
        root,
        sections["model"],
        sections["objective"],
        input_size=data.image_size // factor if factor else None,
        in_channels=vae.latent_channels if vae.pretrained is None else None,
        num_classes=data.num_classes,
        trained=train.max_steps > 0,
    )


def latent_factor(vae: Any, root: Path = Path(".")) -> int | None:
    """Pixels per latent, where it can be known without a download."""
    if vae.pretrained is None:
        return vae.factor
    if registered(vae.pretrained, "vae.pretrained"):
        return None
    folder = Paths(root).given(vae.pretrained)
    for file in (folder / "config.json", folder / "vae" / "config.json"):
        if file.is_file():
            try:
                return 2 ** (len(json.loads(file.read_text())["block_out_channels"]) - 1)
            except (KeyError, TypeError, json.JSONDecodeError):
                raise ValueError(
                    f"vae.pretrained: {file} is not the configuration of a diffusers AutoencoderKL"
                ) from None
    return 8 if vae.pretrained.startswith("stabilityai/sd-vae") else None
