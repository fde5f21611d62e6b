"""Where files lie: a folder here, a bucket elsewhere (storage.py). Whoever reads files from a place asks for no more.

A place lists its files, each with a stamp that changes when the file does, and gives any piece of any of them.
"""

import io
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

UNSETTLED_NS = 2_000_000_000  # a file younger than this may be written again within the same time stamp
READERS = 8  # files are read in parallel for the sake of slow disks; a local one gains nothing by more
PIECE_BYTES = 8 << 20  # what is fetched at once of a file that is read through


class OutOfReach(RuntimeError):
    """A place did not answer, whatever was tried. Nothing is wrong with the settings: the same command goes on."""


class Changed(FileNotFoundError):
    """There is a file of that name, but it is no longer the one that was listed."""


class File(NamedTuple):
    """One file of a place, its content not yet looked at."""

    name: str  # relative, with slashes
    bytes: int
    mtime_ns: int
    identity: int | str  # inode or ETag: with bytes and time the stamp; all equal means unchanged

    @property
    def stamp(self) -> tuple[int, int, int | str]:
        return self[1:]


class Place(Protocol):
    """What holds files."""

    name: str  # for messages, and to keep what is remembered of one place from another's
    unsettled_ns: int  # the stamp of a file younger than this is not to be trusted
    readers: int  # how many threads shall read at a time

    def files(self) -> Iterator[File]:
        """All files that are not hidden, in any order. Raises ValueError, one line, or OutOfReach."""

    def find(self, name: str) -> File | None:
        """One file, or None where there is none."""

    def read(self, file: str, start: int = 0, size: int | None = None, *, version: str = "") -> bytes:
        """The bytes from `start`, at most `size` of them; with `version` (an ETag) that version's, or Changed.

        Raises OSError where there are none to be had, ValueError where a person must act, OutOfReach.
        """


def hidden(name: str) -> bool:
    """Whether a part of a path begins with a dot."""
    return name.startswith(".") or "/." in name


class Folder:
    """A folder of this machine, or one file of it: then that is all it holds."""

    unsettled_ns = UNSETTLED_NS
    readers = READERS

    def __init__(self, path: str, root: Path | None = None):
        """`path` as a person wrote it; `root` is where that lies, by default as seen from here."""
        self.told = path
        self.root = Path(path).expanduser() if root is None else root
        self.name = str(self.root.resolve())

    def files(self) -> Iterator[File]:
        if not self.root.exists():
            raise ValueError(
                f"data.source: the folder {self.told!r} is not there (looked at {self.root.absolute()}): correct the path"
            )
        if not self.root.is_dir():
            raise ValueError(f"data.source: {self.told!r} is not a folder: give the folder that holds the images")
        try:
            for name, status in _walk(self.root):
                yield File(name, status.st_size, status.st_mtime_ns, status.st_ino)
        except PermissionError as error:
            raise ValueError(
                f"data.source: no permission to list {error.filename!r}: grant it, or move it away"
            ) from None

    def find(self, name: str) -> File | None:
        try:
            status = (self.root / name).stat()
        except OSError:
            return None
        return File(name, status.st_size, status.st_mtime_ns, status.st_ino) if stat.S_ISREG(status.st_mode) else None

    def read(self, file: str, start: int = 0, size: int | None = None, *, version: str = "") -> bytes:
        if start == 0 and size is None:
            return (self.root / file).read_bytes()
        with open(self.root / file, "rb") as opened:
            opened.seek(start)
            return opened.read(-1 if size is None else size)


class Alone:
    """A place of which one file alone counts."""

    def __init__(self, place: Place, file: str):
        self.place, self.file = place, file
        self.name, self.unsettled_ns, self.readers = f"{place.name}/{file}", place.unsettled_ns, place.readers

    def files(self) -> Iterator[File]:
        found = self.place.find(self.file)
        if found is None:
            raise ValueError(f"data.source: the file {self.name!r} is not there: correct the path")
        yield found

    def find(self, name: str) -> File | None:
        return self.place.find(name) if name == self.file else None

    def read(self, file: str, start: int = 0, size: int | None = None, *, version: str = "") -> bytes:
        return self.place.read(file, start, size, version=version)


class Opened(io.RawIOBase):
    """A file of a place as Python's own file objects are; wrap it in io.BufferedReader."""

    def __init__(self, place: Place, file: File):
        self.place, self.file, self.position = place, file, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.file.bytes}[whence]
        if self.position < 0:
            raise OSError(f"a position before the beginning of {self.file.name}")
        return self.position

    def readinto(self, buffer) -> int:
        size = min(len(buffer), max(self.file.bytes - self.position, 0))
        if not size:
            return 0
        version = self.file.identity if isinstance(self.file.identity, str) else ""
        content = self.place.read(self.file.name, self.position, size, version=version)
        buffer[: len(content)] = content
        self.position += len(content)
        return len(content)


def opened(place: Place, file: File) -> io.BufferedReader:
    """A file of a place to be read and sought in; PIECE_BYTES are fetched at a time."""
    return io.BufferedReader(Opened(place, file), max(1, min(PIECE_BYTES, file.bytes)))


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
