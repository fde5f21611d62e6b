"""The door between a stage and the process that started it: settings in, exit code and outcome file out.

A stage is run by DVC, by a flow, by a batch system or by hand. Each may be killed at any moment, so this page sees to
it that one stage runs at a time, that no stage outlives the DVC that started it, and that whoever comes next can
read in scratch/outcome/<stage>.json how it ended, since exit codes do not pass through DVC unchanged.
"""

import contextlib
import errno
import fcntl
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dit import config
from dit.paths import Paths, write_json

COMPLETED, FAILED, REFUSED, INTERRUPTED = 0, 1, 2, 75  # 75 is EX_TEMPFAIL of sysexits.h: run the same command again
_STATUS = {COMPLETED: "completed", FAILED: "failed", REFUSED: "refused", INTERRUPTED: "interrupted"}


class Interrupted(BaseException):
    """SIGTERM or SIGINT arrived. Like KeyboardInterrupt no Exception, so that no `except Exception` swallows it."""


_deferred: threading.Event | None = None
_signalled = False  # one signal is enough: a second must not break into the saving that the first began


@contextlib.contextmanager
def deferred_interrupts() -> Iterator[Callable[[], bool]]:
    """Within the block a signal is only noted, and the yielded function says whether one came.

    A training step must not be torn in half: the loop asks between steps, saves, and raises Interrupted itself.
    """
    global _deferred, _signalled
    _deferred = requested = threading.Event()
    try:
        yield requested.is_set
    finally:
        _deferred, _signalled = None, requested.is_set()


def main(stage: Callable[..., None]) -> None:
    """Run a stage as this process: load its sections, hold its lock, report how it ended, exit."""
    code = run(stage, Paths())
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # all is written and closed: taking down a thousand modules one by one costs a second and more


def run(stage: Callable[..., None], paths: Paths) -> int:
    """Run a stage and return its exit code: 0 completed, 1 failed, 2 refused (bad input), 75 interrupted."""
    started = time.monotonic()
    name, code, message = stage.__name__, COMPLETED, ""
    sys.stdout.reconfigure(line_buffering=True)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _on_signal)
    try:
        _watch_dvc()
        _refuse_foreign_code()
        sections = config.load(stage, paths.params)
        with stage_lock(name, paths):
            stage(**sections, paths=paths)
    except ValueError as error:
        code, message = REFUSED, str(error)
        if not _raised_by_us(error):  # not what a person did wrong, but a bug of ours
            code, message = FAILED, f"{type(error).__name__}: {error}"
            traceback.print_exc()
    except Interrupted as error:
        code, message = INTERRUPTED, f"{error or 'interrupted'}: the same command goes on where this one stopped"
    except Exception as error:
        full = _disk_full(error)
        code, message = FAILED, full or f"{type(error).__name__}: {error}"
        if not full:
            traceback.print_exc()
    if message:
        print(f"{name}: {message}", file=sys.stderr, flush=True)
    with contextlib.suppress(OSError):  # a full disk must not hide what is being reported
        outcome = {"stage": name, "status": _STATUS[code], "message": message, "exit_code": code}
        write_json(
            paths.scratch / "outcome" / f"{name}.json", {**outcome, "seconds": round(time.monotonic() - started, 2)}
        )
    return code


@contextlib.contextmanager
def stage_lock(name: str, paths: Paths) -> Iterator[None]:
    """Hold the stage's OS lock: the kernel frees it when the process dies, however it dies."""
    folder = paths.scratch / "lock"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / name, "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            print(f"{name}: waiting for process {_holder(file.read())}, which runs this stage already")
            fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        file.truncate()
        json.dump({"pid": os.getpid(), "host": os.uname().nodename}, file)
        file.flush()
        yield


def _holder(text: str) -> str:
    try:
        holder = json.loads(text)
        return f"{holder['pid']} on {holder['host']}"
    except (ValueError, KeyError):
        return "(unknown)"


def _on_signal(number: int, frame: Any) -> None:
    global _signalled
    if _deferred is not None:
        _deferred.set()
    elif not _signalled:
        _signalled = True
        raise Interrupted(f"interrupted by {signal.Signals(number).name}")


def _watch_dvc() -> None:
    """End this stage when the DVC that started it is gone.

    A SIGKILLed DVC leaves its stage running, and the next `dvc repro` would start a second one beside it.
    """
    if "DVC_STAGE" not in os.environ:  # set by DVC for its commands
        return
    import psutil

    for ancestor in psutil.Process().parents():
        with contextlib.suppress(psutil.Error):
            if any(Path(part).name == "dvc" for part in ancestor.cmdline()[:4]):
                threading.Thread(target=_end_with, args=(ancestor,), daemon=True).start()
                return
    raise Interrupted("the DVC that started this stage is gone")


def _end_with(process: Any) -> None:
    import psutil

    with contextlib.suppress(psutil.Error):  # it may vanish between two questions
        while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGTERM)


def _refuse_foreign_code() -> None:
    # An editable install makes `import dit` find another checkout than the one whose artifacts would be written.
    here, code = Path.cwd().resolve(), Path(__file__).resolve().parents[1]
    if (here / "dit" / "entry.py").exists() and code != here:
        raise ValueError(
            f"the code at {code} would run on the artifacts of {here}: call `python -m dit.stages...` there"
        )


def _raised_by_us(error: BaseException) -> bool:
    """Whether our own code raised it, so that its text was written for a person."""
    frames = list(traceback.walk_tb(error.__traceback__))
    module = frames[-1][0].f_globals.get("__name__", "")
    return type(error) is ValueError and (module.partition(".")[0] in ("dit", "__main__"))


def _disk_full(error: BaseException) -> str:
    text = str(error)
    if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in text or "os error 28" in text:
        return f"the disk is full: free some space and run again; no half result was written, the last one is in DVC's cache (`dvc checkout`) ({text})"
    if getattr(error, "errno", None) == errno.EDQUOT:
        return f"the disk quota is used up: free some space and run again; no half result was written, the last one is in DVC's cache (`dvc checkout`) ({text})"
    return ""
