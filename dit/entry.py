"""The door between a stage and the process that started it: settings in, exit code and outcome file out.

A stage is run by DVC, by a flow, by a batch system or by hand. Each may be killed at any moment, so this page sees to
it that one stage runs at a time, that no stage outlives the DVC that started it, and that whoever comes next can
read in scratch/outcome/<stage>.json how it ended, and whether another try may mend it ("retry"), since exit codes do
not pass through DVC unchanged.

Under torchrun the main process alone holds the lock, speaks and tells the outcome. torchrun ends all processes when one
fails; that one leaves a note, so that the outcome says why.
"""

import contextlib
import errno
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

from dit import config, locks, progress
from dit.parallel import World, world
from dit.paths import Paths, write_json
from dit.places import OutOfReach

COMPLETED, FAILED, REFUSED, INTERRUPTED = 0, 1, 2, 75  # 75 is EX_TEMPFAIL of sysexits.h: run the same command again
BUGS = (AssertionError, AttributeError, ImportError, NameError, SyntaxError, TypeError)  # no further try mends them
# Set by a flow for the stages it starts: `train` was forced, so what is finished is not taken over; missing files are no
# reason to refuse.
AFRESH, ANYWAY = "DIT_AFRESH", "DIT_ANYWAY"
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


def main(stage: Callable[..., None], *, together: bool = False) -> None:
    """Run a stage as this process: load its sections, hold its lock, report how it ended, exit.

    `together`: whether several processes, started by torchrun, can do the stage as one.
    """
    code = run(stage, Paths(), together=together)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # all is written and closed: taking down a thousand modules one by one costs a second and more


def run(stage: Callable[..., None], paths: Paths, *, together: bool = False) -> int:
    """Run a stage and return its exit code: 0 completed, 1 failed, 2 refused (bad input), 75 interrupted."""
    global _signalled
    started = time.monotonic()
    name, us = stage.__name__, world()
    if us.main:
        sys.stdout.reconfigure(line_buffering=True)
    else:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (it stays open as long as the process lives)
        os.environ.pop(progress.FILE, None)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _on_signal)
    try:
        code, message, retry = _attempt(stage, paths, us, together)
    except Interrupted as error:  # also one that came while another error was being told
        code, message = INTERRUPTED, f"{error or 'interrupted'}: the same command goes on where this one stopped"
        retry = True
    _signalled = True  # how it ended is certain: a signal from here on must not keep it from being told
    outcome = paths.scratch / "outcome"
    if us.main and code == INTERRUPTED:
        code, message, retry = _note_of_another(outcome, name) or (code, message, retry)
    told = {"stage": name, "status": _STATUS[code], "message": message, "exit_code": code, "retry": retry}
    with contextlib.suppress(OSError):  # a full disk must not hide what is being reported
        if us.main:
            if message:
                print(f"{name}: {message}", file=sys.stderr, flush=True)
            write_json(outcome / f"{name}.json", {**told, "seconds": round(time.monotonic() - started, 2)})
            _forget_notes(outcome, name)
        elif code in (FAILED, REFUSED):
            write_json(outcome / f"{name}.process-{us.rank}.json", {**told, "launch": _launch()})
    return code


def _attempt(stage: Callable[..., None], paths: Paths, us: World, together: bool) -> tuple[int, str, bool]:
    """Run the stage; its exit code, what to say of it, and whether another try may mend it."""
    name = stage.__name__
    try:
        _watch_dvc()
        _refuse_foreign_code()
        if us.size > 1 and not together:
            raise ValueError(f"{us.size} processes cannot share this stage: start it without torchrun")
        sections = config.load(stage, paths.params)
        with stage_lock(name, paths) if us.main else contextlib.nullcontext():
            us.barrier()  # the others begin when the lock is held
            stage(**sections, paths=paths)
    except ValueError as error:
        if _raised_by_us(error):
            return REFUSED, str(error), False
        traceback.print_exc()  # not what a person did wrong, but a bug of ours
        return FAILED, f"{type(error).__name__}: {error}", True
    except OutOfReach as error:
        return FAILED, f"{error}: the same command goes on where this one stopped", True
    except Exception as error:
        if full := _disk_full(error):
            return FAILED, full, False
        if us.size > 1 and lost_another(error):
            raise Interrupted("another process of this stage ended") from None
        traceback.print_exc()
        return FAILED, f"{type(error).__name__}: {error}", not isinstance(error, BUGS)
    return COMPLETED, "", False


def tell_refused(name: str, message: str, paths: Paths) -> None:
    """Write the outcome of a stage that was refused before it began."""
    told = {"stage": name, "status": _STATUS[REFUSED], "message": message, "exit_code": REFUSED, "retry": False}
    with contextlib.suppress(OSError):
        write_json(paths.scratch / "outcome" / f"{name}.json", {**told, "seconds": 0.0})


def _launch() -> str:
    """A name for the start of processes that this one belongs to."""
    return "/".join(
        os.environ.get(key, "")
        for key in ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT")
    )


def _note_of_another(outcome: Path, name: str) -> tuple[int, str, bool] | None:
    """Why another process of this start failed, which is why this one was interrupted."""
    for file in sorted(outcome.glob(f"{name}.process-*.json")):
        with contextlib.suppress(OSError, ValueError, KeyError):
            note = json.loads(file.read_text())
            if note["launch"] == _launch():
                return note["exit_code"], note["message"], note["retry"]
    return None


def _forget_notes(outcome: Path, name: str) -> None:
    for file in outcome.glob(f"{name}.process-*.json"):
        file.unlink(missing_ok=True)


def lost_another(error: BaseException) -> bool:
    """Whether talking to the other processes failed: one of them is gone, and tells itself why."""
    frames = (frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__))
    return any(name.startswith("torch.distributed") for name in frames)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Within the block SIGTERM and SIGINT raise Interrupted, so that whatever must be put away is."""
    global _signalled
    _signalled = False
    before = {number: signal.signal(number, _on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def stage_lock(name: str, paths: Paths) -> contextlib.AbstractContextManager[int]:
    """Hold the stage's OS lock: the kernel frees it when the process dies, however it dies."""
    return locks.held(paths.scratch / "lock" / name, lambda line: print(f"{name}: {line}: it runs this stage already"))


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
