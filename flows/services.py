"""A background service of this checkout: started, found again, ended; never another's.

What runs is written down in `scratch/local/NAME.json`. A process counts as ours if its number *and* its start time are
those written down: numbers are used again. Every process below it carries the folder's path in its environment, by
which also those are found whose parent was killed.
"""

import contextlib
import errno
import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from dit.paths import write_json

MARK = "DIT_LOCAL"


@dataclass(frozen=True)
class Service:
    """A process as written down. `started`: ticks since boot (Linux), elsewhere seconds since 1970."""

    name: str
    pid: int
    started: float
    port: int | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


def start(
    folder: Path, name: str, command: list[str], environment: Mapping[str, str], cwd: Path, port: int | None = None
) -> Service:
    """Start a service that survives this process and its terminal; its output goes to `folder/NAME.log`."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{name}.log").open("wb") as log:
        process = subprocess.Popen(
            command,
            cwd=cwd,
            env={**environment, MARK: str(folder.resolve())},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    process.returncode = 0  # nobody waits for it: not a leak to warn about
    service = Service(name, process.pid, _started(process.pid) or 0, port)
    write_json(folder / f"{name}.json", asdict(service))
    return service


def find(folder: Path, name: str) -> Service | None:
    """The service if it runs; what is written down about one that is gone is removed."""
    file = folder / f"{name}.json"
    try:
        service = Service(**json.loads(file.read_text()))
    except (OSError, ValueError, TypeError):
        return None
    if runs(service):
        return service
    file.unlink(missing_ok=True)
    return None


def runs(service: Service) -> bool:
    """Whether this very process runs (and not another with its number)."""
    return _started(service.pid) == service.started


def end(folder: Path, service: Service, patience_seconds: float = 10.0) -> None:
    """End a service and its process group: SIGTERM, then SIGKILL."""
    for number, seconds in ((signal.SIGTERM, patience_seconds), (signal.SIGKILL, 5.0)):
        if not runs(service):
            break
        try:
            os.killpg(service.pid, number)  # it leads a group of its own, which has its number
        except ProcessLookupError:
            break
        wait_gone([service.pid], seconds)
    (folder / f"{service.name}.json").unlink(missing_ok=True)


def marked(folder: Path) -> dict[int, dict[str, str]]:
    """All running processes that were started by or below a service of this folder, with their environments."""
    mark, found = str(folder.resolve()), {}
    for process in psutil.process_iter():
        try:
            environment = process.environ()
            if environment.get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found[process.pid] = environment
        except psutil.Error:
            pass  # another user's, or gone
    found.pop(os.getpid(), None)
    return found


def signal_each(pids: list[int], number: int) -> None:
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            pass


def wait_gone(pids: list[int], seconds: float) -> list[int]:
    """Wait until these processes are gone; returns those that are not."""
    deadline = time.monotonic() + seconds
    while (left := [pid for pid in pids if _started(pid) is not None]) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left


def end_orphans(folder: Path, port: int) -> None:
    """End what a killed service of this folder left listening on a port: its own child, that nobody looks after now."""
    ours = marked(folder)
    with contextlib.suppress(psutil.Error):
        listening = {
            c.pid for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN and c.laddr.port == port
        }
        orphans = [pid for pid in listening if pid in ours]
        signal_each(orphans, signal.SIGKILL)
        wait_gone(orphans, 5)


def holder(port: int) -> str | None:
    """Who listens on a port of this machine: None if nobody does, else words for a person."""
    with socket.socket() as probe:
        # Without it, connections that a server just closed would make its port look taken for a minute.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
            return None
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                return f"the system ({error.strerror})"
    try:
        for connection in psutil.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port and connection.pid:
                words = " ".join(" ".join(psutil.Process(connection.pid).cmdline()).split())
                return f"process {connection.pid} ({words[:80]})"
    except psutil.Error:
        pass
    return "another process"


def answers(url: str) -> bool:
    """Whether a GET of this address is answered with success."""
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=2) as reply:
            return reply.status < 400
    except (OSError, urllib.error.URLError):
        return False


def last_lines(folder: Path, name: str, count: int = 5) -> str:
    """The end of a service's log."""
    try:
        lines = (folder / f"{name}.log").read_text(errors="replace").strip().splitlines()
    except OSError:
        return ""
    return "\n".join(lines[-count:])


def _started(pid: int) -> float | None:
    """When a process began; None if there is none with this number (one that only awaits its parent is none)."""
    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return None
        if not psutil.LINUX:
            return process.create_time()
        # Not psutil's create_time: it shifts when the clock is set.
        return float(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (psutil.Error, OSError):
        return None
