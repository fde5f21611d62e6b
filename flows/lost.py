"""Runs of this machine's work pools whose process is gone: the server is told, so that they start again or are over.

Prefect's server believes a run until somebody tells it otherwise. A worker does so for its own flows; where worker and
flow ended together (a machine that went down, a `kill -9`), nobody does for nine minutes (see `automations`).
"""

import os
import signal
from collections.abc import Set
from pathlib import Path
from typing import Any

import psutil

from flows import servers, services
from flows.pools import PROCESS_POOLS
from flows.services import Service

RUN_ID = "PREFECT__FLOW_RUN_ID"
RESTARTS = 5  # of one run, whatever killed it
AGAIN = "AwaitingRetry"  # Prefect's name of the state of what is to start again


def settle(prefect: Service, folder: Path, staffed: Set[str] = frozenset()) -> list[str]:
    """Tell the server of runs without a process, and have them started again; returns their names.

    They crashed (or are cancelled, where that was asked for); what never began is scheduled as it was. A pool that is
    `staffed` has a worker, which may be starting a run at this moment, and to which no run must come back at once: its
    crashed runs are left to the automation.
    """
    ours = services.marked(folder).items()
    # A stage that still saves is no sign of life: nobody is there to go on with. The run that comes back waits for it.
    alive = {its[RUN_ID] for pid, its in ours if RUN_ID in its and _is_flow(pid)}
    names = []
    for run in _runs(prefect, ("PENDING", "RUNNING", "CANCELLING")):
        kind, waits = run["state_type"], run["work_pool_name"] not in staffed
        if run["id"] in alive or (kind == "PENDING" and not waits):
            continue
        names.append(run["name"])
        if kind == "CANCELLING":
            _set(prefect, run, "CANCELLED", "its process is gone")
        elif kind == "PENDING":
            _set(prefect, run, "SCHEDULED", "its worker is gone")
        else:
            _set(prefect, run, "CRASHED", "its process is gone")
            if waits:
                _again(prefect, run)
    return names


def settle_ended(prefect: Service, folder: Path, ids: set[str]) -> list[str]:
    """As `settle`, for runs that were just ended and no worker is there for; returns the names of those that go on."""
    settle(prefect, folder)
    for run in _runs(prefect, ("CRASHED",), ids):
        _again(prefect, run)
    return waiting(prefect, ids)


def waiting(prefect: Service, ids: set[str] | None = None) -> list[str]:
    """The names of runs that crashed and will start again; of all, or of these."""
    found = _runs(prefect, ("SCHEDULED",), ids)
    return sorted(run["name"] for run in found if run["state_name"] == AGAIN)


def _again(prefect: Service, run: dict[str, Any]) -> None:
    if 1 <= run["run_count"] <= RESTARTS:  # one that never began would crash for ever
        _set(prefect, run, "SCHEDULED", "it crashed: a worker takes it up again where it stopped", AGAIN)


def _set(prefect: Service, run: dict[str, Any], kind: str, message: str, name: str | None = None) -> None:
    state = {"type": kind, "name": name, "message": message}
    servers.ask(prefect, f"flow_runs/{run['id']}/set_state", {"state": state})


def _runs(prefect: Service, kinds: tuple[str, ...], ids: set[str] | None = None) -> list[dict[str, Any]]:
    chosen = {"state": {"type": {"any_": list(kinds)}}} | ({"id": {"any_": sorted(ids)}} if ids is not None else {})
    pools = {"name": {"any_": list(PROCESS_POOLS)}}
    return servers.ask(prefect, "flow_runs/filter", {"flow_runs": chosen, "work_pools": pools})


def flows(folder: Path) -> dict[int, str]:
    """The flows' own processes, those included whose worker was killed, with their runs' ids; not what they started."""
    ours = {pid: its[RUN_ID] for pid, its in services.marked(folder).items() if RUN_ID in its}
    return {pid: run for pid, run in ours.items() if _parent(pid) not in ours}


def _is_flow(pid: int) -> bool:
    """Whether this is the process that a worker starts for a run, and nothing below it."""
    try:
        return "prefect.engine" in psutil.Process(pid).cmdline()
    except psutil.Error:
        return False


def _parent(pid: int) -> int | None:
    try:
        return psutil.Process(pid).ppid()
    except psutil.Error:
        return None


def end_worker(folder: Path, worker: Service) -> None:
    """End a worker at once and alone: it has nothing to save, and asked politely it kills its flows in its own way."""
    if services.runs(worker):
        os.kill(worker.pid, signal.SIGKILL)
        services.wait_gone([worker.pid], 5)
    services.end(folder, worker)
