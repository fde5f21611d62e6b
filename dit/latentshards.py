"""Where the latents of training lie: in memory, in files that are mapped into it, or streamed from elsewhere.

Each of the three gathers images by their indices, which count through all shards. A shard is a safetensors file.
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from dit.places import Place
from dit.runtime import main_memory

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
MOST_OPEN = 16_384  # mapped files; Linux lets a process have 65,530 mappings
MEMORY_SHARE = 0.4  # of the machine's, that latents may take: copies, weights and states need theirs
HEADER_BYTES = 64 << 20  # a longer one is none


class Piece(NamedTuple):
    """Where a tensor lies in a safetensors file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int  # bytes, in the file
    stop: int


def layout(read: Callable[[int, int], bytes], told: str) -> dict[str, Piece]:
    """The tensors of a safetensors file; `read(start, size)` gives its bytes. Raises ValueError where it is torn."""
    try:
        size = int.from_bytes(read(0, 8), "little")
        if not 0 < size < HEADER_BYTES:
            raise ValueError("no header")
        header = json.loads(read(8, size))
        header.pop("__metadata__", None)
        return {
            key: Piece(
                DTYPES[piece["dtype"]], tuple(piece["shape"]), *(8 + size + end for end in piece["data_offsets"])
            )
            for key, piece in header.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{told} is missing or torn ({error})") from None


def file_layout(path: Path) -> dict[str, Piece]:
    """The tensors of a file of this machine, whose length is checked. Raises ValueError where it is missing or torn."""
    try:
        with open(path, "rb") as file:
            pieces = layout(lambda start, size: os.pread(file.fileno(), size, start), str(path))
            length = os.fstat(file.fileno()).st_size
    except FileNotFoundError:
        raise ValueError(f"{path} is missing or torn (no such file)") from None
    end = max((piece.stop for piece in pieces.values()), default=0)
    if length != end:
        raise ValueError(f"{path} is missing or torn ({length:,} bytes, not {end:,})")
    return pieces


def map_file(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, read from the disk where they are looked at. It stays as it is, whatever is
    written into them. Raises ValueError where it is missing or torn."""
    pieces = file_layout(path)
    content = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)
    return {key: content[piece.start : piece.stop].view(piece.dtype).view(piece.shape) for key, piece in pieces.items()}


def images_in(path: Path) -> int:
    """The number of images in a shard. Raises ValueError where it is missing or torn."""
    return file_layout(path)["label"].shape[0]


def lying(
    files: Sequence[Path], wanted: Sequence[int], source: Place | None
) -> Literal["memory", "mapped", "streamed"]:
    """Where these shards had best lie: streamed if not all are here, in memory if this process's share of it allows."""
    try:
        size = sum(files[number].stat().st_size for number in wanted)
    except FileNotFoundError as error:
        if source is not None:
            return "streamed"
        raise ValueError(f"{error.filename} is missing: run `dvc pull`, or set run.latents_from") from None
    return "memory" if size <= MEMORY_SHARE * main_memory() / int(os.environ.get("LOCAL_WORLD_SIZE", 1)) else "mapped"


def open_shard(path: Path, like: Mapping[str, Piece], size: int) -> dict[str, Tensor]:
    """A shard's tensors, mapped. Raises ValueError unless it is whole, holds `size` images and looks like the others."""
    shard = map_file(path)
    seen = {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in shard.items()}
    if seen != {key: (piece.dtype, (size, *piece.shape[1:])) for key, piece in like.items()}:
        raise ValueError(f"{path} and the latents beside it do not fit together: run `encode` again")
    return shard


class Shards(Protocol):
    """What holds latents."""

    pieces: dict[str, Piece]  # what each tensor is like, by one of the shards

    def gather(self, indices: Tensor, keys: Sequence[str], pin: bool) -> dict[str, Tensor]:
        """These images' rows of the named tensors, in this order; in pinned memory if asked."""

    def labels(self, shard: int) -> Tensor:
        """A shard's labels (n,)."""

    def ahead(self, find: Callable[[], tuple[set[int], set[int]]]) -> None:
        """Prepare for the shards that are read now, and those that will be soon: `find` tells both."""

    def close(self) -> None:
        """Let go of what is under way; what is asked for next begins it anew."""


class Memory:
    """Shards in memory, each tensor of all of them in one piece."""

    def __init__(self, tensors: dict[str, Tensor], sizes: Tensor):
        """Of shards with so many images each, one after the other."""
        self.tensors, self.sizes = tensors, sizes
        self.firsts = sizes.cumsum(0) - sizes
        self.ends, self.moved = sizes.cumsum(0), None  # (S,), from an index to a row, where not all shards are here

    @property
    def pieces(self) -> dict[str, Piece]:
        return {key: Piece(tensor.dtype, tuple(tensor.shape), 0, 0) for key, tensor in self.tensors.items()}

    @classmethod
    def read(cls, files: Sequence[Path], sizes: Tensor, wanted: Sequence[int]) -> "Memory":
        """The shards with the numbers `wanted`. Raises ValueError where one is missing, torn or of other latents."""
        pieces = file_layout(files[wanted[0]])
        held = torch.zeros_like(sizes)
        held[wanted] = sizes[wanted]
        memory = cls(_empty(pieces, int(held.sum()), list(pieces), False), held)
        for number in wanted:  # one after the other: all at once would be twice the memory
            for key, tensor in open_shard(files[number], pieces, int(sizes[number])).items():
                memory.tensors[key][memory.firsts[number] :][: len(tensor)] = tensor
        if len(wanted) < len(sizes):
            memory.ends, memory.moved = sizes.cumsum(0), memory.firsts - (sizes.cumsum(0) - sizes)
        return memory

    def gather(self, indices: Tensor, keys: Sequence[str], pin: bool) -> dict[str, Tensor]:
        if self.moved is not None:
            numbers = torch.searchsorted(self.ends, indices, right=True)
            assert self.sizes[numbers].all(), "these rows of the global batch were not asked for"
            indices = indices + self.moved[numbers]
        batch = _empty(self.tensors, len(indices), keys, pin)
        for key, rows in batch.items():
            torch.index_select(self.tensors[key], 0, indices, out=rows)
        return batch

    def labels(self, shard: int) -> Tensor:
        return self.tensors["label"][self.firsts[shard] : self.firsts[shard] + self.sizes[shard]]

    def ahead(self, find: Callable[[], tuple[set[int], set[int]]]) -> None:
        pass

    def close(self) -> None:
        pass


class Mapped:
    """Shards in files of this machine, each opened when it is first needed."""

    def __init__(self, files: Sequence[Path], sizes: Tensor, wanted: Sequence[int]):
        self.files, self.ends, self.sizes = files, sizes.cumsum(0), sizes
        self.pieces = file_layout(files[wanted[0]])
        self._open: dict[int, dict[str, Tensor]] = {}

    def shard(self, number: int) -> dict[str, Tensor]:
        """A shard's tensors. Raises ValueError where it is missing, torn or of other latents."""
        if number not in self._open:
            while len(self._open) >= MOST_OPEN:
                del self._open[next(iter(self._open))]
            self._open[number] = open_shard(self.files[number], self.pieces, int(self.sizes[number]))
        return self._open[number]

    def gather(self, indices: Tensor, keys: Sequence[str], pin: bool) -> dict[str, Tensor]:
        numbers = torch.searchsorted(self.ends, indices, right=True)
        rows = (indices - (self.ends - self.sizes)[numbers]).tolist()
        shards = {number: self.shard(number) for number in numbers.unique().tolist()}
        places = list(zip(numbers.tolist(), rows, strict=True))
        batch = _empty(self.pieces, len(rows), keys, pin)
        for key, taken in batch.items():
            views = [shards[number][key][row] for number, row in places]  # nothing is read until they are copied
            if views:
                torch.stack(views, out=taken)
        return batch

    def labels(self, shard: int) -> Tensor:
        return self.shard(shard)["label"]

    def ahead(self, find: Callable[[], tuple[set[int], set[int]]]) -> None:
        pass

    def close(self) -> None:
        pass


def _empty(like: Mapping[str, Any], rows: int, keys: Sequence[str], pin: bool) -> dict[str, Tensor]:
    return {key: torch.empty(rows, *like[key].shape[1:], dtype=like[key].dtype, pin_memory=pin) for key in keys}
