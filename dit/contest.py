"""Which of two models is the better one: a figure, the terms on which it was come by, and a new figure on those terms.

Two models are compared on equal terms only: the same metric, extractor, reference, number of images, labels, seed and
sampling. Where a model was scored on others, it draws again and is scored again.
"""

import json
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dit.config import digest
from dit.drawing import draw
from dit.evaluation import EvaluateConfig, score
from dit.imagesets import open_images
from dit.metrics import lower_is_better
from dit.paths import file_sha256
from dit.progress import Progress
from dit.setting import SAMPLERS, SampleConfig, Setting, terms_of


class Incomparable(Exception):
    """Two models that no common terms fit."""


@dataclass(frozen=True)
class Candidate:
    """A model with its figure `value`, the terms of it, and `digest` of weights, autoencoder, metrics.json and code."""

    digest: str
    metric: str  # its full name, as in metrics.json
    value: float
    setting: Setting
    terms: dict[str, Any]
    config: dict[str, Any]  # the checkpoint's config.json

    @property
    def score_tag(self) -> str:
        """A name for these terms: where the registry keeps a version's figure on them."""
        return f"dit.score.{digest(self.terms)}"


def read_candidate(
    artifacts: Path, code: Sequence[Path], setting: str, metric: str, sample: SampleConfig, evaluate: EvaluateConfig
) -> Candidate:
    """Read artifacts/{ema,vae,evaluate}. Raises ValueError where the metrics lack what is asked for.

    `code` are the files that are packed with the model: mended code makes another version of the same weights.
    """
    file = artifacts / "evaluate" / "metrics.json"
    told = json.loads(file.read_text())
    known = {s.name: s for s in sample.settings if s.name in told["settings"]}
    if setting not in known:
        raise ValueError(f"register.setting: {setting!r} is none of sample.settings: use {' or '.join(known)}")
    row = told["settings"][setting]
    name = find_metric(metric, list(row), told["extractor"])
    terms = {key: told[key] for key in ("extractor", "reference", "num_images")}
    terms |= {"metric": name, "labels": sample.labels, "seed": sample.seed, "evaluate": evaluate.terms}
    terms["setting"] = terms_of(known[setting])
    files = [f for part in ("ema", "vae") for f in sorted((artifacts / part).rglob("*")) if f.is_file()]
    content = [[str(f.relative_to(artifacts)), file_sha256(f)] for f in [*files, file]]
    content += [[f.name, file_sha256(f)] for f in code]
    config = json.loads((artifacts / "ema" / "config.json").read_text())
    return Candidate(digest(content), name, row[name], known[setting], terms, config)


def find_metric(wanted: str, names: list[str], extractor: str) -> str:
    """The full name (`fid_digits_classifier_pooled_1k`) of a metric (`fid_pooled`, or the full name itself)."""
    short = {name.rpartition("_")[0].replace(f"_{extractor}", ""): name for name in names}
    if wanted not in names and wanted not in short:
        raise ValueError(f"register.metric: {wanted!r} is not among the metrics: use one of {', '.join(short)}")
    return wanted if wanted in names else short[wanted]


def beats(metric: str, value: float, champion: float) -> bool:
    """Whether a figure is strictly better than the champion's. One that is not finite never wins and always loses."""
    if not math.isfinite(value) or not math.isfinite(champion):
        return math.isfinite(value)
    return value < champion if lower_is_better(metric) else value > champion


def forbidden(license: str | None, allowed_licenses: Sequence[str] | None) -> str | None:
    """Why weights under this licence may not be champion's: they descend from somebody's, whose licence is not among
    the allowed ones. None where they may: own weights have no licence, and no list allows all."""
    if license is None or allowed_licenses is None:
        return None
    if license.lower() in (allowed.lower() for allowed in allowed_licenses):
        return None
    return f"under {license}, which is not among register.allowed_licenses"


def rescore(
    ema: Path,
    vae: Path,
    own: Setting | None,
    candidate: Candidate,
    sample: SampleConfig,
    evaluate: EvaluateConfig,
    reference: Path,
    device: Any,
) -> tuple[float, Setting]:
    """Another model's figure on the candidate's terms, and the setting that it drew with.

    That is the candidate's, unless its sampler does not fit the other's objective: then it is `own`, the setting that
    the other was scored with before. Its pictures lie in a folder beside `ema` while they are scored. Raises
    Incomparable where it draws other things, or cannot be read by this code.
    """
    with tempfile.TemporaryDirectory(prefix="drawn-", dir=ema.parent) as folder:
        setting = redraw(ema, vae, own, candidate, sample, device, Path(folder) / "samples.npz")
        images = open_images(Path(folder) / "samples.npz")
        progress = Progress("the champion is scored", images.count)
        figures = score(images, reference, evaluate, device, place=Path(folder), progress=progress)
    if candidate.metric not in figures:
        raise Incomparable(f"it has no {candidate.metric}, since it knows no classes")
    return figures[candidate.metric], setting


def redraw(
    ema: Path, vae: Path, own: Setting | None, candidate: Candidate, sample: SampleConfig, device: Any, file: Path
) -> Setting:
    """Draw the images of `rescore` into `file`, and return the setting they were drawn with. Raises Incomparable."""
    from dit.checkpoint import load_checkpoint
    from dit.vae import Autoencoder

    try:
        checkpoint, autoencoder = load_checkpoint(ema, device), Autoencoder.load(vae, device)
        for what in ("classes", "image_size"):
            if checkpoint.config[what] != candidate.config[what]:
                raise Incomparable(f"its {what} are {checkpoint.config[what]}, not {candidate.config[what]}")
        fits = candidate.setting.sampler in SAMPLERS[checkpoint.config["objective"]["name"]]
        setting = candidate.setting if fits or own is None else own
        progress = Progress("the champion draws", sample.num_images)
        draw(checkpoint, autoencoder, setting, sample, file, progress=progress)
    except ValueError as error:
        raise Incomparable(" ".join(str(error).split())) from error
    return setting
