"""Where a training's state lives between processes, and whether a run goes on with it or starts afresh.

scratch/train/<digest of the mathematics>/ holds the states, and work.json: the code that made them, the MLflow run,
and, once exported, the hash under which DVC would record the result. It is the same folder for all worktrees of a
checkout (`Paths.memory`), and an OS lock for each training keeps two of them from being at it at once.

run.mirror holds the same at train/<digest>-<beginning of the code's digest>/, for other machines: what is newer there
is taken over, and code that changed begins beside what the old one left.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

from dit import entry, locks, parallel, storage
from dit.config import read_params
from dit.files import is_bucket
from dit.mirror import FolderShelf, Mirror
from dit.parallel import World
from dit.paths import Paths, write_json
from dit.runtime import RunConfig
from dit.states import SavedState, latest_state

T = TypeVar("T")

KEEP = 4  # trainings whose state is kept
WAIT_SECONDS = 7 * 86400  # for so long one that was interrupted is kept beside them
CONTINUE = "DIT_CONTINUE"


class Work:
    """A training's folder, what is noted about it, and the state to go on from (None: start afresh).

    Several processes have the same one; the main process alone writes what is noted, and has the mirror, if one is set.
    """

    def __init__(
        self,
        folder: Path,
        notes: dict[str, Any],
        state: SavedState | None,
        *,
        mirror: Mirror | None = None,
        main: bool = True,
    ):
        self.folder, self.notes, self.state, self.mirror, self.main = folder, notes, state, mirror, main

    def note(self, **notes: Any) -> None:
        """Add to work.json."""
        self.notes |= notes
        if self.main:
            write_json(self.folder / "work.json", self.notes)


@contextmanager
def begun(
    paths: Paths, name: str, max_steps: int, *, run: RunConfig | None = None, world: World | None = None
) -> Iterator[Work]:
    """The work folder of the training called `name` (its mathematics' digest), which is this process's in the block.

    It is continued if it was made by the same code and is not done, or is done and DVC does not know the result yet
    (it was killed in between, or another worktree did it). Otherwise it is set aside, and one line says how to continue
    it instead. Another process at the same training is waited for: what it has finished is there then. A state in
    `run.mirror` that is newer than the one here is brought here first.

    Of several processes the main one does all this, and the others get what it found, or raise what it raised.
    """
    us = world or parallel.world()
    with locks.held(_lock(paths, name), _waiting) if us.main else nullcontext():
        work = None

        def begin() -> tuple[Path, dict[str, Any], SavedState | None]:
            nonlocal work
            work = _begin(paths, name, max_steps, run or RunConfig())
            _prune(paths, work.folder)
            return work.folder, work.notes, work.state

        told = _told_to_all(us, begin)
        yield work or Work(*told, main=False)


def _told_to_all(us: World, find: Callable[[], T]) -> T:
    """What the main process finds, at every process; or what it raises."""
    found: T | Exception | None = None
    if us.main:
        try:
            found = find()
        except Exception as error:
            us.share(error)
            raise
    found = us.share(found)
    if isinstance(found, Exception):
        raise found
    return found


def _waiting(line: str) -> None:
    print(f"train: {line}: it is at this training, and what it finishes is taken over")


def _begin(paths: Paths, name: str, max_steps: int, run: RunConfig) -> Work:
    folder, code = _trainings(paths) / name, code_digest(paths)
    wanted = os.environ.get(CONTINUE)
    if wanted and _notes(folder).get("continued") != wanted:  # else it is back already, and was interrupted since
        _bring_back(folder.with_name(wanted), folder, code)
    notes = _notes(folder)
    if notes and notes["code"] != code:
        aside = _set_aside(folder)
        print(
            f"the code changed since this training began: starting afresh. To go on with the old state instead: {CONTINUE}={aside.name} dvc repro"
        )
    state = latest_state(folder) if folder.exists() else None
    known = os.environ.get(entry.AFRESH) or _recorded(paths, _notes(folder).get("export"))
    if state and state.step >= max_steps and (state.step > max_steps or known):
        aside = _set_aside(folder)
        print(f"a training of {state.step} steps is there already: starting afresh (the old state is {aside})")
        state = None
    folder.mkdir(parents=True, exist_ok=True)
    work = Work(folder, _notes(folder) or {"code": code}, state, mirror=open_mirror(paths, folder, code, run))
    if work.mirror is not None:
        state = work.state = _newest(work, max_steps, finished=bool(known))
    if state and state.step < max_steps:
        work.notes.pop("export", None)
    work.note()
    if state:
        print(f"going on at step {state.step} of {max_steps}")
    return work


def open_mirror(paths: Paths, folder: Path, code: str, run: RunConfig) -> Mirror | None:
    """What run.mirror names as the place of this training's states; None where it names nothing.

    Raises ValueError, one line, where it can't be that.
    """
    if run.mirror is None:
        return None
    place = f"{run.mirror.rstrip('/')}/train/{folder.name}-{code[:8]}".rstrip("-")
    shelf = storage.Bucket(place, "run.mirror") if is_bucket(place) else FolderShelf(place, paths.given(place))
    return Mirror(shelf, folder, run.keep_checkpoints)


def _newest(work: Work, max_steps: int, *, finished: bool) -> SavedState | None:
    """The state here, or a newer one from the mirror, with its notes."""
    mirror, here = work.mirror, work.state
    there = max((step for step in mirror.steps() if step <= max_steps), default=-1)
    if finished and there == max_steps:  # as with one here: it is made again
        mirror.instead = True
        return here
    newer = mirror.fetch(above=here.step if here else -1, up_to=max_steps)
    if newer is None:
        return here
    print(f"run.mirror: took the state of step {newer.step} from {mirror.shelf.name}")
    work.notes |= {name: told for name, told in mirror.notes().items() if name not in ("code", "export")}
    return newer


def _trainings(paths: Paths) -> Path:
    return paths.memory / "train"


def _lock(paths: Paths, name: str) -> Path:
    """The lock of a training and of its set-aside states."""
    return paths.memory / "lock" / f"train-{name.partition('.')[0]}"


def code_digest(paths: Paths) -> str:
    """sha256 of the code that decides the weights: the modules that dvc.yaml lists for `train`."""
    try:
        deps = read_params(paths.root / "dvc.yaml")["stages"]["train"]["deps"]
    except (ValueError, KeyError):  # not run by DVC: nothing is known to have changed
        return ""
    sha = hashlib.sha256()
    for file in sorted(dep for dep in deps if dep.endswith(".py")):
        sha.update(file.encode() + (paths.root / file).read_bytes())
    return sha.hexdigest()


def dvc_hash(folder: Path) -> str:
    """The hash under which DVC records a folder in dvc.lock: the MD5 of its list of files and their MD5s."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    entries = [{"md5": _md5(file), "relpath": file.relative_to(folder).as_posix()} for file in files]
    listed = json.dumps(sorted(entries, key=lambda entry: entry["relpath"]), sort_keys=True)
    return hashlib.md5(listed.encode(), usedforsecurity=False).hexdigest() + ".dir"


def _md5(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def clean(paths: Paths) -> int:
    """Delete the states of trainings that no process is at, and fetched weights and latents if none is; return the bytes freed."""
    freed, busy = 0, False
    for folder in _trainings(paths).glob("*"):
        with locks.tried(_lock(paths, folder.name)) as free:
            freed += _delete(folder) if free else 0
            busy = busy or not free
    if not busy:
        freed += sum(_delete(folder) for folder in [*(paths.memory / "initial").glob("*"), paths.memory / "latents"])
    return freed


def _delete(folder: Path) -> int:
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    shutil.rmtree(folder, ignore_errors=True)
    return size


def _recorded(paths: Paths, export: str | None) -> bool:
    try:
        outs = read_params(paths.root / "dvc.lock")["stages"]["train"]["outs"]
    except (ValueError, KeyError):
        return False
    return export is not None and any(out.get("md5") == export for out in outs)


def _notes(folder: Path) -> dict[str, Any]:
    try:
        notes = json.loads((folder / "work.json").read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return {}
    return notes if isinstance(notes, dict) and "code" in notes else {}


def _bring_back(old: Path, folder: Path, code: str) -> None:
    if not _notes(old):
        raise ValueError(f"{CONTINUE}: there is no set-aside training {old}")
    if old.name.partition(".")[0] != folder.name:
        raise ValueError(
            f"{CONTINUE}: {old.name} was another training than {folder.name}: its settings or latents differ"
        )
    if old != folder:
        if folder.exists():
            _set_aside(folder)
        old.rename(folder)
    notes = _notes(folder) | {"continued": old.name}
    if notes["code"] != code:
        notes |= {"code": code, "earlier_code": [*notes.get("earlier_code", []), notes["code"]]}
    write_json(folder / "work.json", notes)


def _set_aside(folder: Path) -> Path:
    number = 1
    while (aside := folder.with_name(f"{folder.name}.{number}")).exists():
        number += 1
    os.utime(aside_folder := folder.rename(aside))  # the newest now: it was just promised to a person
    return aside_folder


def _prune(paths: Paths, current: Path) -> None:
    """Keep the last few, all that a process is at, and for a while what was interrupted: it may be about to go on."""
    others = [folder for folder in current.parent.iterdir() if folder.is_dir() and folder != current]
    waiting = [folder for folder in others if _interrupted_lately(folder)]
    done = sorted((folder for folder in others if folder not in waiting), key=_touched)
    for old in done[: -(KEEP - 1)]:
        own = _lock(paths, old.name) == _lock(paths, current.name)
        with nullcontext(True) if own else locks.tried(_lock(paths, old.name)) as free:
            if free:
                shutil.rmtree(old, ignore_errors=True)


def _interrupted_lately(folder: Path) -> bool:
    aside, finished = "." in folder.name, "export" in _notes(folder)
    return not aside and not finished and time.time() - _touched(folder) < WAIT_SECONDS


def _touched(folder: Path) -> float:
    try:
        return folder.stat().st_mtime
    except FileNotFoundError:  # another process has just put it away
        return 0.0
