"""`python -m flows.local up | down | status`: servers, deployments and a worker on this machine, for this checkout.

PREFECT_PORT and MLFLOW_PORT choose other ports than 4200 and 5000. DIT_SAVE_SECONDS, given to `up`, is how long a
stage that is ended may save (see `leash`). Logs are in `scratch/local`. While the servers run,
a `prefect.toml` in the checkout points `prefect` commands typed in this folder at them.
"""

import argparse
import hashlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil

from flows import leash, servers, services, turns
from flows.services import Service

POOLS = {"local": "runs on this machine, one at a time", "gpu": "runs that need a GPU"}
WORKERS = tuple(f"worker-{pool}" for pool in POOLS)
END_FLOW_SECONDS = 9.0  # what a flow needs to end beyond its stage's time to save
_RUN_ID = "PREFECT__FLOW_RUN_ID"


def up(root: Path, say: Callable[[str], None] = print) -> None:
    """Start what doesn't run yet: servers, work pools, deployments, workers. What runs is used.

    Raises ValueError with the reason if something can't start; what this call had started is ended then.
    """
    if not (root / "prefect.yaml").exists():
        raise ValueError(f"no prefect.yaml in {root.resolve()}: run in the project's folder")
    leash.save_seconds()  # a worker hands it to its flows: refused here, not there
    began, folder = time.monotonic(), servers.folder_of(root)
    with turns.turn(folder, "lock", "another `up` or `down`", say):
        started: list[Service] = []
        try:
            found = servers.ensure(root, servers.NAMES, started, say)
            environment = servers.environment(root, found)
            deployed, recipe = folder / "deployed", _recipe(root, found["prefect"])
            stale = not deployed.exists() or deployed.read_text() != recipe
            if stale:
                _make_pools(root, environment)
            workers = _start_workers(root, environment, started)
            if stale:
                _deploy(root, environment)
                deployed.write_text(recipe)
            for worker, since in workers:
                servers.wait_until(lambda w=worker, s=since: _online(found["prefect"], w, s), worker, folder)
        except BaseException:
            for service in reversed(started):
                services.end(folder, service)
            raise
        pointed = servers.point_here(root, found["prefect"])
    seconds = time.monotonic() - began
    say(f"started in {seconds:.0f} s" if started else "everything runs already")
    _report(root, found, pointed, say)


def down(root: Path, say: Callable[[str], None] = print) -> None:
    """End exactly what `up` started: the workers' flows first (a stage may save), then workers and servers."""
    folder = servers.folder_of(root)
    if not folder.exists():
        say("nothing to end")
        return
    with turns.turn(folder, "lock", "another `up` or `down`", say):
        ended = [f"{count} running flow(s)"] if (count := _end_flows(folder, say)) else []
        for name in (*WORKERS, *reversed(servers.NAMES)):
            if service := services.find(folder, name):
                services.end(folder, service)
                ended.append(name)
        if left := list(services.marked(folder)):
            services.signal_each(left, signal.SIGKILL)
            services.wait_gone(left, 5)
            ended.append(f"{len(left)} process(es) of theirs")
        servers.point_away(root)
    say(f"ended {', '.join(ended)}" if ended else "nothing to end")


def status(root: Path, say: Callable[[str], None] = print) -> bool:
    """Say what runs; true if both servers and the local worker do."""
    folder = servers.folder_of(root)
    found = {name: services.find(folder, name) for name in (*servers.NAMES, *WORKERS)}
    for name, service in found.items():
        if service and service.port:
            say(f"{name:13} {service.url}, process {service.pid}{'' if servers.answers(service) else ', no answer'}")
        elif service or name != "worker-gpu":
            say(f"{name:13} {f'process {service.pid}' if service else 'does not run'}")
    if flows := _flows(folder):
        say(f"{len(flows)} flow(s) running")
    return all(found[name] for name in (*servers.NAMES, "worker-local"))


def _make_pools(root: Path, environment: dict[str, str]) -> None:
    """The work pools of prefect.yaml. They know where the checkout lies; the deployments don't."""
    os.environ.update(environment)  # before Prefect, which reads it when it is imported
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import WorkPoolCreate
    from prefect.workers.process import ProcessWorker

    template = ProcessWorker.get_default_base_job_template()
    template["variables"]["properties"]["working_dir"]["default"] = str(root.resolve())
    with get_client(sync_client=True) as client:
        for name, description in POOLS.items():
            pool = WorkPoolCreate(name=name, type="process", description=description, base_job_template=template)
            client.create_work_pool(pool, overwrite=True)


def _start_workers(root: Path, environment: dict[str, str], started: list[Service]) -> list[tuple[Service, float]]:
    """Start the missing workers; returns each with the time of its start."""
    folder, new = servers.folder_of(root), []
    for pool, name in zip(POOLS, WORKERS, strict=True):
        if services.find(folder, name) or (pool == "gpu" and not Path("/dev/nvidia0").exists()):
            continue
        # One run at a time: further ones wait on the server, as "Late". Not a limit of the pool: there, a run whose
        # process was killed would keep its place.
        words = ["worker", "start", "--pool", pool, "--type", "process", "--limit", "1", "--name", pool]
        since = time.time()
        worker = services.start(folder, name, [sys.executable, "-m", "prefect", *words], environment, root)
        started.append(worker)
        new.append((worker, since))
    return new


def _recipe(root: Path, prefect: Service) -> str:
    """What the deployments follow from: prefect.yaml, the flow's parameters, and the server that knows them."""
    files = b"".join((root / file).read_bytes() for file in ("prefect.yaml", "flows/train_dit.py"))
    return hashlib.sha256(files + f"{prefect}{root.resolve()}".encode()).hexdigest()


def _deploy(root: Path, environment: dict[str, str]) -> None:
    words = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"]
    deploy = subprocess.run(words, cwd=root, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    (servers.folder_of(root) / "deploy.log").write_text(deploy.stdout + deploy.stderr)
    if deploy.returncode != 0:
        raise ValueError(f"the deployments of prefect.yaml were refused:\n{(deploy.stderr or deploy.stdout).strip()}")


def _online(prefect: Service, worker: Service, since: float) -> bool:
    pool = worker.name.removeprefix("worker-")
    seen = _ask(prefect, f"work_pools/{pool}/workers/filter")
    return any(datetime.fromisoformat(one["last_heartbeat_time"]).timestamp() >= since for one in seen)


def _report(root: Path, found: dict[str, Service], pointed: bool, say: Callable[[str], None]) -> None:
    prefect, flows = found["prefect"], {one["id"]: one["name"] for one in _ask(found["prefect"], "flows/filter")}
    say(f"Prefect      {prefect.url}")
    say(f"MLflow       {found['mlflow'].url}")
    for one in sorted(_ask(prefect, "deployments/filter"), key=lambda one: one["name"]):
        pool = one["work_pool_name"]
        served = services.find(servers.folder_of(root), f"worker-{pool}")
        say(f"deployment   {flows[one['flow_id']]}/{one['name']}" + ("" if served else f" (no worker for pool {pool})"))
    command = os.path.relpath(Path(sys.executable).with_name("prefect"))
    command = str(Path(sys.executable).with_name("prefect")) if command.startswith("..") else command
    say(f"run one      {shlex.quote(command)} deployment run train-dit/digits --watch")
    where = "in another folder" if pointed else "first (the prefect.toml here is not ours)"
    say(f"{where}: export PREFECT_API_URL={prefect.url}/api")


def _ask(prefect: Service, path: str) -> list[dict[str, Any]]:
    request = urllib.request.Request(
        f"{prefect.url}/api/{path}", data=b"{}", headers={"Content-Type": "application/json"}, method="POST"
    )
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=10) as reply:
        return json.loads(reply.read())


def _flows(folder: Path) -> list[int]:
    """The flows' own processes, those included whose worker was killed; not what they started."""
    ours = {pid for pid, environment in services.marked(folder).items() if _RUN_ID in environment}
    return [pid for pid in ours if _parent(pid) not in ours]


def _parent(pid: int) -> int | None:
    try:
        return psutil.Process(pid).ppid()
    except psutil.Error:
        return None


def _end_flows(folder: Path, say: Callable[[str], None]) -> int:
    """End the flows and whatever they started; a stage may save. Returns how many there were."""
    if flows := _flows(folder):
        below = {pid: its for pid, its in services.marked(folder).items() if _RUN_ID in its}
        patience = max(map(leash.save_seconds, below.values()), default=0.0)
        say(f"ending {len(flows)} running flow(s): a stage may save, up to {patience:g} s")
        # The flows alone: each ends what is below it in the right order.
        services.signal_each(flows, signal.SIGTERM)
        services.signal_each(services.wait_gone(list(below), patience + END_FLOW_SECONDS), signal.SIGKILL)
    return len(flows)


def main(arguments: list[str] | None = None) -> int:
    """Returns 0; 1 if something can't start, or (status) doesn't run."""
    parser = argparse.ArgumentParser(prog="python -m flows.local", description=__doc__)
    parser.add_argument("what", choices=["up", "down", "status"])
    what, root = parser.parse_args(arguments).what, Path.cwd()
    try:
        if what == "status":
            return 0 if status(root) else 1
        (up if what == "up" else down)(root)
    except ValueError as error:
        print(f"{what}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{what}: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
