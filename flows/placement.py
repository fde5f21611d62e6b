"""Where the work is done: here, or, from the stage on that needs an accelerator, by one job on another work pool.

Two hops at most. The first run prepares (scan, shard, preflight), so that nothing is booked for what is not stale; the
second, of the deployment `train-dit/on-<pool>`, goes on with the same branch. A pool of this very checkout shares its
cache; for any other, what was prepared is pushed to the DVC remote, and the branch to the git remote.
"""

import json
import os
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from httpx import TransportError
from prefect import get_run_logger
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun, WorkerStatus
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError
from prefect.runtime import flow_run
from prefect.states import Cancelling, Completed, Failed, State

from dit.preflight import DEVICE
from flows import manifests, remotes
from flows.workplace import Workplace

ASK_EVERY_SECONDS = 2.0
COMES_BACK_SECONDS = 1800.0  # a crashed run is started again by an automation (see `automations`); later, it is lost
Where = Literal["here", "beside", "elsewhere"]


def where(pool: str | None, home: Path) -> Where:
    """Where a work pool's jobs run: without one in this process; `beside` it, in this checkout; or elsewhere.

    Raises ValueError where there is no such pool.
    """
    if not pool:
        return "here"
    found = _pool(pool)
    folder = _defaults(found.base_job_template).get("working_dir")
    beside = found.type == "process" and folder and Path(folder).resolve() == home.resolve()
    return "beside" if beside else "elsewhere"


@dataclass(frozen=True)
class Devices:
    """What the stages of the accelerator get: so many of what estimate.DEVICES calls `name`; None: not known."""

    name: str | None
    count: int | None
    hosts: int = 0  # of their own, which hold that many together; 0: they run where the flow does


def device_of(pool: str | None, root: Path = Path("."), environment: Mapping[str, str] = os.environ) -> Devices | None:
    """The devices that a pool's jobs get, as it and the deployment `train-dit/on-<pool>` say; without a pool, those of
    the hosts that this job gives to stages (DIT_HOSTS, see `manifests`). None: whatever the machine has.

    Raises ValueError where there is no such pool, or the hosts' settings in `root` are wrong.
    """
    if not pool:
        return _of_hosts(root, environment)
    template, changed = _pool(pool).base_job_template, {}
    with get_client(sync_client=True) as client, suppress(ObjectNotFound):  # which `start` tells of
        changed = client.read_deployment_by_name(_runner(pool)).job_variables or {}
    return given_by(template, root, changed)


def given_by(template: Mapping[str, Any], root: Path, changed: Mapping[str, Any] | None = None) -> Devices | None:
    """The devices of jobs of this base job template, some of whose variables are `changed`; None: it says nothing."""
    told = _defaults(template) | dict(changed or {})
    environment = {manifests.HOSTS: str(told.get("hosts") or ""), DEVICE: told.get("device") or ""}
    if given := _of_hosts(root, environment | (told.get("env") or {})):
        return given
    without = "hosts" in told and "accelerators" not in told  # kubernetes-cpu: its `device` is that of hosts
    return None if without or not told.get("device") else Devices(told["device"], told.get("accelerators"))


def _of_hosts(root: Path, environment: Mapping[str, str]) -> Devices | None:
    if (wanted := manifests.wanted(root, environment)) is None:
        return None
    hosts, each = wanted
    if not each.accelerators:
        return Devices(None, None, hosts)
    processes = each.processes if isinstance(each.processes, int) else each.accelerators
    return Devices(environment.get(DEVICE) or None, hosts * processes, hosts)


def require_remotes(place: Workplace, pool: str) -> None:
    """Raise ValueError where other machines could not get at what is prepared here."""
    wanted = f"the jobs of pool {pool} run on other machines, and get"
    if not place.push:
        raise ValueError(f"{wanted} what is prepared here through the DVC remote: leave push on")
    if place.remote is None:
        raise ValueError(f"{wanted} what is prepared here through a DVC remote: dvc remote add -d NAME s3://...")
    if not remotes.committed(place.root):
        raise ValueError(
            f"the DVC remote {place.remote} is not committed, and other machines see what is: git commit .dvc/config"
        )
    if remotes.git_remote(place.home) is None:
        raise ValueError(f"{wanted} their settings through a git remote: git remote add origin URL")


def require_worker(pool: str, at: Where, anyway: bool) -> None:
    """Raise ValueError where no worker looks after a pool, since a run handed over would wait for ever."""
    with get_client(sync_client=True) as client:
        found = client.read_workers_for_work_pool(pool)
    if anyway or any(worker.status == WorkerStatus.ONLINE for worker in found):
        return
    way = "`dit up` starts one where it finds a GPU" if at == "beside" else f"prefect worker start --pool {pool}"
    raise ValueError(f"pool: no worker looks after {pool}, so what needs an accelerator would wait for ever: {way}")


def hand_over(place: Workplace, pool: str, at: Where, force: list[str], anyway: bool) -> State:
    """Have the rest of a run done by a job of the pool, wait for its end, and end as it does.

    A run that is started again finds the job that it has started. A cancelled one cancels it. Raises ValueError.
    """
    log = get_run_logger()
    if at == "elsewhere":
        if place.unpushed:
            raise ValueError(f"what was prepared could not be pushed to the DVC remote: {place.unpushed}")
        remotes.push_branch(place.home, place.branch)
    name = _runner(pool)
    job = None
    try:
        job = start(name, {"branch": place.branch, "force": force, "anyway": anyway, "push": place.push})
        log.info("prepared; the rest is done by %s, run %r, which waits for a place in pool %s", name, job.name, pool)
        state = wait(job.id)
    except BaseException:
        if job is not None:
            cancel([job])
        raise
    if at == "elsewhere":
        remotes.fetch_branch(place.home, place.branch)
        remotes.fetch_history(place.home)
    told = f"{name}, run {job.name!r}: {state.message}"
    return Completed(message=told) if state.is_completed() else Failed(name=state.name, message=told)


def _pool(name: str):
    with get_client(sync_client=True) as client:
        try:
            return client.read_work_pool(name)
        except ObjectNotFound:
            raise ValueError(f"pool: the Prefect server knows no work pool {name!r}: `dit deploy` makes them") from None


def _defaults(template: Mapping[str, Any]) -> dict[str, Any]:
    """The variables that have a value unless a deployment gives another."""
    properties = template.get("variables", {}).get("properties", {})
    return {name: about["default"] for name, about in properties.items() if "default" in about}


def _runner(pool: str) -> str:
    return f"train-dit/on-{pool}"


def start(name: str, parameters: dict):
    """Start a run of a deployment, or find the one that this run has started so. Raises ValueError."""
    try:
        return run_deployment(
            name,
            parameters=parameters,
            timeout=0,  # wait below, where the wait can be interrupted
            as_subflow=True,
            idempotency_key=f"{flow_run.id}-{json.dumps(parameters, sort_keys=True)}",
        )
    except ObjectNotFound:
        raise ValueError(f"the Prefect server knows no deployment {name}: `dit deploy` makes it") from None


def wait(run_id) -> State:
    """Wait for the end of a run, whatever it is, and for its restart where it crashed.

    A server that does not answer is asked again: the run needs it as little as a training does.
    """
    crashed = None
    with get_client(sync_client=True) as client:
        while True:
            try:
                state = client.read_flow_run(run_id).state
            except (TransportError, PrefectHTTPStatusError):
                state = None
            crashed = (crashed or time.monotonic()) if state and state.is_crashed() else None
            lost = crashed is not None and time.monotonic() - crashed > COMES_BACK_SECONDS
            if state is not None and (lost or (state.is_final() and not state.is_crashed())):
                return state
            time.sleep(ASK_EVERY_SECONDS)


def cancel(jobs: Iterable[FlowRun]) -> None:
    """Cancel what this run has started, since it ends before its time.

    Unless it will be started again: a deployment's run that nobody cancelled (its worker or machine goes down) finds
    its jobs then, and would find them cancelled.
    """
    log = get_run_logger()
    with get_client(sync_client=True) as client:
        own = client.read_flow_run(flow_run.id)
        if own.deployment_id is not None and not (own.state and own.state.is_cancelling()):
            return
        for job in jobs:
            if not client.read_flow_run(job.id).state.is_final():
                client.set_flow_run_state(job.id, Cancelling())
                log.info("cancelling %r too", job.name)
