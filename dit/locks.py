"""One at a time: OS locks on files, which the kernel frees when their holders are gone, however they ended.

The files stay: one that was deleted and made anew would be two locks of one name.
"""

import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

ASK_EVERY_SECONDS = 0.1
SAY_EVERY_SECONDS = 30.0


@contextmanager
def held(
    file: Path,
    say: Callable[[str], None] | None = None,
    who: str = "",
    *,
    say_every_seconds: float = SAY_EVERY_SECONDS,
) -> Iterator[int]:
    """Hold the lock during the block; yields its file descriptor: whatever process it is handed to holds it too.

    Args:
        say: gets a line, at once and every `say_every_seconds`, as long as somebody else holds it.
        who: what the others are told, such as a run's name; default: the process and its folder.
    """
    with _opened(file) as lock:
        began, said = time.monotonic(), float("-inf")
        while not _taken(lock):
            if say and time.monotonic() - said >= say_every_seconds:
                said = time.monotonic()
                say(f"waiting for {_holder(lock)}, {said - began:.0f} s so far")
            time.sleep(ASK_EVERY_SECONDS)
        _sign(lock, who)
        yield lock


@contextmanager
def tried(file: Path) -> Iterator[bool]:
    """Hold the lock during the block if nobody has it; whether that is so."""
    with _opened(file) as lock:
        taken = _taken(lock)
        if taken:
            _sign(lock)
        yield taken


def free(file: Path) -> bool:
    """Whether nobody holds this lock now."""
    if not file.exists():
        return True
    with _opened(file) as lock:
        return _taken(lock)


@contextmanager
def _opened(file: Path) -> Iterator[int]:
    file.parent.mkdir(parents=True, exist_ok=True)
    lock = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        yield lock
    finally:
        os.close(lock)


def _taken(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _sign(lock: int, who: str = "") -> None:
    since = datetime.now().astimezone().isoformat(timespec="seconds")
    holder = {"who": who, "pid": os.getpid(), "host": os.uname().nodename, "folder": os.getcwd(), "since": since}
    os.ftruncate(lock, 0)
    os.pwrite(lock, json.dumps(holder).encode(), 0)


def _holder(lock: int) -> str:
    try:
        holder = json.loads(os.pread(lock, 16384, 0))
        process = f"process {holder['pid']} on {holder['host']}"
        return (
            f"{holder['who']} ({process}, since {holder['since']})"
            if holder["who"]
            else f"{process} (in {holder['folder']})"
        )
    except (ValueError, KeyError, TypeError):
        return "one that is just starting"
