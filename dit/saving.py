"""States saved beside the loop: it goes on as soon as they are copied, and a thread writes them, whole or not at all."""

import json
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from dit import parts
from dit.parallel import PATIENCE, World
from dit.paths import file_sha256
from dit.states import BESIDE, SavedState, TrainingState, count, forget, stem, steps

ALONE = World(0, 1)


class Copies(Protocol):
    """Where copies of states go (mirror.py)."""

    sending: int | None  # the step of the state that is read just now

    def offer(self, saved: SavedState) -> None:
        """Copy a state, after the one that is being copied."""

    def close(self, patience_seconds: float | None = None) -> None:
        """Wait until nothing is left to copy."""


class Saver:
    """Writes states into a folder while the loop goes on, one at a time.

    Every process of `world` makes one and calls the same of it. One that has nothing to write (the tensors are plain,
    and it is not the main process) returns from all of it at once.
    """

    def __init__(
        self,
        folder: Path,
        keep: int,
        *,
        world: World = ALONE,
        mirror: Copies | None = None,
        before: Callable[[SavedState], None] | None = None,
    ):
        """`before(saved)` is called in the main process's thread when all is written, and before the state counts."""
        self.folder, self.keep, self.world, self.mirror, self.before = folder, keep, world, mirror, before
        self.seconds = (
            0.0  # that the last save took, until it counted; before the first, what it may take; known to who writes
        )
        self.last: SavedState | None = None  # the last that counted; known to who wrote
        self._staging = parts.Staging()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._group: Any = None
        if world.main:
            folder.mkdir(parents=True, exist_ok=True)
            _clear_unfinished(folder)

    def save(self, state: TrainingState) -> None:
        """Copy the state and return: from here on the loop may change its tensors. Waits for the save before this one.

        Raises what that one failed with (a full disk: OSError); the states before it are as they were.
        """
        self.wait()
        sharded = any(parts.sharded(tensor) for tensor in state.tensors.values())
        if not (sharded or self.world.main):
            return
        began, values = time.monotonic(), json.loads(json.dumps(state.values))
        copies, filled = self._staging.copied(state.tensors)
        if sharded and self._group is None:
            # The threads' own: what they exchange must not get between what the loops do.
            self._group = torch.distributed.new_group(backend="gloo", timeout=PATIENCE)

        def work() -> None:
            try:
                filled()
                self.last = (self._write_parts if sharded else self._write_whole)(state.step, values, copies)
                self.seconds = time.monotonic() - began
            except BaseException as error:  # whatever it is, the loop has to hear of it
                self._error = error

        self._thread = threading.Thread(target=work, name="saver", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Until the last save counts. Raises what it failed with."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def close(self, patience_seconds: float | None = None) -> None:
        """wait(), and then until the mirror has the last state, for so long at most. Its failures are only said."""
        self.wait()
        if self.mirror is not None:
            self.mirror.close(patience_seconds)

    def _write_whole(self, step: int, values: dict[str, Any], copies: dict[str, Tensor]) -> SavedState:
        from safetensors.torch import save_file

        unfinished = self._unfinished(step)  # a folder: safetensors makes files of its own names beside what it writes
        file, path = unfinished / "state", self.folder / f"{stem(step)}.safetensors"
        try:
            unfinished.mkdir(exist_ok=True)
            with _as_os_error():
                save_file(copies, file)
            with open(file, "rb") as written:
                os.fsync(written.fileno())
            digest = file_sha256(file)
            forget(self.folder, step)  # one that was torn
            file.rename(path)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
        return self._count(SavedState(step, values, path, {path.name: digest}))

    def _write_parts(self, step: int, values: dict[str, Any], copies: dict[str, Tensor]) -> SavedState:
        """In all processes' threads at once: what fails at one of them fails at all."""
        unfinished = self._unfinished(step)
        part: Any
        try:
            part = parts.write(unfinished, copies, self.world.rank, self._group)
        except Exception as error:
            part = error
        written = [None] * self.world.size if self.world.main else None
        torch.distributed.gather_object(part, written, group=self._group)
        outcome: Any = None
        if self.world.main:
            try:
                outcome = self._join(step, values, unfinished, written)
            except Exception as error:
                shutil.rmtree(unfinished, ignore_errors=True)
                outcome = error
        outcome = self._share(outcome)
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    def _join(self, step: int, values: dict[str, Any], unfinished: Path, written: list[Any]) -> SavedState:
        files: dict[str, str] = {}
        for part in written:
            if isinstance(part, BaseException):
                raise part
            files |= part
        if any(not (unfinished / name).is_file() for name in files):
            raise OSError(f"{self.folder} is not the same folder for all processes: put it where all hosts see it")
        forget(self.folder, step)
        path = unfinished.rename(self.folder / stem(step))
        return self._count(SavedState(step, values, path, {f"{path.name}/{name}": files[name] for name in files}))

    def _count(self, saved: SavedState) -> SavedState:
        """Let a state count whose files are there, hand it on, and let go of older ones."""
        try:
            if self.before:
                self.before(saved)
            count(saved)
        except BaseException:
            forget(self.folder, saved.step)
            raise
        if self.mirror is not None:
            self.mirror.offer(saved)
        sending = self.mirror.sending if self.mirror is not None else None
        for step in [step for step in steps(self.folder) if step <= saved.step][: -self.keep]:
            if step != sending:
                forget(self.folder, step)
        return saved

    def _unfinished(self, step: int) -> Path:
        return self.folder / f".{stem(step)}.unfinished"

    def _share(self, told: Any) -> Any:
        box = [told]
        torch.distributed.broadcast_object_list(box, group=self._group)
        return box[0]


def _clear_unfinished(folder: Path) -> None:
    """Remove what a process left that was killed in a save."""
    counted = {stem(step) for step in steps(folder)}
    for left in [*folder.glob(".*"), *folder.glob("step-*"), *(folder / BESIDE).glob(".*")]:
        if left.name.partition(".")[0] not in counted:
            shutil.rmtree(left) if left.is_dir() else left.unlink()


@contextmanager
def _as_os_error() -> Iterator[None]:
    """What safetensors says of a full disk, as the OSError that it was."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        raise OSError(int(number[1]), os.strerror(int(number[1]))) if number else error from None
