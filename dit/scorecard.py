"""`dit evaluate`: anyone's images against a reference, as a table for people and a record for programs.

Whatever decides a figure is in the record: the digests of images, reference and weights, counts, sizes, settings. What
cannot be compared is refused (images of another size than the reference's, features of another network) or said: the
papers' rows stand beside no figure that was come by in another way. Under torchrun the images are shared out.
"""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dit import __version__, papers, scoretable
from dit.arrays import open_npy
from dit.copies import check_copies, num_looked_at, picture, require_alike
from dit.evaluation import EvaluateConfig, Evaluation, evaluate_images, extractor_of, judge_of, require_enough
from dit.extractors import Extractor, open_extractor
from dit.imagesets import ImageSet, open_images
from dit.parallel import world
from dit.paths import replacing, write_json
from dit.progress import Progress
from dit.references import (
    Reference,
    build_reference,
    kind_of,
    read_reference,
    real_features,
    reference_form,
    require_free,
    require_match,
    require_size,
    save_reference,
)
from dit.runtime import pick_device
from dit.samples import read_labels

PICTURE = ".closest.png"  # of the pairs that look most like copies


@dataclass(frozen=True)
class Asked:
    """What `dit evaluate` was asked for; its options are explained where the command is."""

    reference: Path
    samples: Path | None = None  # None: a training's snapshots, which are drawn first
    extractor: str | None = None
    weights: Path | None = None
    labels: Path | None = None
    training: Path | None = None
    heldout: Path | None = None
    papers: bool = False
    keep_reference: Path | None = None
    output: Path | None = None
    device: str = "auto"
    bootstrap: int = 20

    def __post_init__(self) -> None:
        if (self.training is None) != (self.heldout is None):
            raise ValueError("--training and --heldout belong together: how near is near, only unseen images tell")
        if self.training is not None and self.training.resolve() == self.heldout.resolve():
            raise ValueError(
                f"--heldout: {self.heldout} is what --training names: it must hold images never trained on"
            )


def evaluate(asked: Asked, say: Callable[[str], None] = print) -> dict[str, Any] | None:
    """Measure, print the table, write the record, and return it; None at every process but the main one.

    Raises ValueError, one line, for what cannot be read, compared or written, if it can, before the work begins.
    """
    output = asked.output or Path(f"{asked.samples.resolve().name.removesuffix('.npz')}.metrics.json")
    require_places(asked, output, *([output.with_suffix(PICTURE)] if asked.training else []))
    config = EvaluateConfig(bootstrap=asked.bootstrap)
    images = open_images(asked.samples)
    require_enough(images, config)
    labels = _labels(asked, images)
    others = [open_images(path) for path in (asked.training, asked.heldout) if path is not None]
    if others:
        require_alike(images, *others)
    device = pick_device(asked.device)
    with scratch_beside(output) as folder:
        reference, extractor = open_both(asked, images, device, folder)
        if asked.keep_reference is not None and world().main:
            save_reference(reference, asked.keep_reference)
        found = evaluate_images(
            images,
            reference,
            extractor,
            config,
            folder=folder / "samples",
            progress=_progress("images", images.count),
            labels=labels,
            judge=judge_of(reference),
        )
        if found is None:
            return None
        card = record(images, reference, extractor, config, found)
    if others:
        card["copies"] = _copies(images, *others, output)
    if asked.papers:
        card["papers"] = papers.compared(card["records"])
    write_json(output, card)
    say(scoretable.text(card))
    say(f"{output}: everything that is known of these figures")
    return card


def require_places(asked: Asked, *results: Path) -> None:
    """Raise ValueError where a result could not be written, or would be written over something unasked: an output that
    was named may be replaced, unless it is what the work begins with."""
    for path in [*([] if asked.output else results), asked.keep_reference]:
        if path is not None:
            require_free(path)
    read = (asked.samples, asked.reference, asked.labels, asked.weights, asked.training, asked.heldout)
    for path in results:
        if path.is_dir():
            raise ValueError(f"--output: {path} is a folder: name a file in it")
        if path.exists() and any(other.exists() and path.samefile(other) for other in read if other is not None):
            raise ValueError(f"--output: {path} would be written over what is to be read: choose another name")


def open_both(asked: Asked, images: ImageSet, device: torch.device, folder: Path) -> tuple[Reference, Extractor]:
    """Reference and extractor, the one as the other needs it, the reference with the features of its real images.

    At all processes but the main one the reference may lack moments and features. Raises ValueError where they do not
    fit each other or the images.
    """
    path, form = asked.reference, reference_form(asked.reference)
    reference = read_reference(path) if form == "ours" else None
    real = open_images(path) if form == "images" else None
    if real is not None:  # before weights are brought, and hours of reading
        require_enough(real, EvaluateConfig())
        require_size(images, real.size)
    if reference and not asked.extractor and not asked.weights:
        extractor = extractor_of(reference, device)
    else:
        kind = asked.extractor or (kind_of(reference) if reference else "inception")
        try:
            extractor = open_extractor(kind, device=device, weights=asked.weights, folder=reference and path)
        except ValueError as error:
            if asked.extractor or form != "images":
                raise
            raise ValueError(f"{error}; or use --extractor random, which needs no weights") from None
    if real is not None:
        made = build_reference(real, extractor, folder / "real", progress=_progress("real images", real.count))
        reference = made or Reference("images", extractor.name, "", 0, {})
    elif form != "ours":
        reference = read_reference(path, extractor)
    require_match(reference, extractor, images)
    count = reference.images.count if reference.images is not None else 0
    features = real_features(reference, extractor, folder, _progress("real images", count))
    made_here = features and not reference.features
    return replace(
        reference, features=features, extractor_digest=extractor.digest if made_here else reference.extractor_digest
    ), extractor


def record(
    images: ImageSet, reference: Reference, extractor: Extractor, config: EvaluateConfig, found: Evaluation
) -> dict[str, Any]:
    """All that is known of the figures, as JSON has it."""
    real = reference.features
    one_by_one = len(real[extractor.neighbours]) if extractor.neighbours in real else 0
    return {
        "samples": {"name": images.name, "digest": images.digest, "count": images.count, "size": list(images.size)},
        "reference": {
            "form": reference.form,
            "digest": reference.digest,
            "count": reference.count,
            "one_by_one": one_by_one,
            "image_size": reference.image_size,
            "extractor": reference.extractor,
            "extractor_digest": reference.extractor_digest,  # null where whoever made it did not tell
            "resize": reference.resize,
        },
        "extractor": {
            "name": extractor.name,
            "digest": extractor.digest,
            "resize": extractor.resize,
            "official": extractor.official,
        },
        "settings": asdict(config),
        "metrics": found.values,
        "records": found.records,
        "infinity": found.infinity,
        "classes": {str(label): score for label, score in found.classes.items()},
        "made_with": {"dit": __version__, "torch": torch.__version__, "device": extractor.device.type},
    }


def _labels(asked: Asked, images: ImageSet) -> np.ndarray | None:
    """The labels that were given, else the images' own. Raises ValueError where they don't fit."""
    if asked.labels is None:
        return images.labels
    if not asked.labels.is_file():
        raise ValueError(f"--labels: {asked.labels} is not there: name an .npy, or an .npz with `labels`")
    if asked.labels.suffix.lower() == ".npz":
        labels = read_labels(asked.labels)
    else:
        labels = open_npy(asked.labels).load()
    if labels is None or labels.shape != (images.count,) or labels.dtype.kind not in "iu":
        told = "none" if labels is None else f"{labels.dtype} {labels.shape}"
        raise ValueError(
            f"{asked.labels}: needs a whole number for each of the {images.count} images (.npy, or `labels` in an .npz), "
            f"found {told}"
        )
    return labels.astype(np.int64)


def _copies(images: ImageSet, training: ImageSet, heldout: ImageSet, output: Path) -> dict[str, Any]:
    from PIL import Image

    progress = _progress("looking for copies", num_looked_at(images, training, heldout))
    found = check_copies(images, training, heldout, progress=progress)
    file = output.with_suffix(PICTURE)
    with replacing(file) as unfinished:
        Image.fromarray(picture(found, images, training)).save(unfinished, format="PNG")
    return {**found.record(), "picture": file.name}


@contextmanager
def scratch_beside(output: Path) -> Iterator[Path]:
    """A folder that all processes see, beside the result: features of 50,000 images are too much for some /tmp."""
    output.parent.mkdir(parents=True, exist_ok=True)
    if not world().main:
        yield Path(world().share(None))
        return
    with tempfile.TemporaryDirectory(prefix=".dit-evaluate-", dir=output.parent) as folder:
        yield Path(world().share(folder))


def _progress(what: str, count: int) -> Progress:
    """Only the main process speaks, for all."""
    return Progress(what, count, every_seconds=10.0, say=spoken(print))


def spoken(say: Callable[[str], None]) -> Callable[[str], None]:
    """`say` at the main process, silence at the others."""
    return say if world().main else lambda line: None
