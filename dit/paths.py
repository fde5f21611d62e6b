"""Where things lie on disk, and how a result gets there: whole or not at all."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HOME = "home"  # the file in a worktree's scratch/ that holds the path of the checkout it was made for


@dataclass(frozen=True)
class Paths:
    """The folders of one checkout, which may be a flow's worktree of another one, its `home`."""

    root: Path = Path(".")

    @property
    def artifacts(self) -> Path:
        """What DVC versions: one folder per stage, written by that stage alone."""
        return self.root / "artifacts"

    @property
    def scratch(self) -> Path:
        """Work in progress: ignored by git and by DVC."""
        return self.root / "scratch"

    @property
    def params(self) -> Path:
        return self.root / "params.yaml"

    @property
    def home(self) -> Path:
        """The checkout that this worktree was made for, as its scratch/home names it; else this checkout itself."""
        try:
            told = (self.scratch / HOME).read_text().strip()
        except OSError:
            return self.root
        return Path(told) if told else self.root

    @property
    def memory(self) -> Path:
        """What a later run, of whatever worktree of `home`, finds again: states of trainings, known hashes, and so on.

        Several processes may be at it at once: whoever changes something in it holds a lock (dit/locks.py).
        """
        return self.home / "scratch"

    def given(self, text: str) -> Path:
        """A path as a person wrote it in params.yaml: `~` is theirs, and a relative one begins at `home`.

        Raises ValueError, one line, for the `~name` of nobody.
        """
        try:
            return self.home / Path(text).expanduser()
        except RuntimeError as error:
            raise ValueError(f"{text!r}: {error}") from None


Given = Callable[[str], Path]  # says where lies what a person named
given_here: Given = Paths().given  # for whoever works in the current folder


@contextmanager
def publish(folder: Path, scratch: Path) -> Iterator[Path]:
    """Yield an empty folder under `scratch` that replaces `folder` when the block ends without an error.

    The replacement is by renaming, so `folder` holds the old result or the new one, or, between two renames, none;
    never half of one. An error (a full disk, an interruption) removes the unfinished folder and leaves `folder` as it
    was. `scratch` must be on the same disk.
    """
    (scratch / "publish").mkdir(parents=True, exist_ok=True)
    for abandoned in (scratch / "publish").glob(
        f"{folder.name}-*"
    ):  # of a process that was killed: the stage's lock is ours
        shutil.rmtree(abandoned, ignore_errors=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f"{folder.name}-", dir=scratch / "publish"))
    unfinished.chmod(0o755)
    try:
        yield unfinished
        for file in unfinished.rglob("*"):
            if file.is_file():
                _sync(file)
        folder.parent.mkdir(parents=True, exist_ok=True)
        replaced = unfinished.with_name(f"{unfinished.name}-replaced")
        if folder.exists():
            folder.rename(replaced)
        unfinished.rename(folder)
        shutil.rmtree(replaced, ignore_errors=True)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a file's path that replaces `path` when the block ends without an error: all of it, or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    try:
        yield Path(name)
        os.chmod(name, 0o644)
        _sync(Path(name))
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_atomic(path: Path, content: bytes) -> None:
    """Write `content` so that `path` holds either all of it or what it held before."""
    with replacing(path) as unfinished:
        unfinished.write_bytes(content)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON, atomically."""
    write_atomic(path, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())


def file_sha256(path: Path) -> str:
    """sha256 of a file's content, read piece by piece."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(file: Path) -> None:
    handle = os.open(file, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
