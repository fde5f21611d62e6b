"""Where images come from, and how any image file becomes a square RGB picture.

A source is a set of keys; a key names bytes; the bytes, and nothing else, make a picture. Two sources exist: `digits`,
the 1,797 handwritten digits that scikit-learn carries, and a folder of image files. The listing at the end of this page
is what the pipeline knows of a source: content hashes, labels, and when each image was first seen.
"""

import hashlib
import io
import json
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
COLUMNS = ["key", "bytes", "sha256", "label", "generation", "number"]


@dataclass(frozen=True)
class DataConfig:
    """Which images, which of them are held out, and how they are packed."""

    name: str  # stands in the names of metrics: fid_<name>_classifier_1k
    source: str  # "digits", or the path of a folder
    labels: Literal["folder", "none"]
    num_classes: int  # 0 where labels is none
    image_size: int  # pixels, both sides
    mirror: bool
    held_out_fraction: float
    split_seed: int
    shard_images: int
    max_bad_fraction: float

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z0-9_]+", self.name):
            raise ValueError(f"name must be of a-z, 0-9 and _ (it stands in metric names), got {self.name!r}")
        if not self.source.strip():
            raise ValueError("source must be 'digits' or the path of a folder, got an empty text")
        if self.labels == "none" and self.num_classes != 0:
            raise ValueError(f"num_classes must be 0 where labels is none, got {self.num_classes}")
        if self.labels == "folder" and self.num_classes < 2:
            raise ValueError(f"num_classes must be at least 2 (or 0 with labels: none), got {self.num_classes}")
        for name, least in (("image_size", 8), ("shard_images", 1), ("split_seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if not 0 <= self.held_out_fraction < 1:
            raise ValueError(f"held_out_fraction must be at least 0 and below 1, got {self.held_out_fraction}")
        if not 0 <= self.max_bad_fraction <= 1:
            raise ValueError(f"max_bad_fraction must be between 0 and 1, got {self.max_bad_fraction}")


class Unreadable(ValueError):
    """These bytes are no picture. The message is the reason, the same on every machine."""


class Entry(NamedTuple):
    """One image of a source, its content not yet looked at."""

    key: str  # unique; a folder's are relative paths with slashes
    bytes: int
    stamp: tuple[int, int, int] | None  # (bytes, mtime_ns, inode): equal means unchanged; None: nothing to go by
    label: int  # index into the class names; 0 where there are no labels


class Found(NamedTuple):
    """What a source holds now."""

    images: list[Entry]  # sorted by key
    classes: list[str]  # sorted; empty where labels is none
    others: int  # files that are no images by their name


def list_images(data: DataConfig) -> Found:
    """All images of the source. Raises ValueError, one line, where source and settings do not fit together."""
    found = _list_digits(data) if data.source == "digits" else _list_folder(data)
    if data.labels == "folder" and len(found.classes) == 1:
        raise ValueError(
            f"data.labels: {data.source!r} has one class only ({found.classes[0]!r}): add a sub-folder for each other "
            "class, or set labels: none and num_classes: 0"
        )
    if len(found.classes) != data.num_classes:
        shown = ", ".join(map(repr, found.classes[:5])) + (", ..." if len(found.classes) > 5 else "")
        raise ValueError(
            f"data.num_classes: is {data.num_classes}, but {data.source!r} has {len(found.classes)} classes "
            f"({shown}): set num_classes: {len(found.classes)}"
        )
    return found


def read_content(data: DataConfig, key: str) -> bytes:
    """The bytes that a key names. Raises OSError where they are not to be had."""
    if data.source == "digits":
        return _digits()[0][int(key.removeprefix("digits/"))]
    return (Path(data.source).expanduser() / key).read_bytes()


def read_image(data: DataConfig, key: str) -> "Image":
    """The picture that a key names: RGB, image_size x image_size pixels. Raises OSError or Unreadable."""
    return decode(data, read_content(data, key))


def decode(data: DataConfig, content: bytes) -> "Image":
    """Bytes of the source as an RGB picture of image_size x image_size pixels, free of metadata. Raises Unreadable."""
    from PIL import Image, UnidentifiedImageError

    if data.source == "digits":
        return center_crop(Image.frombytes("L", (8, 8), content).convert("RGB"), data.image_size)
    if not content:
        raise Unreadable("empty file")
    try:
        with Image.open(io.BytesIO(content), formats=("PNG", "JPEG", "WEBP")) as image:
            image.load()
            return center_crop(to_rgb(image), data.image_size)
    except UnidentifiedImageError:
        raise Unreadable("neither a PNG, nor a JPEG, nor a WebP image") from None
    except (MemoryError, Unreadable):
        raise
    except Exception as error:  # Pillow's decoders raise nearly everything, and its guard against bombs plain Exception
        raise Unreadable(f"{type(error).__name__}: {' '.join(str(error).split())}") from None


def to_rgb(image: "Image") -> "Image":
    """Any Pillow image as 8-bit RGB: turned upright by its EXIF orientation, transparency over white, first frame."""
    import numpy as np
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16-bit grey: the upper byte, which is also what Pillow keeps of 16-bit colour
        return Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def center_crop(image: "Image", size: int) -> "Image":
    """The centre crop of ADM (Dhariwal & Nichol 2021, arXiv:2105.05233), which DiT and SiT take their data through.

    Halve with a box filter while the shorter side is at least twice `size`, scale that side to `size` bicubically
    (smaller images grow), cut the middle out.
    """
    from PIL import Image

    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    if width * height > max(Image.MAX_IMAGE_PIXELS or 0, size * size):
        raise Unreadable(f"too narrow: {image.width}x{image.height} pixels would grow to {width}x{height}")
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    image = image.crop((left, top, left + size, top + size))
    image.info = {}  # profiles, comments and positions would travel along into every file made of it
    return image


@cache
def _digits() -> tuple[list[bytes], list[int]]:
    # sklearn's data file without sklearn: importing that takes seconds.
    import gzip

    import numpy as np

    package = find_spec("sklearn")
    if package is None or package.origin is None:
        raise ValueError("data.source: the digits come with scikit-learn, which is missing: pip install scikit-learn")
    with gzip.open(Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz", "rt") as file:
        table = np.loadtxt(file, delimiter=",")  # 64 grey values 0..16 and the digit
    grey = np.rint(table[:, :64] * (255 / 16)).astype(np.uint8)
    return [row.tobytes() for row in grey], [int(label) for label in table[:, 64]]


def _list_digits(data: DataConfig) -> Found:
    contents, labels = _digits()
    labelled = data.labels == "folder"
    images = [
        Entry(f"digits/{index:04d}", len(content), None, label if labelled else 0)
        for index, (content, label) in enumerate(zip(contents, labels, strict=True))
    ]
    return Found(images, [str(digit) for digit in range(10)] if labelled else [], 0)


def _list_folder(data: DataConfig) -> Found:
    root = Path(data.source).expanduser()
    if not root.exists():
        raise ValueError(
            f"data.source: the folder {data.source!r} is not there (seen from {Path.cwd()}): correct the path"
        )
    if not root.is_dir():
        raise ValueError(f"data.source: {data.source!r} is not a folder: give the folder that holds the images")
    files, others = [], 0
    try:
        for key, status in _walk(root):
            if key.lower().endswith(SUFFIXES):
                files.append((key, (status.st_size, status.st_mtime_ns, status.st_ino)))
            else:
                others += 1
    except PermissionError as error:
        raise ValueError(f"data.source: no permission to list {error.filename!r}: grant it, or move it away") from None
    if not files:
        ignored = f" ({others} other files)" if others else ""
        raise ValueError(f"data.source: no PNG, JPEG or WebP image in {data.source!r}{ignored}: put some there")
    files.sort()
    _refuse_odd_names([key for key, _ in files])
    if data.labels == "none":
        return Found([Entry(key, stamp[0], stamp, 0) for key, stamp in files], [], others)
    loose = [key for key, _ in files if "/" not in key]
    if loose:
        raise ValueError(
            f"data.labels: {len(loose)} images ({loose[0]!r}, ...) lie directly in {data.source!r}, "
            "not in a sub-folder per class: move them, or set labels: none and num_classes: 0"
        )
    classes = sorted({key.partition("/")[0] for key, _ in files})
    index = {name: number for number, name in enumerate(classes)}
    return Found([Entry(key, stamp[0], stamp, index[key.partition("/")[0]]) for key, stamp in files], classes, others)


def _walk(root: Path) -> Iterator[tuple[str, os.stat_result]]:
    """Every file below `root` that is not hidden: (path relative to it, stat). Follows links, but not in circles."""
    top = os.stat(root)
    pending = [(str(root), "", ((top.st_dev, top.st_ino),))]
    while pending:
        folder, prefix, above = pending.pop()
        with os.scandir(folder) as items:
            for item in items:
                if item.name.startswith("."):
                    continue
                try:
                    found = item.stat()
                except OSError:  # a link that leads nowhere, or a file deleted while we look
                    continue
                identity = (found.st_dev, found.st_ino)
                if stat.S_ISREG(found.st_mode):
                    yield prefix + item.name, found
                elif stat.S_ISDIR(found.st_mode) and identity not in above:
                    pending.append((item.path, f"{prefix}{item.name}/", (*above, identity)))


def _refuse_odd_names(keys: list[str]) -> None:
    for key in keys:
        if not key.isascii():
            try:
                key.encode()
            except UnicodeEncodeError:
                raise ValueError(f"data.source: the file name {key!r} is not valid UTF-8: rename it") from None


class Row(NamedTuple):
    """One image in the listing."""

    key: str
    bytes: int
    sha256: str  # of the content; "" where the file could not be read
    label: int
    generation: int  # the scan, counted from 0, that first saw the key
    number: int  # the position among that scan's new images, kept for ever


class Listing(NamedTuple):
    """artifacts/scan/listing.json: everything later stages know about the source."""

    source: str
    labels: str
    classes: list[str]
    rows: list[Row]


def format_listing(listing: Listing) -> bytes:
    """The listing as JSON, one row a line: compact, and a difference shows the images that differ."""
    head = {"source": listing.source, "labels": listing.labels, "classes": listing.classes, "columns": COLUMNS}
    lines = [f"{json.dumps(key)}: {json.dumps(value, ensure_ascii=False)},\n" for key, value in head.items()]
    encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
    rows = ",\n".join([encode(row) for row in listing.rows])
    return ("{\n" + "".join(lines) + '"rows": [\n' + rows + "\n]\n}\n").encode()


def read_listing(path: Path) -> Listing:
    """The listing that scan wrote. Raises FileNotFoundError, or ValueError where the file is damaged."""
    try:
        content = json.loads(path.read_bytes())
        if content["columns"] != COLUMNS:
            raise ValueError(f"columns {content['columns']}")
        rows = [Row(*row) for row in content["rows"]]
        return Listing(content["source"], content["labels"], content["classes"], rows)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is damaged ({error}): delete it to start anew (all images then count as new)"
        ) from None


def content_hash(content: bytes) -> str:
    """The name of some bytes: sha256 in hex."""
    return hashlib.sha256(content).hexdigest()
