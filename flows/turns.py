"""One flow at a time in a checkout: an OS lock that says for whom one waits.

The kernel releases it when its holders are gone, however they ended; nothing stale is ever left. A stage's leash holds
it too (`dag.run_stage(hold=...)`), so that the next flow doesn't start beside a stage that is still saving.
"""

import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

ASK_EVERY_SECONDS = 0.5


@contextmanager
def turn(
    folder: Path, name: str, who: str, say: Callable[[str], None], say_every_seconds: float = 30.0
) -> Iterator[int]:
    """Hold the lock `folder/name` while the block runs; yields its file descriptor.

    Args:
        who: what the others are told, such as a run's name.
        say: gets a line at once and every `say_every_seconds` as long as somebody else holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = os.open(folder / name, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        _wait(file, say, say_every_seconds)
        holder = {"who": who, "pid": os.getpid(), "since": datetime.now().astimezone().isoformat(timespec="seconds")}
        os.ftruncate(file, 0)
        os.pwrite(file, json.dumps(holder).encode(), 0)
        yield file
    finally:
        os.close(file)


def free(file: Path) -> bool:
    """Whether nobody holds this lock now."""
    try:
        with open(file) as opened:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return True
    except BlockingIOError:
        return False
    return True


def _wait(file: int, say: Callable[[str], None], say_every_seconds: float) -> None:
    began, said = time.monotonic(), float("-inf")
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            pass
        if time.monotonic() - said >= say_every_seconds:
            said = time.monotonic()
            say(f"waiting for {_holder(file)}, {said - began:.0f} s so far")
        time.sleep(ASK_EVERY_SECONDS)


def _holder(file: int) -> str:
    try:
        holder = json.loads(os.pread(file, 4096, 0))
        return f"{holder['who']} (process {holder['pid']}, since {holder['since']})"
    except (ValueError, KeyError, TypeError):
        return "one that is just starting"
