"""Where a training's state lives between processes, and whether a run goes on with it or starts afresh.

scratch/train/<digest of the mathematics>/ holds the states, and work.json: the code that made them, the MLflow run,
and, once exported, the hash under which DVC would record the result. The stage's OS lock guards it all.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from dit.checkpoint import TrainingState, latest_state
from dit.config import read_params
from dit.paths import Paths, write_json

KEEP = 4  # trainings whose state is kept
CONTINUE = "DIT_CONTINUE"


class Work:
    """A training's folder, what is noted about it, and the state to go on from (None: start afresh)."""

    def __init__(self, folder: Path, notes: dict[str, Any], state: TrainingState | None):
        self.folder, self.notes, self.state = folder, notes, state

    def take(self) -> TrainingState | None:
        """The state, which is let go of here: some GB for a large model."""
        state, self.state = self.state, None
        return state

    def note(self, **notes: Any) -> None:
        """Add to work.json."""
        self.notes |= notes
        write_json(self.folder / "work.json", self.notes)


def begin(paths: Paths, name: str, max_steps: int) -> Work:
    """The work folder of the training called `name` (its mathematics' digest).

    It is continued if it was made by the same code and is not done, or is done and DVC does not know the result yet
    (it was killed in between). Otherwise it is set aside, and one line says how to continue it instead.
    """
    folder, code = paths.scratch / "train" / name, code_digest(paths)
    wanted = os.environ.get(CONTINUE)
    if wanted and _notes(folder).get("continued") != wanted:  # else it is back already, and was interrupted since
        _bring_back(paths.scratch / "train" / wanted, folder, code)
    notes = _notes(folder)
    if notes and notes["code"] != code:
        aside = _set_aside(folder)
        print(
            f"the code changed since this training began: starting afresh. To go on with the old state instead: {CONTINUE}={aside.name} dvc repro"
        )
    state = latest_state(folder) if folder.exists() else None
    if state and state.step >= max_steps and (state.step > max_steps or _recorded(paths, _notes(folder).get("export"))):
        aside = _set_aside(folder)
        print(f"a training of {state.step} steps is recorded already: starting afresh (the old state is {aside})")
        state = None
    folder.mkdir(parents=True, exist_ok=True)
    work = Work(folder, _notes(folder) or {"code": code}, state)
    work.note()
    _prune(paths.scratch / "train", folder)
    if state:
        print(f"going on at step {state.step} of {max_steps}")
    return work


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
    """Delete the state of every training, and fetched weights; return the bytes freed. The caller holds the lock."""
    freed = 0
    for folder in [*(paths.scratch / "train").glob("*"), *(paths.scratch / "initial").glob("*")]:
        freed += sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        shutil.rmtree(folder)
    return freed


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


def _prune(trainings: Path, current: Path) -> None:
    others = [folder for folder in trainings.iterdir() if folder.is_dir() and folder != current]
    for old in sorted(others, key=lambda folder: folder.stat().st_mtime)[: -(KEEP - 1)]:
        shutil.rmtree(old)
