"""One at a time: OS locks on files, which the kernel frees when their holder ends, however it ends.

The files stay: one that was deleted and made anew would be two locks of one name.
"""

import fcntl
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


@contextmanager
def held(file: Path, waiting: Callable[[str], None] | None = None) -> Iterator[None]:
    """Hold the lock during the block. Where another process has it, `waiting` is told which, and the lock waited for."""
    with _opened(file) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if waiting:
                lock.seek(0)
                waiting(_holder(lock.read()))
            fcntl.flock(lock, fcntl.LOCK_EX)
        _sign(lock)
        yield


@contextmanager
def tried(file: Path) -> Iterator[bool]:
    """Hold the lock during the block if nobody has it; whether that is so."""
    with _opened(file) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        _sign(lock)
        yield True


def _opened(file: Path) -> IO[str]:
    file.parent.mkdir(parents=True, exist_ok=True)
    return open(file, "a+")


def _sign(lock: IO[str]) -> None:
    lock.seek(0)
    lock.truncate()
    json.dump({"pid": os.getpid(), "host": os.uname().nodename, "folder": os.getcwd()}, lock)
    lock.flush()


def _holder(text: str) -> str:
    try:
        holder = json.loads(text)
        return f"{holder['pid']} on {holder['host']} (in {holder['folder']})"
    except (ValueError, KeyError):
        return "(unknown)"
