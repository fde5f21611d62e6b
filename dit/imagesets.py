"""Any set of images, from anyone: how many, how large, and `read(start, stop)`, whatever they lie in.

An .npz or .npy of pixels, a folder of image files, WebDataset tars, an array in memory, a split of our own shards. Memory
is what is read at a time, never the set. What is torn, forged or of two sizes is refused in one line that names the file.
"""

import hashlib
import io
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import numpy as np

from dit import parallel
from dit.arrays import Member, open_npy, open_npz
from dit.samples import IMAGES, labels_of
from dit.shards import Split, read_manifest
from dit.sources import SUFFIXES, to_rgb
from dit.tars import Index, index_tar

MOST_PIXELS = 1 << 26  # of one image: 8192 x 8192. More is a decompression bomb or a mistake
THREADS = min(8, os.cpu_count() or 1)  # that decode files: Pillow works outside Python's lock


@dataclass(eq=False)
class ImageSet:
    """Images of one size, in an order that is theirs."""

    name: str  # for messages
    count: int
    size: tuple[int, int]  # height, width
    labels: np.ndarray | None  # int64 (count,)
    reader: Callable[[int, int], np.ndarray]
    digester: Callable[[], str]
    classes: list[str] | None = None  # names of the labels, where sub-folders gave them

    @cached_property
    def digest(self) -> str:
        """sha256 of all images and labels: of pixels where they lie as pixels, of the files' bytes where they are files.

        The first question reads everything once, and finds what is torn.
        """
        return self.digester()

    @property
    def side(self) -> int | None:
        """Of square images; None where they are not square."""
        return self.size[0] if self.size[0] == self.size[1] else None

    def read(self, start: int, stop: int) -> np.ndarray:
        """Images `start` to `stop`, uint8 (stop - start, H, W, 3). Raises ValueError, one line, where one is damaged."""
        assert 0 <= start <= stop <= self.count, (start, stop, self.count)
        return self.reader(start, stop)

    def take(self, indices: Sequence[int]) -> np.ndarray:
        """The images of these numbers, uint8 (len(indices), H, W, 3); ascending ones are read in one pass."""
        taken = np.empty((len(indices), *self.size, 3), np.uint8)
        cuts = [i for i in range(1, len(indices)) if indices[i] != indices[i - 1] + 1]
        for first, end in pairwise([0, *cuts, len(indices)]):
            if first < end:
                taken[first:end] = self.read(int(indices[first]), int(indices[first]) + end - first)
        return taken

    def blocks(self, size: int) -> list[range]:
        """All numbers in order, `size` at a time; the last block may be shorter."""
        return parallel.blocks(self.count, size)


def open_images(path: Path | str) -> ImageSet:
    """The images of an .npz, .npy or .tar, or of a folder of image files or of .tar files.

    Sub-folders are labels (by sorted name, as for training) if every image is in one and there are at least two; a tar's
    are its .cls files; an .npz's its `labels`. Raises ValueError, one line, where there are none or they don't fit.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        return _open_folder(path)
    if not path.is_file():
        raise ValueError(f"{path} is not there (seen from {Path.cwd()}): correct the path")
    ending = path.suffix.lower()
    if ending == ".npz":
        members = open_npz(path)
        if IMAGES not in members:
            shown = ", ".join(sorted(members)[:6]) or "nothing"
            raise ValueError(f"{path} has no array {IMAGES} (it has {shown}): {_ADM}")
        return _of_member(members[IMAGES], labels_of(members))
    if ending == ".npy":
        return _of_member(open_npy(path), None)
    if ending == ".tar":
        return _of_tars(str(path), [path])
    raise ValueError(f"{path}: images come as .npz, .npy, .tar, or a folder of them; {ending or 'no ending'} is none")


def from_array(images: np.ndarray, labels: np.ndarray | None = None, name: str = "the images in memory") -> ImageSet:
    """The images uint8 (N, H, W, 3) of an array, with labels (N,)."""
    images = np.asarray(images)
    _require_form(name, images.dtype, images.shape)
    labels = None if labels is None else np.asarray(labels, np.int64)
    assert labels is None or labels.shape == (len(images),), f"labels {labels.shape} for {len(images)} images"

    def pieces() -> Iterator[bytes]:
        return (np.ascontiguousarray(image).tobytes() for image in images)

    return ImageSet(
        name,
        len(images),
        images.shape[1:3],
        labels,
        lambda start, stop: images[start:stop],
        lambda: _pixels_digest(images.shape, pieces(), labels),
    )


def from_shards(folder: Path, split: Split, most: int | None = None) -> ImageSet:
    """A split of artifacts/shard, or `most` of it taken evenly: the images of `shards.stream_split`, in its order.

    Raises ValueError where the split is empty, or a shard is torn.
    """
    manifest = read_manifest(folder)
    files = [folder / shard["file"] for shard in manifest["shards"] if shard["split"] == split]
    told = f"{split} images of {folder}"
    if not files:
        raise ValueError(f"{told}: there are none: change data.held_out_fraction, or add images")
    digest = hashlib.sha256(json.dumps([manifest["digest"], split, most]).encode()).hexdigest()
    found = _of_tars(told, files, most, digest)
    found.labels = found.labels if manifest["classes"] else None
    found.classes = manifest["classes"] or None
    return found


# Pixels

_ADM = "ADM's evaluator and this one take `arr_0`, uint8 (images, height, width, 3)"


def _of_member(member: Member, labels: np.ndarray | None) -> ImageSet:
    _require_form(member.told, member.dtype, member.shape)
    if member.fortran:
        raise ValueError(f"{member.told} lies column by column: save numpy.ascontiguousarray(images)")
    return ImageSet(
        member.path.as_posix(),
        member.shape[0],
        member.shape[1:3],
        labels,
        member.rows,
        lambda: _pixels_digest(member.shape, member.pieces(), labels),
    )


def _require_form(name: str, dtype: np.dtype, shape: tuple[int, ...]) -> None:
    if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3:
        turned = len(shape) == 4 and shape[1] == 3 and shape[3] != 3
        hint = " (colours come last: transpose(0, 2, 3, 1))" if turned else ""
        raise ValueError(f"{name} is {dtype} {shape}{hint}: {_ADM}")
    if 0 in shape:
        raise ValueError(f"{name} holds no images (its shape is {shape}): give some")
    if too_large := _too_large(shape[2], shape[1]):
        raise ValueError(f"{name} {too_large}: {_ADM}")


def _pixels_digest(shape: tuple[int, ...], pieces: Iterator[bytes], labels: np.ndarray | None) -> str:
    """One name for the same pixels and labels, in memory, stored or compressed."""
    digest = hashlib.sha256(json.dumps(["pixels", shape, labels is not None]).encode())
    for piece in pieces:
        digest.update(piece)
    if labels is not None:
        digest.update(labels.tobytes())
    return digest.hexdigest()


# Files


def _open_folder(path: Path) -> ImageSet:
    try:
        keys = sorted(_walk(path))
    except PermissionError as error:
        raise ValueError(f"no permission to list {error.filename!r}: grant it, or move it away") from None
    images = [key for key in keys if key.lower().endswith(SUFFIXES)]
    packed = [key for key in keys if key.lower().endswith((".tar", ".npz", ".npy"))]
    here = [key for key in packed if "/" not in key]
    tars = [path / key for key in here if key.lower().endswith(".tar")]
    if images and here:
        raise ValueError(f"{path} holds both {images[0]} and {here[0]}: name the file that is meant, or move it away")
    if tars:
        return _of_tars(str(path), tars)
    if not images:
        hint = f"name {path / packed[0]} or its folder" if packed else "put some there, or correct the path"
        raise ValueError(f"{path} holds no PNG, JPEG or WebP image: {hint}")
    names = sorted({key.partition("/")[0] for key in images})
    labels, classes = None, None
    if len(names) > 1 and all("/" in key for key in images):
        number = {name: label for label, name in enumerate(names)}
        labels, classes = np.array([number[key.partition("/")[0]] for key in images], np.int64), names

    def content(index: int) -> bytes:
        return (path / images[index]).read_bytes()

    return _of_files(str(path), lambda index: str(path / images[index]), content, len(images), labels, classes)


def _walk(folder: Path, prefix: str = "", above: tuple[tuple[int, int], ...] = ()) -> Iterator[str]:
    """The relative paths of all files below `folder` that are not hidden. Follows links, but not in circles."""
    status = folder.stat()
    identity = (status.st_dev, status.st_ino)
    with os.scandir(folder) as items:
        for item in items if identity not in above else ():
            if item.name.startswith("."):
                continue
            if item.is_dir():
                yield from _walk(Path(item.path), f"{prefix}{item.name}/", (*above, identity))
            elif item.is_file():
                yield prefix + item.name


def _of_tars(name: str, files: list[Path], most: int | None = None, digest: str | None = None) -> ImageSet:
    index = Index.join([index_tar(file) for file in files])
    if not index.count:
        raise ValueError(f"{name} holds no PNG, JPEG or WebP image: put some there, or correct the path")
    step = 1 if most is None else max(1, -(-index.count // most))
    index = index.every(step)
    found = _of_files(name, index.told, index.content, index.count, index.labels, None)
    if digest is not None:
        found.digester = lambda: digest
    return found


def _of_files(
    name: str,
    told: Callable[[int], str],
    content: Callable[[int], bytes],
    count: int,
    labels: np.ndarray | None,
    classes: list[str] | None,
) -> ImageSet:
    """Images that lie as files: number `i` is the bytes content(i), and messages call it told(i)."""

    def bytes_of(index: int) -> bytes:
        try:
            return content(index)
        except OSError as error:
            raise ValueError(f"{told(index)} could not be read ({error.strerror}): make it readable") from None

    def decode(index: int) -> np.ndarray:
        image = _decode(bytes_of(index))
        if isinstance(image, str):
            raise ValueError(f"{told(index)} {image}: replace or remove it")
        return image

    size = decode(0).shape[:2]

    def read(start: int, stop: int) -> np.ndarray:
        images = np.empty((stop - start, *size, 3), np.uint8)
        with ThreadPoolExecutor(THREADS) as pool:
            for place, image in enumerate(pool.map(decode, range(start, stop))):
                if image.shape[:2] != size:
                    raise ValueError(
                        f"{told(start + place)} is {image.shape[1]} x {image.shape[0]}, the first image "
                        f"({told(0)}) {size[1]} x {size[0]}: images of one set must be of one size"
                    )
                images[place] = image
        return images

    def digest() -> str:
        label = (lambda index: None) if labels is None else (lambda index: int(labels[index]))
        lines = hashlib.sha256(b'["files"]')
        for index in range(count):
            sha256 = hashlib.sha256(bytes_of(index)).hexdigest()
            lines.update(json.dumps([sha256, label(index)]).encode())
        return lines.hexdigest()

    return ImageSet(name, count, size, labels, read, digest, classes)


def _decode(content: bytes) -> np.ndarray | str:
    """The bytes of an image file as uint8 (H, W, 3); or what is wrong with them."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(content), formats=("PNG", "JPEG", "WEBP")) as image:
            if too_large := _too_large(*image.size):  # before anything is unpacked
                return too_large
            image.load()
            return np.asarray(to_rgb(image))
    except UnidentifiedImageError:
        return "is neither a PNG, nor a JPEG, nor a WebP image" if content else "is empty"
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise nearly everything, and its guard against bombs plain Exception
        return f"is damaged ({' '.join(str(error).split()) or type(error).__name__})"


def _too_large(width: int, height: int) -> str:
    if width * height <= MOST_PIXELS:
        return ""
    return f"tells of {width} x {height} pixels, and above {MOST_PIXELS} no image is opened"
