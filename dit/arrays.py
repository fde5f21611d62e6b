"""NumPy's files as anyone may have written them: opened without loading them, and without trusting them.

An .npz is a zip of .npy files; an .npy is a header that tells type and shape, and the numbers. Opening reads headers and
compares what they ask for with what the file holds; rows are read when asked for. Nothing is ever unpickled.
"""

import math
import os
import struct
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import IO, Any

import numpy as np

PIECE_BYTES = 1 << 22
# Deflate can't do better than one bit for 258 bytes: a member that claims more than this holds none of it.
BEST_DEFLATE = 1032


@dataclass(eq=False)
class Member:
    """One array of a file: its header is read, its numbers are not."""

    path: Path
    name: str  # "" in an .npy, which holds one array
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    fortran: bool  # its first index runs fastest
    start: int  # of the numbers: in the file where they lie in it as they are, else in the unpacked member
    packed: zipfile.ZipInfo | None  # where they don't

    def __post_init__(self) -> None:
        self._lock, self._stream = Lock(), None

    @property
    def told(self) -> str:
        """How messages call it."""
        return f"{self.path}: {self.name}" if self.name else str(self.path)

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Rows `start` to `stop` of the first axis, read now. Raises ValueError where the file turns out to be torn.

        A compressed member is unpacked from its beginning up to there: rows in order cost one pass, rows backwards
        begin anew.
        """
        assert 0 <= start <= stop <= self.shape[0] and not self.fortran, (start, stop, self.shape)
        row_bytes = math.prod(self.shape[1:]) * self.dtype.itemsize
        shape = (stop - start, *self.shape[1:])
        return self._numbers(start * row_bytes, shape)

    def load(self) -> np.ndarray:
        """All of it. Raises ValueError where the file turns out to be torn, or holds Python objects."""
        if self.dtype.hasobject:
            raise ValueError(f"{self.told} holds Python objects, which could run any program: save plain numbers")
        whole = self._numbers(0, self.shape[::-1] if self.fortran else self.shape)
        return whole.T if self.fortran else whole

    def pieces(self) -> Iterator[bytes]:
        """The bytes of all numbers, piece by piece, proven by the file's checksum where it has one (an .npz)."""
        left = self.num_bytes
        try:
            with _open_member(self.path, self.name) as stream:
                _read_header(stream)
                while piece := stream.read(PIECE_BYTES):
                    yield piece[:left]
                    left -= len(piece[:left])
        except (OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise _torn(self.told, error) from None
        if left:
            raise _torn(self.told, f"{left} bytes are missing")

    def _numbers(self, offset: int, shape: tuple[int, ...]) -> np.ndarray:
        count = math.prod(shape)
        try:
            if self.packed is None:
                numbers = np.fromfile(self.path, self.dtype, count, offset=self.start + offset)
            else:
                numbers = np.frombuffer(self._unpack(offset, count * self.dtype.itemsize), self.dtype)
        except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
            raise _torn(self.told, error) from None
        if len(numbers) != count:
            raise _torn(self.told, f"{count - len(numbers)} of {count} numbers are missing")
        return numbers.reshape(shape)

    def _unpack(self, offset: int, num_bytes: int) -> bytearray:
        with self._lock:  # the place in the stream is shared
            if self._stream is None:
                self._stream = _open_member(self.path, self.name)
            self._stream.seek(self.start + offset)  # forwards by reading, backwards from the beginning
            unpacked = bytearray()
            while len(unpacked) < num_bytes:
                piece = self._stream.read(min(PIECE_BYTES, num_bytes - len(unpacked)))
                if not piece:
                    break
                unpacked += piece
            return unpacked


def open_npz(path: Path) -> dict[str, Member]:
    """The arrays of an .npz by name. Raises ValueError, one line, where it is torn or claims more than it holds."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = [info.filename for info in archive.infolist() if info.filename.endswith(".npy")]
            return {name.removesuffix(".npy"): _member(path, archive, name) for name in names}
    except (OSError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError, struct.error) as error:
        raise _torn(path, error) from None


def open_npy(path: Path) -> Member:
    """The array of an .npy. Raises ValueError, one line, where it is torn or claims more than it holds."""
    try:
        with open(path, "rb") as file:
            dtype, shape, fortran = _read_header(file)
            member = Member(path, "", dtype, shape, fortran, file.tell(), None)
        return _require_held(member, os.path.getsize(path) - member.start)
    except OSError as error:
        raise _torn(path, error) from None


def _member(path: Path, archive: zipfile.ZipFile, filename: str) -> Member:
    info, name = archive.getinfo(filename), filename.removesuffix(".npy")
    told = f"{path}: {name}"
    if info.flag_bits & 1:
        raise ValueError(f"{told} is encrypted: save it without a password")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{told} is compressed in a way that NumPy does not write: save it with numpy.savez")
    with archive.open(info) as stream:
        dtype, shape, fortran = _read_header(stream, told)
        header_bytes = stream.tell()
    stored = info.compress_type == zipfile.ZIP_STORED
    within = info.compress_size if stored else min(info.file_size, info.compress_size * BEST_DEFLATE)
    start = _start(path, info) + header_bytes if stored else header_bytes
    member = Member(path, name, dtype, shape, fortran, start, None if stored else info)
    if stored:
        within = min(within, os.path.getsize(path) - (start - header_bytes))
    return _require_held(member, within - header_bytes)


def _require_held(member: Member, held: int) -> Member:
    """The member, if `held` bytes are enough for what its header asks for."""
    if member.num_bytes > held and not member.dtype.hasobject:
        raise ValueError(
            f"{member.told} is torn or forged: its header tells of {member.num_bytes} bytes, {held} are there: "
            "copy or make it again"
        )
    return member


def _start(path: Path, info: zipfile.ZipInfo) -> int:
    """Where a stored member's bytes begin: behind its own header, whose length the archive's directory doesn't know."""
    with open(path, "rb") as file:
        file.seek(info.header_offset)
        header = file.read(30)
    name_bytes, extra_bytes = struct.unpack("<HH", header[26:30])
    return info.header_offset + 30 + name_bytes + extra_bytes


def _open_member(path: Path, name: str) -> IO[bytes]:
    if not name:
        return open(path, "rb")
    return zipfile.ZipFile(path).open(f"{name}.npy")  # the archive's file lives as long as the member is open


def _read_header(stream: IO[bytes], told: object = "") -> tuple[np.dtype[Any], tuple[int, ...], bool]:
    """Type, shape and order that an .npy's header tells; the stream then stands at the numbers."""
    told = told or getattr(stream, "name", "the array")
    try:
        version = np.lib.format.read_magic(stream)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
        shape, fortran, dtype = read(stream)
    except (OSError, EOFError, zipfile.BadZipFile, zlib.error):
        raise
    except Exception as error:  # a forged header can make NumPy's parser raise nearly anything
        raise _torn(told, error) from None
    if any(length < 0 for length in shape):
        raise _torn(told, f"a shape of {shape}")
    return dtype, shape, fortran and len(shape) > 1


def _torn(told: object, error: object) -> ValueError:
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return ValueError(f"{told} is torn, or no file of NumPy's ({reason}): copy or make it again")
