"""A source made of files: images as they lie in a place, images in its archives, and the class of each.

The key of an image is its file's name in the place; in an archive, the archive's name and then its own.
"""

import csv
import io
import json
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from dit import archives
from dit.archives import PACKED, Member, is_archive
from dit.paths import Given, given_here
from dit.places import Alone, File, Folder, Place
from dit.progress import Progress
from dit.sources import SUFFIXES, DataConfig, Digits, Entry, Found, Source

ARCHIVES_AT_A_TIME = 4  # each is read through by one thread


def open_source(
    data: DataConfig,
    *,
    memory: Path | None = None,
    bucket: Callable[[str], Place] | None = None,
    given: Given = given_here,
) -> Source:
    """What data.source names. `bucket` opens s3://bucket/folder/; `memory` is a folder for what archives hold; `given`
    says where a path lies.

    Raises ValueError, one line.
    """
    if data.source == "digits":
        return Digits()
    root = data.source.rstrip("/")
    folder, name = root.rpartition("/")[::2] if is_archive(root) else (root, "")
    if is_bucket(data.source):
        assert bucket is not None, "whoever opens a bucket brings the door to it along"
        return Files(_part(bucket(folder), name), data.source, memory)
    path = given(root or "/")
    if name and path.is_file():
        return Files(_part(Folder(folder, path.parent), name), data.source, memory)
    return Files(Folder(data.source, path), data.source, memory)


def _part(place: Place, name: str) -> Place:
    return Alone(place, name) if name else place


def is_bucket(source: str) -> bool:
    """Whether a source lies on S3."""
    return source.startswith("s3://")


def list_images(data: DataConfig, source: Source | None = None) -> Found:
    """All images of the source (by default: of a folder, its archives not looked into).

    Raises ValueError, one line, where source and settings do not fit together.
    """
    found = (source or _plain(data)).look(data.labels)
    if data.labels != "none" and len(found.classes) == 1:
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
    """The bytes that a key of the digits or of a folder names. Raises OSError where they are not to be had."""
    return _plain(data).read(key)


def _plain(data: DataConfig) -> Source:
    if data.source == "digits":
        return Digits()
    return Files(Folder(data.source), data.source, look_into=False)


class Image(NamedTuple):
    """An image, not yet labelled."""

    key: str
    file: File
    member: Member | None  # where the file is an archive


class Files:
    """The images of a place, as files and (unless `look_into` is false) in archives.

    What archives hold is remembered in the folder `memory`, as long as their stamps stay.
    """

    def __init__(self, place: Place, told: str, memory: Path | None = None, *, look_into: bool = True):
        self.place, self.told, self.memory, self.look_into = place, told, memory, look_into
        self.lock = threading.Lock()  # an archive is looked into once, by whoever asks first
        self.members: dict[str, tuple[File, dict[str, Member]] | None] = {}  # by the archive's name

    def look(self, labels: str) -> Found:
        """All images. Raises ValueError, one line, where there are none or their labels do not fit; or OutOfReach."""
        images, boxes, others, packed = [], [], 0, ""
        for file in self.place.files():
            if file.name.lower().endswith(SUFFIXES):
                images.append(Image(file.name, file, None))
            elif self.look_into and is_archive(file.name):
                boxes.append(file)
            else:
                others += file.name != labels
                packed = packed or (file.name if file.name.lower().endswith(PACKED) else "")
        _refuse_odd_names([file.name for file in boxes] + [image.key for image in images])
        if boxes:
            _refuse_archives_that_are_folders(boxes, images)
            images += self._look_into(boxes)
        if not images:
            ignored = f" ({others} other files)" if others else ""
            if packed and self.look_into:
                raise ValueError(
                    f"data.source: {packed!r} cannot be read in pieces: make it a .tar or .zip, or unpack it"
                )
            raise ValueError(f"data.source: no PNG, JPEG or WebP image in {self.told!r}{ignored}: put some there")
        images.sort(key=lambda image: image.key)
        classes, label = self._labels(images, labels)
        return Found([_entry(image, label(image)) for image in images], classes, others)

    def read(self, key: str, version: str = "") -> bytes:
        """An image's file, of that version (an ETag) if one is given. Raises OSError where it is not to be had."""
        found = self._in_archive(key) if self.look_into else None
        if found is None:
            return self.place.read(key, version=version)
        (file, members), name = found
        if name not in members:
            raise FileNotFoundError(2, "No such image in the archive", key)
        return archives.read_member(self.place, file, members[name])

    def _look_into(self, boxes: list[File]) -> list[Image]:
        boxes.sort()
        progress = Progress("archives", len(boxes), "archives", say=print if len(boxes) >= 10 else lambda line: None)
        images = []
        with ThreadPoolExecutor(ARCHIVES_AT_A_TIME) as pool:
            for first in range(0, len(boxes), 16):  # all at once would keep an interrupt waiting
                part = boxes[first : first + 16]
                look = partial(archives.index, self.place, memory=self.memory)
                for box, members in zip(part, pool.map(look, part), strict=True):
                    self.members[box.name] = box, {member.name: member for member in members}
                    images += [Image(f"{box.name}/{member.name}", box, member) for member in members]
                    progress(1)
        return images

    def _in_archive(self, key: str) -> tuple[tuple[File, dict[str, Member]], str] | None:
        parts = key.split("/")
        for end in range(1, len(parts)):
            name = "/".join(parts[:end])
            if not is_archive(name):
                continue
            with self.lock:
                if name not in self.members:
                    file = self.place.find(name)
                    known = file and {member.name: member for member in archives.index(self.place, file, self.memory)}
                    self.members[name] = file and (file, known)
            if self.members[name]:
                return self.members[name], "/".join(parts[end:])
        return None

    # Labels

    def _labels(self, images: list[Image], labels: str) -> tuple[list[str], Callable[[Image], int]]:
        """The class names, and an image's index into them."""
        if labels == "none":
            return [], lambda image: 0
        if labels != "folder":
            return self._by_file(images, labels)
        own = [image for image in images if image.member and image.member.label]
        if own and len(own) < len(images):
            without = next(image.key for image in images if not (image.member and image.member.label))
            raise ValueError(f"data.labels: {own[0].key!r} has a label of its archive's own, {without!r} has none")
        if own:
            return _by_own(own)
        loose = [image.key for image in images if not image.member and "/" not in image.key]
        if loose:
            raise ValueError(
                f"data.labels: {len(loose)} images ({loose[0]!r}, ...) lie directly in {self.told!r}, "
                "not in a sub-folder per class: move them, or set labels: none and num_classes: 0"
            )
        classes = sorted({_folder(image) for image in images})
        number = {name: number for number, name in enumerate(classes)}
        return classes, lambda image: number[_folder(image)]

    def _by_file(self, images: list[Image], labels: str) -> tuple[list[str], Callable[[Image], int]]:
        try:
            named = read_labels(labels, self.place.read(labels))
        except OSError as error:
            raise ValueError(
                f"data.labels: {labels!r} of {self.told!r} cannot be read ({error.strerror}): it must lie there, "
                "or labels be folder or none"
            ) from None
        without = [image.key for image in images if image.key not in named]
        if without:
            raise ValueError(
                f"data.labels: {labels!r} names no class for {len(without)} images (the first is {without[0]!r}): "
                "add them, by their path below data.source"
            )
        classes = _sorted({named[image.key] for image in images})
        number = {name: number for number, name in enumerate(classes)}
        return classes, lambda image: number[named[image.key]]


def read_labels(name: str, content: bytes) -> dict[str, str]:
    """Key -> class name, of a labels file.

    .csv and .tsv: a first line with file_name (or key, path, file, image) and label (or class); .jsonl: the same names,
    an object a line; .json: {"labels": [[key, class], ...]} as StyleGAN's dataset.json, or {key: class}. Raises ValueError.
    """
    keys, classes = ("file_name", "key", "path", "file", "image"), ("label", "class")
    try:
        text = content.decode("utf-8-sig")
        if name.endswith(".json"):
            told = json.loads(text)
            told = told.get("labels", told)
            pairs = list(told.items() if isinstance(told, dict) else told)
        else:
            tab = "\t" if name.endswith(".tsv") else ","
            rows = [json.loads(line) for line in text.splitlines() if line.strip()] if name.endswith(".jsonl") else None
            rows = rows if rows is not None else list(csv.DictReader(io.StringIO(text, newline=""), delimiter=tab))
            key, label = (next(word for word in words if word in rows[0]) for words in (keys, classes))
            pairs = [(row[key], row[label]) for row in rows]
        named = {str(key): str(label) for key, label in pairs if key is not None and label is not None}
        if len(named) < len(pairs):
            raise ValueError("a key stands there twice, or a class is missing")
        return named
    except (
        ValueError,
        KeyError,
        TypeError,
        IndexError,
        StopIteration,
        RuntimeError,
        AttributeError,
        csv.Error,
    ) as error:
        reason = " ".join(str(error).split()) or "it has other columns, or none"
        raise ValueError(
            f"data.labels: {name!r} is no labels file ({reason}): give columns file_name,label (.csv, .tsv, .jsonl), "
            'or {"labels": [[file, class], ...]} (.json)'
        ) from None


def _by_own(images: list[Image]) -> tuple[list[str], Callable[[Image], int]]:
    numbers: dict[str, int] = {}
    for image in images:
        number, name = image.member.label
        if numbers.setdefault(name, number) != number:
            raise ValueError(
                f"data.labels: class {name!r} is number {numbers[name]} in one archive and {number} in "
                f"{image.file.name!r}: make them alike"
            )
    classes = sorted(numbers, key=lambda name: (numbers[name], name))
    place = {name: index for index, name in enumerate(classes)}
    return classes, lambda image: place[image.member.label[1]]


def _sorted(names: Iterable[str]) -> list[str]:
    """Numbers by their size, others by their letters."""
    names = list(names)
    return sorted(names, key=int) if all(name.isascii() and name.isdigit() for name in names) else sorted(names)


def _folder(image: Image) -> str:
    """The first folder of an image's path with archives left out; in an archive without folders, its name."""
    if image.member is None:
        return image.key.partition("/")[0]
    folders = [*image.file.name.split("/")[:-1], *image.member.name.split("/")[:-1]]
    return folders[0] if folders else PurePosixPath(image.file.name).stem


def _entry(image: Image, label: int) -> Entry:
    if image.member is None:
        return Entry(image.key, image.file.bytes, image.file.stamp, label)
    return Entry(image.key, image.member.bytes, None, label, image.member.sha256)


def _refuse_archives_that_are_folders(boxes: list[File], images: list[Image]) -> None:
    """A bucket may hold both `a.tar` and `a.tar/b.png`."""
    names = {box.name for box in boxes}
    for image in images:
        parts = image.key.split("/")
        for end in range(1, len(parts)):
            if (name := "/".join(parts[:end])) in names:
                raise ValueError(f"data.source: {name!r} is an archive, and the beginning of {image.key!r}: rename one")


def _refuse_odd_names(names: list[str]) -> None:
    for name in names:
        if not name.isascii():
            try:
                name.encode()
            except UnicodeEncodeError:
                raise ValueError(f"data.source: the file name {name!r} is not valid UTF-8: rename it") from None
