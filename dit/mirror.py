"""States copied to another place while training goes on, a bucket or a folder, for another machine to go on from.

The place holds what a training's folder does: step-00000400.safetensors (or the folder of parts), snapshots/, the
sidecar after them, then work.json. A state counts there as it does here, once its sidecar is there; one that was
killed in a copy leaves what does not count, and the next copy clears it away.
"""

import json
import os
import re
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from dit.paths import file_sha256
from dit.places import Folder, OutOfReach, Place
from dit.states import BESIDE, SavedState, count, forget, parsed, stem

NOTES = "work.json"
PIECE_BYTES, READERS = 64 * 2**20, 4


class Shelf(Place, Protocol):
    """A place that files can be put into."""

    def put(self, name: str, file: Path) -> None:
        """Add or replace a file: until all of it is there, there is what was there before."""

    def delete(self, name: str) -> None:
        """Delete a file, if it is there."""

    def forget_unfinished(self) -> None:
        """Let go of what a writer left that was killed."""


class FolderShelf(Folder):
    """A folder as such a place, on another disk as a rule. Raises ValueError where it can't be made."""

    def __init__(self, told: str, root: Path):
        super().__init__(told, root)
        try:
            root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"run.mirror: {told!r} can't be written to ({error.strerror}): correct the path") from None

    @property
    def _unfinished(self) -> Path:
        return self.root / ".unfinished"

    def put(self, name: str, file: Path) -> None:
        with open(file, "rb") as source, open(self._unfinished, "wb") as target:
            shutil.copyfileobj(source, target, 2**20)
            target.flush()
            os.fsync(target.fileno())
        (self.root / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(self._unfinished, self.root / name)

    def delete(self, name: str) -> None:
        file = self.root / name
        file.unlink(missing_ok=True)
        if file.parent != self.root and file.parent.is_dir() and not any(file.parent.iterdir()):
            file.parent.rmdir()

    def forget_unfinished(self) -> None:
        self._unfinished.unlink(missing_ok=True)


class Mirror:
    """One training's states at such a place: `folder` is where they are here, `keep` how many are left there.

    Copies are made by a thread, one after the other; one that waits is replaced by a newer one. A copy that fails is
    said, and training goes on: the next state is another try.
    """

    def __init__(self, shelf: Shelf, folder: Path, keep: int, *, say: Callable[[str], None] = print):
        self.shelf, self.folder, self.keep, self.say = shelf, folder, keep, say
        self.sending: int | None = None  # the step of the state that is read just now
        self.instead = False  # whether what is there already, of higher steps too, is of a training that is made again
        self._waiting: SavedState | None = None
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._began, self._beside = time.time(), set[str]()  # what of BESIDE is there for certain

    def steps(self) -> list[int]:
        """The steps of the states that are there, in order. Raises as Place.files does."""
        return _steps(self._names())

    def notes(self) -> dict[str, Any]:
        """work.json of the place; empty where there is none, or a torn one."""
        try:
            told = json.loads(self.shelf.read(NOTES))
        except (FileNotFoundError, ValueError):
            return {}
        return told if isinstance(told, dict) else {}

    def fetch(self, above: int, up_to: int) -> SavedState | None:
        """The newest whole state of these steps, brought here with all that belongs to it; None where there is none.

        Torn and foreign ones are named and passed over. Raises as Place.read does, and OSError (a full disk).
        """
        names = self._names()
        for step in reversed([step for step in _steps(names) if above < step <= up_to]):
            try:
                content = self.shelf.read(f"{stem(step)}.json")
                try:
                    saved = parsed(content, self.folder, step)
                except ValueError as error:
                    raise _Torn(str(error)) from None
                self._bring(saved, names)
                return saved
            except (_Torn, FileNotFoundError) as error:
                self.say(f"run.mirror: {self.shelf.name}: {error}: passed over for the state before it")
        return None

    def offer(self, saved: SavedState) -> None:
        """Copy a state, after the one that is being copied, and in place of one that waits."""
        with self._changed:
            self._waiting = saved
            self._changed.notify_all()
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="mirror", daemon=True)
                self._thread.start()

    def close(self, patience_seconds: float | None = None) -> None:
        """Wait until nothing is left to copy, for so long at most; what is not there then is said."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._waiting is None and self.sending is None, patience_seconds):
                step = self._waiting.step if self._waiting else self.sending
                self.say(f"run.mirror: {self.shelf.name}: there was no time left to copy the state of step {step}")

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting is not None)
                saved, self._waiting = self._waiting, None
                self.sending = saved.step
            try:
                self._send(saved)
            except Exception as error:
                self.say(f"run.mirror: the state of step {saved.step} was not copied, the next one will be: {error}")
            finally:
                with self._changed:
                    self.sending = None
                    self._changed.notify_all()

    def _send(self, saved: SavedState) -> None:
        names = self._names()
        with suppress(ValueError, OutOfReach):  # what an earlier upload left costs money and harms nothing
            self.shelf.forget_unfinished()
        for file in sorted((self.folder / BESIDE).glob("*.safetensors")):
            name, told = f"{BESIDE}/{file.name}", file.stat()
            before = names.get(name) == told.st_size and told.st_mtime < self._began - 1  # (clocks of disks are coarse)
            if name not in self._beside and not before:
                self.shelf.put(name, file)
            self._beside.add(name)
        for name in saved.files:
            self.shelf.put(name, saved.path.parent / name)
        self.shelf.put(saved.sidecar.name, saved.sidecar)
        if (self.folder / NOTES).is_file():
            self.shelf.put(NOTES, self.folder / NOTES)
        self._prune(saved, names)

    def _prune(self, saved: SavedState, names: dict[str, int]) -> None:
        """Let go of older states, and of what was left of copies that did not end."""
        steps = {name: int(found[1]) for name in names if (found := re.match(r"step-(\d{8,})[./]", name))}
        counted = [step for step in _steps(names) if step < saved.step]
        kept = {saved.step, *counted[max(0, len(counted) - (self.keep - 1)) :]}
        gone = {name for name, step in steps.items() if step not in kept and (step < saved.step or self.instead)}
        for name in sorted(gone, key=lambda name: not name.endswith(".json")):  # first what makes them count
            self.shelf.delete(name)

    def _bring(self, saved: SavedState, names: dict[str, int]) -> None:
        unfinished = self.folder / f".{stem(saved.step)}.unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        try:
            for name, digest in saved.files.items():
                file = unfinished / Path(name).name
                self._download(name, names, file)
                if file_sha256(file) != digest:
                    raise _Torn(f"{name} is torn (its content is not what was written)")
            for name in names:
                found = re.fullmatch(rf"{BESIDE}/[\w.-]*?(\d{{8,}})\.safetensors", name)
                here = self.folder / name
                if (
                    found
                    and int(found[1]) <= saved.step
                    and not (here.is_file() and here.stat().st_size == names[name])
                ):
                    self._download(name, names, unfinished / "beside")
                    here.parent.mkdir(exist_ok=True)
                    os.replace(unfinished / "beside", here)
                    self._beside.add(name)
            forget(self.folder, saved.step)
            if saved.path.suffix:
                os.replace(unfinished / saved.path.name, saved.path)
            else:
                os.replace(unfinished, saved.path)
            count(saved)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)

    def _download(self, name: str, names: dict[str, int], target: Path) -> None:
        if name not in names:
            raise _Torn(f"{name} is not there")
        size = names[name]
        with open(target, "wb") as file, ThreadPoolExecutor(READERS) as pool:

            def piece(start: int) -> None:
                os.pwrite(file.fileno(), self.shelf.read(name, start, min(PIECE_BYTES, size - start)), start)

            list(pool.map(piece, range(0, size, PIECE_BYTES)))
            os.fsync(file.fileno())

    def _names(self) -> dict[str, int]:
        return {file.name: file.bytes for file in self.shelf.files()}


class _Torn(Exception):
    """A state that does not count."""


def _steps(names: dict[str, int]) -> list[int]:
    found = (re.fullmatch(r"step-(\d{8,})\.json", name) for name in names)
    return sorted(int(name[1]) for name in found if name)
