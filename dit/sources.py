"""Where images come from, and how any image file becomes a square RGB picture.

A source is a set of keys; a key names bytes; the bytes, and nothing else, make a picture. Sources are `digits`, the 1,797
handwritten digits that scikit-learn carries, and image files and archives of them in a folder or on S3. The listing at the end of this page
is what the pipeline knows of a source: content hashes, labels, and when each image was first seen.
"""

import hashlib
import io
import json
import re
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
LABEL_FILES = (".csv", ".tsv", ".json", ".jsonl")
COLUMNS = ["key", "bytes", "sha256", "label", "generation", "number"]


@dataclass(frozen=True)
class DataConfig:
    """Which images, which of them are held out, and how they are packed."""

    name: str  # stands in the names of metrics: fid_<name>_classifier_1k
    source: str  # "digits", the path of a folder or an archive, or s3://bucket/prefix
    labels: str  # "folder", "none", or the name of a labels file in the source
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
            raise ValueError("source must be 'digits', a folder, an archive or s3://bucket/prefix, got an empty text")
        if self.labels not in ("folder", "none") and not self.labels.endswith(LABEL_FILES):
            raise ValueError(f"labels must be folder, none, or a {', '.join(LABEL_FILES)} file, got {self.labels!r}")
        if self.labels == "none" and self.num_classes != 0:
            raise ValueError(f"num_classes must be 0 where labels is none, got {self.num_classes}")
        if self.labels != "none" and self.num_classes < 2:
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
    """One image of a source."""

    key: str  # unique; a folder's are relative paths with slashes
    bytes: int
    stamp: tuple[int, int, int | str] | None  # (bytes, mtime_ns, inode or ETag): equal means unchanged
    label: int  # index into the class names; 0 where there are no labels
    sha256: str | None = None  # of the content, "" where it cannot be read; None where it was not looked at


class Found(NamedTuple):
    """What a source holds now."""

    images: list[Entry]  # sorted by key
    classes: list[str]  # sorted; empty where labels is none
    others: int  # files that are no images by their name


class Source(Protocol):
    """Keys, and the bytes that each names."""

    def look(self, labels: str) -> Found:
        """All images. Raises ValueError, one line, or OutOfReach."""

    def read(self, key: str, version: str = "") -> bytes:
        """The bytes that a key names, of that version if one is given. Raises OSError where they are not to be had."""


class Digits:
    """The embedded digits: 8 x 8 grey values each."""

    def look(self, labels: str) -> Found:
        contents, numbers = _digits()
        labelled = labels != "none"
        images = [
            Entry(f"digits/{index:04d}", len(content), None, label if labelled else 0)
            for index, (content, label) in enumerate(zip(contents, numbers, strict=True))
        ]
        return Found(images, [str(digit) for digit in range(10)] if labelled else [], 0)

    def read(self, key: str, version: str = "") -> bytes:
        return _digits()[0][int(key.removeprefix("digits/"))]


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
