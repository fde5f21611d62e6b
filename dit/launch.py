"""One command for any machine: the process that was started becomes the launcher of several, where several are of use.

    python -m dit.stages.sample                            the launcher; dvc.yaml's command
      torchrun, in a session of its own                    starts the ranks, and all of them again when one is lost
        python -m dit.stages.sample   RANK=0 LOCAL_RANK=0  rank 0 ...
        python -m dit.stages.sample   RANK=1 LOCAL_RANK=1  rank 1 ...

There are as many ranks as accelerators, on one host or, where the environment tells of others, on each of them. The
launcher passes signals on to the ranks themselves: what torchrun sends has a deadline, and a large state takes long to
save. None outlives another: the ranks watch torchrun and the launcher, the launcher watches torchrun.
"""

import ctypes
import math
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dit.team import Team, hosts

if TYPE_CHECKING:
    from dit.runtime import RunConfig

STOP = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # SIGUSR1: what Slurm is asked to send before its limit
# What ranks are told: the launch, the launcher's process, when it began.
LAUNCHED, LAUNCHER, STARTED = "DIT_LAUNCHED", "DIT_LAUNCHER", "DIT_STARTED"
SAVE_SECONDS = 300.0  # a rank may save for so long, unless DIT_SAVE_SECONDS says otherwise
POLL_SECONDS, LOOK_SECONDS = 0.1, 2.0
END_SECONDS = 30.0  # between the last step and the deadline, beside the saving
_PR_SET_PDEATHSIG = 1
_began = time.time()


def team(run: "RunConfig | None", environment: Mapping[str, str] = os.environ) -> Team | None:
    """The processes that this one has to start; None where it does the work itself: alone, or as one that was started.

    Raises ValueError where the environment tells of other hosts in a way that cannot be, or `run` asks for too much.
    """
    if run is None or "RANK" in environment or "WORLD_SIZE" in environment:
        return None
    count, others = processes(run), hosts(environment)
    if count == 1 and others is None:
        return None
    return Team(count, run.restarts, **(others or {"id": uuid.uuid4().hex}))


def processes(run: "RunConfig") -> int:
    """How many processes share a stage on this machine: `run.processes`, or one for each accelerator that is visible."""
    from dit.runtime import accelerators

    kind, count = accelerators(run.device)
    if kind == "cpu":
        return run.processes or 1
    if run.processes > count:
        raise ValueError(f"run.processes: {run.processes} are more than this machine's {count} ({kind}): set 0 or less")
    return run.processes or count


def program() -> list[str]:
    """What this process runs, in words for Python or torchrun."""
    told = sys.modules["__main__"].__spec__
    return [*(["-m", told.name] if told else [sys.argv[0]]), *sys.argv[1:]]


def lead(team: Team, settled: Callable[[], bool]) -> tuple[int, signal.Signals | None]:
    """Start torchrun, and be there until it and the ranks are gone; its exit status, and the signal that asked to stop.

    `settled` says that one of the ranks has ended for good: the others can't go on without it, and what is still there
    DIT_SAVE_SECONDS later (in an exchange that never ends) is killed. So it is when they were asked to stop, and one did.
    """
    patience, asked = save_seconds(), []
    before = {number: signal.signal(number, lambda number, _: asked.append(signal.Signals(number))) for number in STOP}
    torchrun = _start(team, patience)
    ranks = _Ranks(torchrun.pid)
    try:
        told, look_at, settled_at = None, 0.0, math.inf
        while torchrun.poll() is None:
            time.sleep(POLL_SECONDS)
            now = time.monotonic()
            if not asked and now < look_at:
                continue
            look_at, fresh = now + LOOK_SECONDS, ranks.look()
            if asked and (not ranks.alive() if told is None else fresh):
                torchrun.terminate()  # it is just about to start them, or does it again
                told = told or 0
            elif asked and told is None:
                told = ranks.send(signal.SIGINT if asked[0] == signal.SIGINT else signal.SIGTERM)
            over = settled() or (told and len(ranks.alive()) < told)
            settled_at = min(settled_at, now) if over and not fresh else math.inf
            if now - settled_at > patience:
                ranks.send(signal.SIGKILL)
        ranks.end(patience)
    finally:
        torchrun.kill()  # nothing is left to kill, unless this page itself failed
        for number, handler in before.items():
            signal.signal(number, handler)
    return torchrun.wait(), asked[0] if asked else None


def launched() -> str:
    """The launch that this rank belongs to; empty where no launcher of ours started this process."""
    return os.environ.get(LAUNCHED, "")


def watch_launcher() -> bool:
    """End this rank when its torchrun or its launcher is gone; False where one is gone already."""
    import psutil

    torchrun = psutil.Process().parent()
    launcher = torchrun and torchrun.parent()
    if launcher is None or str(launcher.pid) != os.environ.get(LAUNCHER):
        return False
    for process in (torchrun, launcher):
        threading.Thread(target=end_with, args=(process, save_seconds()), daemon=True).start()
    return True


def end_with(process: Any, seconds: float = math.inf) -> None:
    """Wait for the end of a process (psutil's), then stop this one, which may save; kill it `seconds` later."""
    import psutil

    try:
        while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.5)
    except psutil.Error:
        pass  # it vanished between two questions
    os.kill(os.getpid(), signal.SIGTERM)
    if seconds < threading.TIMEOUT_MAX:
        time.sleep(seconds)
        os.kill(os.getpid(), signal.SIGKILL)  # it hangs in an exchange with one that is gone


def save_seconds(environment: Mapping[str, str] = os.environ) -> float:
    """How long a stage that is asked to stop may save (DIT_SAVE_SECONDS). Raises ValueError where that is no number."""
    text = environment.get("DIT_SAVE_SECONDS", "")
    try:
        seconds = float(text or SAVE_SECONDS)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds <= threading.TIMEOUT_MAX / 2:
        raise ValueError(f"DIT_SAVE_SECONDS must be a number of seconds above 0, got {text!r}")
    return seconds


def deadline(run: "RunConfig", environment: Mapping[str, str] = os.environ) -> float | None:
    """When this work must be over (Unix time): `run.time_limit_minutes` after its start, or at the end of a Slurm job."""
    ends = []
    if run.time_limit_minutes:
        ends.append(float(environment.get(STARTED, _began)) + 60 * run.time_limit_minutes)
    if environment.get("SLURM_JOB_END_TIME", "").isdecimal():
        ends.append(float(environment["SLURM_JOB_END_TIME"]))
    return min(ends, default=None)


@dataclass(frozen=True)
class Deadline:
    """A moment (Unix time) by which all must be saved; None = there is none."""

    at: float | None

    def near(self, save_seconds: float = 0.0) -> bool:
        """Whether it is time to stop, where saving takes so long."""
        return (
            self.at is not None and time.time() + save_seconds + min(END_SECONDS, 0.1 * (self.at - _began)) >= self.at
        )


def _start(team: Team, patience: float) -> "subprocess.Popen[bytes]":
    """torchrun, which ends when this process is killed in whatever way (on Linux; elsewhere its ranks do)."""
    from dit.runtime import tell_tpu_hosts

    tell_tpu_hosts()
    told = {
        **{LAUNCHED: team.id, LAUNCHER: str(os.getpid()), STARTED: str(_began)},
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(math.ceil(patience)),
        # Else all tries of a launch share one store, where the second finds at which ports the first one listened.
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),  # torchrun sets it too, and says so at length
    }
    # Loaded before the fork: between fork and exec nothing may be imported or locked.
    prctl, launcher = ctypes.CDLL(None).prctl if sys.platform == "linux" else None, os.getpid()

    def end_with_launcher() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        if os.getppid() != launcher:
            os._exit(1)

    return subprocess.Popen(
        team.command(program()),
        env={**os.environ, **told},
        start_new_session=True,  # a Ctrl-C at the terminal is the launcher's to pass on
        preexec_fn=end_with_launcher if prctl else None,
    )


class _Ranks:
    """The processes that torchrun started, also those that it has left behind."""

    def __init__(self, torchrun: int):
        import psutil

        self._psutil, self._torchrun, self._seen = psutil, psutil.Process(torchrun), {}

    def look(self) -> bool:
        """Whether there are new ones since the last look."""
        try:
            found = {process.pid: process for process in self._torchrun.children()}
        except self._psutil.Error:
            return False
        fresh = found.keys() - self._seen.keys()
        self._seen |= found
        return bool(fresh)

    def alive(self) -> list[Any]:
        left = []
        for process in self._seen.values():
            try:
                if process.is_running() and process.status() != self._psutil.STATUS_ZOMBIE:
                    left.append(process)
            except self._psutil.Error:
                pass
        return left

    def send(self, number: int) -> int:
        """How many got it."""
        alive = self.alive()
        for process in alive:
            try:
                process.send_signal(number)
            except self._psutil.Error:
                pass
        return len(alive)

    def end(self, patience: float) -> None:
        """Let those that torchrun left behind save, and see to it that they are gone."""
        self.send(signal.SIGTERM)
        until = time.monotonic() + patience
        while self.alive():
            if time.monotonic() > until:
                self.send(signal.SIGKILL)
            time.sleep(POLL_SECONDS)
