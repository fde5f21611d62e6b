"""Where the images lie in a WebDataset tar: one pass over its headers, then any image by number.

Nothing is ever unpacked to disk. Still a tar that could write outside of its folder, or that tells of more than it
holds, was made by someone who meant harm or by a torn copy, and is refused.
"""

import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import numpy as np

from dit.sources import SUFFIXES

LABEL_BYTES = 20  # the longest number that fits into 64 bits


@dataclass(frozen=True)
class Index:
    """The images of some tars, in their order."""

    files: list[Path]
    names: list[str]  # of the members
    places: np.ndarray  # int64 (n, 3): which file, where in it, how many bytes
    labels: np.ndarray | None  # int64 (n,)

    @property
    def count(self) -> int:
        return len(self.names)

    @staticmethod
    def join(parts: list["Index"]) -> "Index":
        """One index of several tars. Raises ValueError where only some have labels."""
        files = [file for part in parts for file in part.files]
        parts = [part for part in parts if part.count]
        without = [part for part in parts if part.labels is None]
        if without and len(without) < len(parts):
            raise ValueError(f"{without[0].files[0]} has no labels (.cls), but others have: give all or none of them")
        if not parts:
            return Index(files, [], np.empty((0, 3), np.int64), None)
        places = [part.places + [files.index(part.files[0]), 0, 0] for part in parts]
        labels = None if without else np.concatenate([part.labels for part in parts])
        return Index(files, [name for part in parts for name in part.names], np.concatenate(places), labels)

    def every(self, step: int) -> "Index":
        """Every `step`-th image, from the first."""
        labels = None if self.labels is None else self.labels[::step]
        return Index(self.files, self.names[::step], self.places[::step], labels)

    def told(self, number: int) -> str:
        """How messages call an image."""
        return f"{self.files[self.places[number, 0]]}: {self.names[number]}"

    def content(self, number: int) -> bytes:
        """The bytes of an image's file. Raises OSError."""
        file, start, size = self.places[number].tolist()
        with open(self.files[file], "rb") as tar:
            tar.seek(start)
            return tar.read(size)


def index_tar(path: Path) -> Index:
    """The images of a tar and, from its .cls members, their labels.

    A sample's members are named <key>.<extension>, the extension from the first dot of the last part on; it has one
    image (png, jpg, jpeg, webp). Raises ValueError, one line, where the tar is torn, forged, or of another kind.
    """
    images: dict[str, tuple[str, int, int]] = {}
    labels: dict[str, int] = {}
    try:
        size = os.path.getsize(path)
        with open(path, "rb") as file:
            for member in whole_members(str(path), file, size):
                folder, _, name = member.name.rpartition("/")
                key, _, extension = name.partition(".")
                key = f"{folder}/{key}"
                if member.isfile() and f".{extension.lower()}" in SUFFIXES:
                    if key in images:
                        raise ValueError(f"{path}: {member.name} is a second image beside {images[key][0]}: keep one")
                    images[key] = (member.name, member.offset_data, member.size)
                elif member.isfile() and extension == "cls":
                    file.seek(member.offset_data)
                    labels[key] = read_label(str(path), member.name, file.read(min(member.size, LABEL_BYTES + 1)))
    except (OSError, EOFError, tarfile.TarError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} is torn, or no uncompressed tar ({reason}): copy or make it again") from None
    bare = [name for key, (name, _, _) in images.items() if key not in labels]
    if bare and len(bare) < len(images):
        raise ValueError(f"{path}: {bare[0]} has no label (.cls), but others have: give all or none of them")
    places = np.array([(0, start, length) for _, start, length in images.values()], np.int64).reshape(-1, 3)
    told = None if bare or not images else np.array([labels[key] for key in images], np.int64)
    return Index([path], [name for name, _, _ in images.values()], places, told)


def whole_members(told: str, file: BinaryIO, size: int) -> Iterator[tarfile.TarInfo]:
    """The members of an uncompressed tar of `size` bytes, one after the other; `told` stands in messages.

    Raises ValueError where one is no plain file or folder, points outside, or where the end is missing, and OSError,
    EOFError or TarError where it is no tar.
    """
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for member in tar:
            require_harmless(told, member.name)
            if not (member.isfile() or member.isdir()) or member.issparse():
                raise ValueError(
                    f"{told}: {member.name!r} is a link, a device or a sparse file: images must be plain files"
                )
            if member.isfile() and member.offset_data + member.size > size:
                raise ValueError(
                    f"{told}: {member.name!r} is torn or forged: it tells of more bytes than the tar holds"
                )
            yield member
            tar.members = []  # tarfile remembers every member it has passed
        file.seek(tar.offset)
        if file.read(512).strip(b"\0") or tar.offset >= size:
            raise ValueError(f"{told} is torn (its end is missing): copy or make it again")


def require_harmless(told: str, name: str) -> None:
    """Raise ValueError where the name of an archive's member could lead out of a folder."""
    if name.startswith(("/", "\\")) or ".." in PurePosixPath(name).parts or "\\" in name or ":" in name[1:2]:
        raise ValueError(f"{told}: {name!r} names a place outside of the archive: make it with plain relative names")


def read_label(told: str, name: str, content: bytes) -> int:
    """The class number that a .cls member holds."""
    try:
        label = int(content.decode("ascii"))
        if 0 <= label < 1 << 62:
            return label
    except ValueError:
        pass
    raise ValueError(f"{told}: {name} must be a whole number from 0 on, got {content[:20]!r}")
