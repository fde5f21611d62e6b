"""Latents streamed from elsewhere: shards come from a place while others are read, and stay as far as a disk allows.

The folder holds each shard under the sha256 of its content: several trainings share it, and what is there is whole.
"""

import hashlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from queue import PriorityQueue
from threading import Event, Lock, Thread
from typing import Any

import torch
from torch import Tensor

from dit.latentshards import Mapped, layout, open_shard
from dit.locks import held
from dit.paths import replacing
from dit.places import PIECE_BYTES, OutOfReach, Place, opened

READERS = 4  # shards that are fetched at a time
ABANDONED_SECONDS = 3600.0  # a file that nobody has written to for so long is of a process that was killed
AT_ONCE, NOW, SOON = 0, 1, 2  # somebody waits for it; this window's; the next one's


class Streamed(Mapped):
    """Shards of a place. Those that are needed soon are fetched ahead, by threads.

    Args:
        entries: of index.json, each with file, samples and sha256.
        wanted: the numbers of those that are ever needed.
        source: where all of them lie, under their names.
        cache: the folder where some stay, `cache_gb` (10^9 bytes) at most.
        images: how many are needed at a time.

    Raises ValueError, one line; OutOfReach where the place does not answer.
    """

    def __init__(
        self,
        entries: Sequence[dict[str, Any]],
        wanted: Sequence[int],
        source: Place | None,
        cache: Path | None,
        cache_gb: float,
        images: int,
    ):
        if source is None or cache is None:
            raise ValueError("run.latents_from: set it to where the latents are streamed from, s3://bucket/prefix")
        if any("samples" not in entry for entry in entries):
            raise ValueError("index.json does not tell the shards' sizes: run `encode` again")
        self.entries, self.source, self.cache, self.cache_bytes = entries, source, cache, int(cache_gb * 1e9)
        self.sizes = torch.tensor([entry["samples"] for entry in entries])
        self.ends = self.sizes.cumsum(0)
        first = entries[wanted[0]]["file"]
        with told_as_ours():
            self.pieces = layout(lambda start, size: source.read(first, start, size), f"{source.name}/{first}")
        self.image_bytes = sum((p.stop - p.start) for p in self.pieces.values()) / int(self.sizes[wanted[0]])
        needed = images * self.image_bytes
        if needed > self.cache_bytes:
            raise ValueError(
                f"run.cache_gb: the latents that are read at a time take {needed / 1e9:.3g} GB, this allows "
                f"{cache_gb:g}: raise it, or set train.shuffle_window to fewer images"
            )
        self._lock = Lock()
        self._shards: dict[int, Future[dict[str, Tensor]]] = {}
        self._readers: Readers | None = None

    def shard(self, number: int) -> dict[str, Tensor]:
        """A shard's tensors, waited for. Raises what fetching it raised; asked again, it tries again."""
        return self._ask(number, AT_ONCE).result()

    def ahead(self, find: Callable[[], tuple[set[int], set[int]]]) -> None:
        now, following = find()
        with self._lock:
            for number in self._shards.keys() - now - following:
                self._shards.pop(number).cancel()
            missing = [(NOW, now - self._shards.keys()), (SOON, following - self._shards.keys())]
        for rank, numbers in missing:
            for number in sorted(numbers):
                self._ask(number, rank)

    def close(self) -> None:
        with self._lock:
            readers, self._readers = self._readers, None
            for number in [number for number, future in self._shards.items() if not future.done()]:
                self._shards.pop(number).set_exception(InterruptedError("the latents were closed"))
        if readers:
            readers.end()

    def _ask(self, number: int, rank: int) -> "Future[dict[str, Tensor]]":
        with self._lock:
            future = self._shards.get(number)
            if future is None or (future.done() and future.exception()):
                future = self._shards[number] = Future()
            elif rank != AT_ONCE or future.done() or future.running():
                return future
            self._readers = self._readers or Readers(self._fetched, self._lock)
            self._readers.ask(rank, number, future)  # a second time, where somebody waits now
        return future

    def _fetched(self, number: int, ending: Event) -> dict[str, Tensor]:
        entry = self.entries[number]
        path = self.cache / f"{entry['sha256']}.safetensors"
        with held(self.cache / f"{entry['sha256'][:2]}.lock"):  # another process may be fetching it
            try:
                os.utime(path)  # its last use
                return open_shard(path, self.pieces, entry["samples"])
            except (FileNotFoundError, ValueError):  # not here, let go of at this moment, or torn
                self._fetch(entry["file"], entry["sha256"], path, ending)
            return open_shard(path, self.pieces, entry["samples"])

    def _fetch(self, name: str, sha256: str, path: Path, ending: Event) -> None:
        for _ in range(2):  # what came over a wire may have been damaged on the way
            try:
                with told_as_ours(), replacing(path) as unfinished:
                    if self._copy(name, unfinished, ending) != sha256:
                        raise _Damaged
                return
            except _Damaged:
                pass
        raise ValueError(
            f"run.latents_from: {self.source.name}/{name} is not what index.json tells of (its sha256 is another): "
            "copy artifacts/encode there again"
        )

    def _copy(self, name: str, path: Path, ending: Event) -> str:
        """Bring a file; the sha256 of what came."""
        found = self.source.find(name)
        if found is None:
            raise FileNotFoundError(2, "No such file", f"{self.source.name}/{name}")
        self._make_room(path, found.bytes)
        digest = hashlib.sha256()
        with opened(self.source, found) as reader, open(path, "r+b") as file:
            while piece := reader.read(PIECE_BYTES):
                if ending.is_set():
                    raise InterruptedError("the latents were closed")
                digest.update(piece)
                file.write(piece)
        return digest.hexdigest()

    def _make_room(self, path: Path, size: int) -> None:
        """Give a new file its size, and let go of those that were not used for the longest time."""
        with self._lock:
            kept = {self.entries[number]["sha256"] for number in self._shards}
        with held(self.cache / "room.lock"):
            os.truncate(path, size)  # so that others see what it is going to be
            found = sorted(filter(None, map(_used, self.cache.glob("*.safetensors*"))))
            total = sum(length for _, length, _ in found)
            for used_seconds, length, file in found:
                unfinished = file.suffix != ".safetensors"
                abandoned = unfinished and time.time() - used_seconds > ABANDONED_SECONDS
                if abandoned or (total > self.cache_bytes and not unfinished and file.stem not in kept):
                    total -= length
                    file.unlink()  # whoever has it mapped keeps it


def _used(file: Path) -> tuple[float, int, Path] | None:
    """When a file was used last, and its bytes; None where it has just got its final name."""
    try:
        status = file.stat()
    except FileNotFoundError:
        return None
    return status.st_mtime, status.st_size, file


class Readers:
    """Threads that fetch shards, the most urgent first, until they are told to end.

    Not a pool's: the interpreter would wait for those until all that was ever asked for is here.
    """

    def __init__(self, fetch: Callable[[int, Event], dict[str, Tensor]], lock: Lock):
        """`lock` is held by whoever changes what a future is: running, or ended from outside."""
        self.fetch, self.lock, self.ending, self.turn = fetch, lock, Event(), count()
        self.queue: PriorityQueue[tuple[int, int, int, Future[dict[str, Tensor]] | None]] = PriorityQueue()
        self.threads = [Thread(target=self._work, name="latents", daemon=True) for _ in range(READERS)]
        for thread in self.threads:
            thread.start()

    def ask(self, rank: int, number: int, future: "Future[dict[str, Tensor]]") -> None:
        self.queue.put((rank, next(self.turn), number, future))

    def end(self) -> None:
        """Have them end, once what they wait for has come: nobody waits for them."""
        self.ending.set()
        for _ in self.threads:
            self.queue.put((-1, next(self.turn), -1, None))

    def _work(self) -> None:
        while True:
            _, _, number, future = self.queue.get()
            if future is None:
                return
            with self.lock:
                if future.done() or future.running() or not future.set_running_or_notify_cancel():
                    continue  # no longer needed, or asked for twice
            try:
                shard, failed = self.fetch(number, self.ending), None
            except BaseException as error:
                shard, failed = None, error
            with suppress(InvalidStateError):  # closed meanwhile
                future.set_result(shard) if failed is None else future.set_exception(failed)


class _Damaged(Exception):
    """Other bytes came than were expected."""


@contextmanager
def told_as_ours() -> Iterator[None]:
    """Errors of a place, which speaks of data.source, with the setting's name that is meant."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError) as error:
        raise ValueError(
            f"run.latents_from: {error.filename} is not there, or not as it was: copy artifacts/encode there"
        ) from None
    except OutOfReach as error:
        raise OutOfReach(str(error).replace("data.source", "run.latents_from")) from None
    except ValueError as error:
        raise ValueError(str(error).replace("data.source", "run.latents_from")) from None
