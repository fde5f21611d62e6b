"""What images are measured against: statistics and features of real images, whoever made them, and all that they tell.

Four forms are known. Ours is a folder with reference.json and features.safetensors, as the stage `reference` and
`save_reference` write it. ADM's is an .npz (arXiv 2105.05233) with the statistics of a whole training set (`mu`, `sigma`;
`mu_s`, `sigma_s` of sFID) and 10,000 of its images (`arr_0`), from which features are extracted when they are asked for.
A statistics file has `mu` and `sigma` alone: an .npz as pytorch-fid saves it, or a .pt out of torch-fidelity's cache.
Everything else is images, of which a reference is made.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from dit import foreign_statistics
from dit.arrays import open_npz
from dit.checkpoint import save_tensors
from dit.extractors import Extractor
from dit.features import collect
from dit.imagesets import ImageSet, open_images
from dit.inception import WIDTHS
from dit.parallel import world
from dit.paths import file_sha256, write_json

Form = Literal["ours", "adm", "statistics", "images"]
NETWORKS = ("classifier.safetensors", "judge.safetensors")  # that the stage `reference` fits, in our form's folder
MAX_FEATURES = 10_000  # real images that are compared one by one, as many as ADM's reference holds


@dataclass(frozen=True)
class Reference:
    """Real images as an extractor sees them.

    `moments` are mean (D,) and covariance (D, D) by layer, float64, of `count` images (None where a file does not say);
    `features` (m, D) and `labels` (m,) are of those that are compared one by one. Of ADM's form there are `images`
    instead: see `real_features`.
    """

    form: Form
    extractor: str  # name, as metrics carry it
    digest: str
    num_classes: int
    moments: Mapping[str, tuple[Tensor, Tensor]]
    extractor_digest: str | None = None
    count: int | None = None
    image_size: int | None = None  # of square images
    resize: str = ""
    folder: Path | None = None  # of our form: where classifier and judge lie too
    kind: str | None = None  # of our form: what `open_extractor` calls its extractor, ...
    weights: str | None = None  # ... and the file of one's own that it was given
    features: Mapping[str, Tensor] = field(default_factory=dict)
    labels: Tensor | None = None
    images: ImageSet | None = None


class Kept(Mapping[str, Tensor]):
    """Features by layer in a .safetensors file, read when they are asked for."""

    def __init__(self, file: Path, layers: list[str]):
        self.file, self.layers = file, layers

    def __getitem__(self, layer: str) -> Tensor:
        if layer not in self.layers:
            raise KeyError(layer)
        return _open_tensors(self.file).get_tensor(layer)

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)


def reference_form(path: Path) -> Form:
    """Which form of reference lies at `path`. Raises ValueError where nothing does."""
    if not path.exists():
        raise ValueError(f"{path} is not there: name a reference's folder, a .npz or .pt file, or images")
    if path.is_dir():
        return "ours" if (path / "reference.json").is_file() else "images"
    if path.suffix.lower() in (".pt", ".pth"):
        return "statistics"
    if path.suffix.lower() != ".npz":
        return "images"
    arrays = set(open_npz(path))
    if not arrays & {"mu", "sigma"}:
        return "images"
    return "adm" if "arr_0" in arrays else "statistics"


def read_reference(path: Path, extractor: Extractor | None = None) -> Reference:
    """The reference at `path`, of any form but images.

    Statistics that others made do not say whose features they are of: of Inception's, unless an `extractor` is given.
    Raises ValueError, one line, where the file is damaged, lacks something or does not fit the extractor.
    """
    form = reference_form(path)
    if form == "ours":
        return _read_ours(path)
    if form == "images":
        raise ValueError(f"{path} holds no reference (there is no reference.json): run the stage `reference`")
    name, widths = (extractor.name, extractor.widths) if extractor else ("inception", WIDTHS)
    layer = extractor.frechet[""] if extractor else "pooled"
    if path.suffix.lower() == ".npz":
        found = foreign_statistics.read_npz(path, layer)
    else:
        found = foreign_statistics.read_cache(path, layer, name)
    for layer, (mean, _) in found.items():
        if layer in widths and len(mean) != widths[layer]:
            raise ValueError(
                f"{path}: its statistics have {len(mean)} dimensions, {name}'s features ({layer}) {widths[layer]}: "
                "choose the extractor that they were made with (--extractor)"
            )
    images = open_images(path) if form == "adm" else None
    labels = None if images is None or images.labels is None else torch.from_numpy(images.labels)
    return Reference(
        form=form,
        extractor=name,
        digest=file_sha256(path),
        num_classes=0 if labels is None else int(labels.max()) + 1,
        moments=found,
        image_size=images.side if images else None,
        resize=extractor.resize if extractor else "",
        labels=labels,
        images=images,
    )


def build_reference(
    images: ImageSet,
    extractor: Extractor,
    folder: Path,
    most: int = MAX_FEATURES,
    progress: Callable[[int], None] = lambda count: None,
) -> Reference | None:
    """A reference made of images: the moments of them all, and the features of at most `most`, evenly spaced, in files
    in `folder`. None at every process but the main one. Raises ValueError for a single image."""
    if images.count < 2:
        raise ValueError(f"{images.name}: a reference needs at least 2 images, got {images.count}")
    found = collect(extractor, images, keep=dict.fromkeys(extractor.kept, most), folder=folder, progress=progress)
    if found is None:
        return None
    labels = None
    if images.labels is not None:
        labels = torch.from_numpy(images.labels)[found.indices[extractor.neighbours]]
    return Reference(
        form="images",
        extractor=extractor.name,
        digest=hashlib.sha256(f"{images.digest} {extractor.digest}".encode()).hexdigest(),
        num_classes=0 if images.labels is None else int(images.labels.max()) + 1,
        moments={layer: (moments.mean, moments.covariance) for layer, moments in found.moments.items()},
        extractor_digest=extractor.digest,
        count=images.count,
        image_size=images.side,
        resize=extractor.resize,
        features=found.kept,
        labels=labels,
        images=images,
    )


def real_features(
    reference: Reference,
    extractor: Extractor,
    folder: Path,
    progress: Callable[[int], None] = lambda count: None,
) -> Mapping[str, Tensor]:
    """Real features (m, D) by layer: the reference's own, or extracted from its images into `folder`/real.

    Empty where there are statistics alone. All processes call it; where there is something to extract, every one but
    the main one is given nothing.
    """
    if world().share(
        bool(reference.features) or reference.images is None
    ):  # the others may hold less than the main one
        return reference.features
    keep = dict.fromkeys(extractor.kept)
    found = collect(extractor, reference.images, keep=keep, moments_of=(), folder=folder / "real", progress=progress)
    return found.kept if found else {}


def kind_of(reference: Reference) -> str:
    """What `extractors.open_extractor` calls the extractor that the reference was made with."""
    if reference.kind:
        return reference.kind
    return "inception" if reference.extractor.startswith("inception") else reference.extractor.replace("_", "-")


def save_reference(reference: Reference, folder: Path) -> None:
    """Write a reference in our form, with all that it holds; `read_reference` then gives it back.

    Raises ValueError where there is something at `folder` already.
    """
    require_free(folder)
    source = reference.folder
    told = json.loads((source / "reference.json").read_text()) if source else {}
    told |= {
        "extractor": reference.extractor,
        "extractor_kind": kind_of(reference),
        "digest": reference.digest,
        "num_classes": reference.num_classes,
        "form": reference.form,
        "extractor_digest": reference.extractor_digest,
        "count": reference.count,
        "kept": max((len(reference.features[layer]) for layer in reference.features), default=0),
        "image_size": reference.image_size,
        "resize": reference.resize,
    }
    tensors = {f"{layer}.mu": mean for layer, (mean, _) in reference.moments.items()}
    tensors |= {f"{layer}.sigma": covariance for layer, (_, covariance) in reference.moments.items()}
    tensors |= dict(reference.features)
    if reference.labels is not None:
        tensors["labels"] = reference.labels
    folder.mkdir(parents=True)
    try:
        for network in (source / name for name in NETWORKS) if source else ():
            if network.is_file():
                shutil.copyfile(network, folder / network.name)
        save_tensors(folder / "features.safetensors", tensors)
        write_json(folder / "reference.json", told)  # last: without it the folder counts for nothing
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        if type(error).__name__ == "SafetensorError":  # its own word for a full disk
            raise ValueError(f"{folder} cannot be written ({error}): free some space, or name another place") from None
        raise


def require_free(path: Path) -> None:
    """Raise ValueError where something lies at `path`: a result is never written over another one unasked."""
    if path.exists():
        raise ValueError(f"{path} is there already: choose another name, or delete it")


def require_match(reference: Reference, extractor: Extractor, images: ImageSet) -> None:
    """Raise ValueError, one line, where `images` cannot be measured against this reference with this extractor."""
    if reference.extractor != extractor.name:
        raise ValueError(
            f"the reference holds features of {reference.extractor}, not of {extractor.name}: use that extractor, "
            "or a reference made with this one"
        )
    known = reference.extractor_digest
    if known not in (None, extractor.digest):
        raise ValueError(
            f"the reference was made with other weights of {extractor.name} ({known[:12]}) than are here "
            f"({extractor.digest[:12]}): use the same file, or make the reference again"
        )
    if reference.resize not in ("", extractor.resize):
        raise ValueError(
            f"the reference's images were resized in another way ({reference.resize}) than these would be "
            f"({extractor.resize}): make the reference again"
        )
    side = reference.image_size
    if size := reference.images.size if reference.images is not None else side and (side, side):
        require_size(images, size)


def require_size(images: ImageSet, real: tuple[int, int]) -> None:
    """Raise ValueError where `images` have another height and width than the `real` ones."""
    if tuple(images.size) != tuple(real):
        raise ValueError(
            f"{images.name} holds images of {images.size[0]} x {images.size[1]} pixels, the reference of {real[0]} x "
            f"{real[1]}: compare images of one size, as they were generated"
        )


def _read_ours(folder: Path) -> Reference:
    try:
        told = json.loads((folder / "reference.json").read_text())
        extractor, digest, num_classes = told["extractor"], told["digest"], told["num_classes"]
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(
            f"{folder} holds no reference (reference.json is missing or torn): run the stage `reference`"
        ) from None
    file = folder / "features.safetensors"
    tensors = _open_tensors(file)
    names = set(tensors.keys())
    layers = sorted(name.removesuffix(".mu") for name in names if name.endswith(".mu"))
    if not layers or not {f"{layer}.sigma" for layer in layers} <= names:
        raise ValueError(f"{file} lacks means or covariances: run the stage `reference`")
    moments = {
        layer: foreign_statistics.checked(file, tensors.get_tensor(f"{layer}.mu"), tensors.get_tensor(f"{layer}.sigma"))
        for layer in layers
    }
    kept = sorted(name for name in names if "." not in name and name not in ("labels", "indices"))
    return Reference(
        form=told.get("form", "ours"),
        extractor=extractor,
        digest=digest,
        num_classes=num_classes,
        moments=moments,
        extractor_digest=told.get("extractor_digest"),
        count=told.get("count", told.get("num_images")),
        image_size=told.get("image_size"),
        resize=told.get("resize", ""),
        folder=folder,
        kind=told.get("extractor_kind", "classifier"),
        weights=told.get("weights"),
        features=Kept(file, kept),
        labels=tensors.get_tensor("labels") if "labels" in names else None,
    )


def _open_tensors(file: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(file, "pt")
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file} is missing or torn ({error}): run the stage `reference`") from None
