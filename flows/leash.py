"""A leash: runs one command, and nothing of it outlives the process that asked for it.

DVC ended by a signal leaves its stage running, and ranks of a training in sessions of their own survive even a SIGKILL
of DVC's process group; a second trainer beside the first is the result. So a small process stands between:

    walker --pipe--> leash --> dvc repro --> stage --> ranks, loaders, ...

The leash holds the reading end of a pipe as its standard input. When the other end closes, because the walker said so
or because it was killed in whatever way, the leash ends everything below it: SIGINT (which DVC and a stage take as
"save and stop"), then SIGTERM, then SIGKILL. On Linux it adopts every orphan below it, so that a double fork or a new
session doesn't hide a process. Were the leash itself killed, the kernel kills DVC, and the stage's own watch on DVC
does the rest.

DIT_SAVE_SECONDS is the time from the SIGINT to the SIGKILL, 23 unless set. A large state needs more: give it to
whatever starts the flow (`DIT_SAVE_SECONDS=300 make up`, or before `python -m flows.train_dit`). Prefect ends a
cancelled flow's own process after 30 s all the same; the leash and the stage go on saving, and the next flow waits.

`python leash.py COMMAND...` exits with the command's status (128 + n for signal n), with 2 where the variable is wrong.
"""

import ctypes
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import BinaryIO

Escalation = tuple[tuple[signal.Signals, float], ...]
SAVE_VARIABLE = "DIT_SAVE_SECONDS"
# Prefect kills a cancelled flow after 30 s. This ends before that, and leaves the flow the time to report.
SAVE_SECONDS = 23.0
KILL_SECONDS = 2.0
AFTER_SUCCESS: Escalation = ((signal.SIGTERM, 3.0), (signal.SIGKILL, KILL_SECONDS))
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


def save_seconds(environment: Mapping[str, str] = os.environ) -> float:
    """How long a stage that is asked to stop may save, in seconds. Raises ValueError where the variable is no number."""
    text = environment.get(SAVE_VARIABLE, "")
    try:
        seconds = float(text or SAVE_SECONDS)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds <= threading.TIMEOUT_MAX / 2:  # neither NaN nor what no timer takes
        raise ValueError(f"{SAVE_VARIABLE} must be a number of seconds above 0, got {text!r}")
    return seconds


def escalation(save: float) -> Escalation:
    """The signals and the seconds after each: SIGKILL `save` seconds after SIGINT, SIGTERM (at most) 5 before it."""
    last = min(5.0, save / 2)
    return (signal.SIGINT, save - last), (signal.SIGTERM, last), (signal.SIGKILL, KILL_SECONDS)


def main(command: list[str]) -> int:
    """Run `command` until it ends or standard input closes; returns the exit status for this process."""
    steps = escalation(save_seconds())
    # Loaded before the fork: between fork and exec nothing may be imported or locked.
    prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None
    if prctl:
        prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    wake = _wake_on(signal.SIGCHLD, signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    leash = os.getpid()

    def die_with_leash() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != leash:
            os._exit(1)

    child = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        process_group=0,
        preexec_fn=die_with_leash if prctl else None,
    )
    relay = threading.Thread(target=_relay, args=[child.stdout], daemon=True)
    relay.start()
    while (status := _reap(child.pid)) is None:
        if _asked_to_stop(wake):
            status = end_descendants(steps, child.pid)
            break
    child.returncode = status  # reaped here and not by Popen
    _end_left_behind(child.pid, AFTER_SUCCESS if status == 0 else steps)
    relay.join(timeout=5)
    return status if status is not None and status >= 0 else 128 - (status or 0)


def _relay(source: BinaryIO) -> None:
    """Pass the command's output on, for as long as somebody reads it.

    A stage that saves because its walker was killed must not fail on printing that it saves.
    """
    read = True
    while data := os.read(source.fileno(), 65536):
        while read and data:
            try:
                data = data[os.write(sys.stdout.fileno(), data) :]
            except OSError:
                read = False


def end_descendants(steps: Escalation, command: int) -> int | None:
    """End every process below this one; returns the exit status of `command` (the leader of a group) if it ended now.

    Each step sends its signal once to the command's process group and once to every descendant outside of it (never
    twice to one process: a second SIGINT would break off the save that the first one started), then waits.
    """
    status, waited = None, 0.0
    for number, seconds in steps:
        if waited and (left := descendants()):
            hint = number == signal.SIGKILL and steps is not AFTER_SUCCESS
            more = f"; {SAVE_VARIABLE} gives more time to save" if hint else ""
            _say(f"{len(left)} process(es) still run after {waited:g} s and get {number.name}{more}")
        outside = [process for process in descendants() if _group_of(process) != command]
        _signal(os.killpg, command, number)
        for process in outside:
            _signal(os.kill, process, number)
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            running = descendants()
            seen = _reap(command)
            status = status if seen is None else seen
            if not running:
                return status
            time.sleep(0.05)
        waited += seconds
    return status


def descendants() -> list[int]:
    """The processes below this one that still run, those in other sessions included."""
    import psutil

    running = []
    for process in psutil.Process().children(recursive=True):
        try:
            if process.status() != psutil.STATUS_ZOMBIE:
                running.append(process.pid)
        except psutil.NoSuchProcess:
            pass
    return running


def _end_left_behind(command: int, steps: Escalation) -> None:
    """End what runs on without the command: of a DVC that was killed, the stage, which may want to save."""
    deadline = time.monotonic() + 1
    while left := descendants():
        if time.monotonic() > deadline:
            _say(f"ending {len(left)} process(es) that the command left behind: {left}")
            end_descendants(steps, command)
            return
        _reap(0)
        time.sleep(0.02)


def _say(line: str) -> None:
    try:
        os.write(sys.stdout.fileno(), f"{line}\n".encode())
    except OSError:
        pass  # nobody reads any more


def _wake_on(*numbers: signal.Signals) -> int:
    """A file that becomes readable when one of these signals came; it then holds their numbers."""
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing)
    for number in numbers:
        signal.signal(number, lambda *_: None)
    return reading


def _asked_to_stop(wake: int) -> bool:
    """Sleep until something happens; true if it was the walker's end or a signal to stop, and not a child's end."""
    ready, _, _ = select.select([sys.stdin.fileno(), wake], [], [])
    if sys.stdin.fileno() in ready and not os.read(sys.stdin.fileno(), 64):
        return True
    return wake in ready and any(number != signal.SIGCHLD for number in os.read(wake, 64))


def _reap(command: int) -> int | None:
    """Collect ended children; the command's exit status (negative: its signal) once it is among them."""
    status = None
    while True:
        try:
            process, code = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return status
        if process == 0:
            return status
        if process == command:
            status = os.waitstatus_to_exitcode(code)


def _group_of(process: int) -> int | None:
    try:
        return os.getpgid(process)
    except ProcessLookupError:
        return None


def _signal(send: Callable[[int, int], None], target: int, number: int) -> None:
    try:
        send(target, number)
    except (ProcessLookupError, PermissionError):
        pass


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except ValueError as error:
        print(f"leash: {error}", file=sys.stderr)
        sys.exit(2)
