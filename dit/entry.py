"""The door between a stage and the process that started it: settings in, exit code and outcome file out.

A stage is run by DVC, by a flow, by a batch system or by hand. Each may be killed at any moment, so this page sees to
it that one stage runs at a time, that no stage outlives the DVC that started it, and that whoever comes next can
read in scratch/outcome/<stage>.json how it ended, and whether another try may mend it ("retry"), since exit codes do
not pass through DVC unchanged.

Where several processes do a stage, the one that was started launches them (dit/launch.py), and gives their outcome as
its own. Of them the main process alone holds the lock, speaks and tells the outcome. torchrun ends all when one fails,
and starts them again: that one leaves a note, which says why, and whether another try is of use.
"""

import contextlib
import errno
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from dit import config, launch, locks, parallel, progress
from dit.outcome import FAILED, INTERRUPTED, REFUSED, End, Outcome, started
from dit.parallel import World, world
from dit.paths import Paths
from dit.places import OutOfReach

BUGS = (AssertionError, AttributeError, ImportError, NameError, SyntaxError, TypeError)  # no further try mends them
# Set by a flow for the stages it starts: `train` was forced, so what is finished is not taken over; missing files are no
# reason to refuse.
AFRESH, ANYWAY = "DIT_AFRESH", "DIT_ANYWAY"
VISIBLE_SECONDS = 60.0  # a network file system remembers for so long what was not there


class Interrupted(BaseException):
    """A signal to stop arrived. Like KeyboardInterrupt no Exception, so that no `except Exception` swallows it."""


class _Lost(Interrupted):
    """Another process of this stage ended, and this one can't go on without it."""


_deferred: threading.Event | None = None
_signalled = False  # one signal is enough: a second must not break into the saving that the first began


@contextlib.contextmanager
def deferred_interrupts(run: Any = None) -> Iterator[Callable[..., bool]]:
    """Within the block a signal is only noted, and the yielded function says whether one came.

    A training step must not be torn in half: the loop asks between steps, saves, and raises Interrupted itself. With
    `run` the answer is also yes where its time limit, or a batch system's, is near: `should_stop(save_seconds)` is told
    how long saving takes.
    """
    global _deferred, _signalled
    _deferred = requested = threading.Event()
    deadline = launch.Deadline(launch.deadline(run) if run else None)
    try:
        yield lambda save_seconds=0.0: requested.is_set() or deadline.near(save_seconds)
    finally:
        _deferred, _signalled = None, requested.is_set()


def main(stage: Callable[..., None], *, together: bool = False) -> None:
    """Run a stage as this process: load its sections, hold its lock, report how it ended, exit.

    `together`: whether several processes can do the stage as one: then they are launched where that is of use.
    """
    code = run(stage, Paths(), together=together)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # all is written and closed: taking down a thousand modules one by one costs a second and more


def run(stage: Callable[..., None], paths: Paths, *, together: bool = False) -> int:
    """Run a stage and return its exit code: 0 completed, 1 failed, 2 refused (bad input), 75 interrupted.

    To torchrun, of a launcher of ours, a process says no more than whether all are to be started again (1) or not (0).
    """
    global _signalled
    began, lost = time.monotonic(), False
    us, outcome = world(), Outcome(stage.__name__, paths)
    if us.main:
        sys.stdout.reconfigure(line_buffering=True)
    else:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (it stays open as long as the process lives)
        os.environ.pop(progress.FILE, None)
    for number in launch.STOP:
        signal.signal(number, _on_signal)
    try:
        end = _attempt(stage, outcome, us, together)
    except Interrupted as error:  # also one that came while another error was being told
        what = f"{str(error) or 'interrupted'}: the same command goes on where this one stopped"
        end, lost = End(INTERRUPTED, what, True), isinstance(error, _Lost)
    _signalled = True  # how it ended is certain: a signal from here on must not keep it from being told
    launched = launch.launched()
    if us.main and end.code == INTERRUPTED:
        end = next(outcome.ends(started(), notes_only=True), end)
    if us.main and end.message is not None:
        if end.message and (end.code == FAILED or not launched):  # else the launcher has the last word
            with contextlib.suppress(OSError):
                print(f"{stage.__name__}: {end.message}", file=sys.stderr, flush=True)
        outcome.tell(replace(end, start=end.start or launched), time.monotonic() - began)
    elif not us.main and end.code in (FAILED, REFUSED):
        outcome.note(replace(end, start=started()), us.rank)
    return int(lost or end.code == FAILED) if launched else end.code


def _attempt(stage: Callable[..., None], outcome: Outcome, us: World, together: bool) -> End:
    """Run the stage, or have it run by several processes."""
    try:
        # One of several that ends before all have joined is waited for in vain.
        with deferred_interrupts() if us.size > 1 else contextlib.nullcontext(bool) as stopped:
            begun = _begin(stage, outcome, us, together)
        if stopped():
            raise Interrupted("interrupted before it began")
        if isinstance(begun, End):
            return begun
        with stage_lock(outcome.name, outcome.paths) if us.main else contextlib.nullcontext():
            us.barrier()  # the others begin when the lock is held
            stage(**begun, paths=outcome.paths)
    except ValueError as error:
        if _raised_by_us(error):
            return End(REFUSED, str(error))
        traceback.print_exc()  # not what a person did wrong, but a bug of ours
        return End(FAILED, f"{type(error).__name__}: {error}", True)
    except OutOfReach as error:
        return End(FAILED, f"{error}: the same command goes on where this one stopped", True)
    except Exception as error:
        if full := _disk_full(error):
            return End(FAILED, full)
        if us.size > 1 and lost_another(error):
            raise _Lost("another process of this stage ended") from None
        traceback.print_exc()
        return End(FAILED, f"{type(error).__name__}: {error}", not isinstance(error, BUGS))
    return End()


def _begin(stage: Callable[..., None], outcome: Outcome, us: World, together: bool) -> dict[str, Any] | End:
    """The stage's sections, once this process has joined the others; or the end, if that is certain or others' work."""
    if launch.launched():
        if not launch.watch_launcher():
            raise Interrupted("the launcher of this process is gone")
        if ended := next((end for end in outcome.ends(started()) if not end.retry), None):
            return ended  # an earlier try of this start: what ended it no other try mends
        if us.main:
            outcome.forget(started())
    else:
        _watch_dvc()
    _refuse_foreign_code()
    if us.size > 1 and not together:
        raise ValueError(f"{us.size} processes cannot share this stage: start it without torchrun")
    sections = config.load(stage, outcome.paths.params)
    if together and (team := launch.team(sections.get("run"))):
        return _lead(team, outcome)
    if us.size > 1 and "run" in sections:
        from dit.runtime import pick_device

        parallel.device_group(pick_device(sections["run"].device))
    return sections


def _lead(team: launch.Team, outcome: Outcome) -> End:
    """Have the stage done by several processes, and take their end for this one's."""
    if team.host == 0:
        outcome.forget(team.id)  # an earlier launch on these same hosts may have had this name

    def settled() -> bool:
        return any(not end.retry or end.code == INTERRUPTED for end in outcome.ends(team.id))

    status, asked = launch.lead(team, settled)
    seen_by = time.monotonic() + (VISIBLE_SECONDS if team.hosts > 1 and status == 0 else 0)
    while not (end := next(outcome.ends(team.id), None)) and time.monotonic() < seen_by:
        time.sleep(0.5)
    if team.host > 0:
        return End(end.code if end else int(status != 0), None)
    if end and (end.code != INTERRUPTED or status == 0 or asked):
        return end
    if asked:
        raise Interrupted(f"interrupted by {asked.name}")
    lost = "a process of this stage was lost" + (f" more than {team.restarts} times" if team.restarts else "")
    if status < 0:
        lost = f"the launcher's torchrun was ended by {signal.Signals(-status).name}"
    return End(FAILED, f"{lost}: the same command goes on where it stopped", True, team.id)


def tell_refused(name: str, message: str, paths: Paths) -> None:
    """Write the outcome of a stage that was refused before it began."""
    Outcome(name, paths).tell(End(REFUSED, message), 0.0)


def lost_another(error: BaseException) -> bool:
    """Whether talking to the other processes failed: one of them is gone, and tells itself why."""
    frames = (frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__))
    return any(name.startswith("torch.distributed") for name in frames)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Within the block a signal to stop raises Interrupted, so that whatever must be put away is."""
    global _signalled
    _signalled = False
    before = {number: signal.signal(number, _on_signal) for number in launch.STOP}
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
                threading.Thread(target=launch.end_with, args=(ancestor,), daemon=True).start()
                return
    raise Interrupted("the DVC that started this stage is gone")


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
