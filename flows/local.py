"""`python -m flows.local up | down | status | deploy`: servers, deployments and workers of this checkout (`dit up` ...).

PREFECT_PORT and MLFLOW_PORT choose other ports than 4200 and 5000. DIT_SAVE_SECONDS, given to `up`, is how long a
stage that is ended may save (see `leash`). Logs are in `scratch/local`. While the servers run,
a `prefect.toml` in the checkout points `prefect` commands typed in this folder at them.
"""

import argparse
import contextlib
import hashlib
import json
import os
import re
import shlex
import signal
import sys
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

from dit import locks
from flows import deploy, leash, lost, servers, services
from flows.services import Service

RUNS_AT_ONCE = 4  # by the local worker: some of them only wait, for runs that they have started
END_FLOW_SECONDS = 9.0  # what a flow needs to end beyond its stage's time to save


def up(root: Path, say: Callable[[str], None] = print) -> None:
    """Start what doesn't run yet: servers, work pools, deployments, automations, workers. What runs is used.

    A run whose process is gone, of an earlier day or of a machine that went down, starts again where it stopped.
    Raises ValueError with the reason if something can't start; what this call had started is ended then.
    """
    leash.save_seconds()  # a worker hands it to its flows: refused here, not there
    wanted = deploy.plan(root)
    began, folder = time.monotonic(), servers.folder_of(root)
    with locks.held(folder / "lock", say, "another `up` or `down`"):
        started: list[Service] = []
        try:
            found = servers.ensure(root, servers.NAMES, started, say)
            prefect, environment = found["prefect"], servers.environment(root, found)
            deployed, recipe = folder / "deployed", _recipe(root, wanted, prefect)
            stale = not deployed.exists() or deployed.read_text() != recipe
            if stale:
                _settings(environment)
                deploy.prepare(root, wanted, say, ours=True)
            staffed = {_pool(worker) for worker in _workers(folder)}
            for name in lost.settle(prefect, folder, staffed):
                say(f"ended before its time: {name}")
            workers = _start_workers(root, environment, started)
            if stale:
                deploy.deploy(root, wanted, lambda line: None, prune=True)
                deployed.write_text(recipe)
            for worker, since in workers:
                servers.wait_until(lambda w=worker, s=since: _online(prefect, w, s), worker, folder)
        except BaseException:
            for service in reversed(started):
                services.end(folder, service)
            raise
        pointed = servers.point_here(root, prefect)
    seconds = time.monotonic() - began
    say(f"started in {seconds:.0f} s" if started else "everything runs already")
    _report(root, found, pointed, say)


def down(root: Path, say: Callable[[str], None] = print) -> None:
    """End exactly what `up` started: workers, their flows (a stage may save), servers.

    A flow that is ended so goes on at the next `up`; to end one for good, cancel it before.
    """
    folder = servers.folder_of(root)
    if not folder.exists():
        say("nothing to end")
        return
    with locks.held(folder / "lock", say, "another `up` or `down`"):
        workers = _workers(folder)
        for worker in workers:  # first: they would start again what ends now
            lost.end_worker(folder, worker)
        ended = [f"{count} running flow(s)"] if (count := _end_flows(folder, say)) else []
        ended += [worker.name for worker in workers]
        for name in reversed(servers.NAMES):
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
    found = {name: services.find(folder, name) for name in (*servers.NAMES, "worker-local")}
    found |= {worker.name: worker for worker in _workers(folder)}
    healthy = True
    for name, service in found.items():
        answers = service is not None and (service.port is None or servers.answers(service))
        healthy = healthy and answers
        where = f"{service.url}, process {service.pid}" if service and service.port else ""
        where = where or (f"process {service.pid}" if service else "does not run")
        say(f"{name:13} {where}" + (", no answer" if service and not answers else ""))
    if running := lost.flows(folder):
        say(f"{len(running)} flow(s) running")
    if found["prefect"]:
        with contextlib.suppress(OSError):
            _say_runs(found["prefect"], say)
    return healthy


def _say_runs(prefect: Service, say: Callable[[str], None]) -> None:
    ours = servers.ask(prefect, "deployments/filter")
    paused = [one["name"] for one in ours if one.get("paused")]
    say(f"{len(ours)} deployments" + (f", of which paused: {', '.join(paused)}" if paused else ""))
    late = servers.ask(prefect, "flow_runs/count", {"flow_runs": {"state": {"name": {"any_": ["Late"]}}}})
    if late:
        say(f"{late} run(s) late: they wait for a worker of their work pool")


def _settings(environment: dict[str, str]) -> None:
    """Point this process's Prefect at the server."""
    for name in [name for name in os.environ if name.startswith("PREFECT_") and name not in environment]:
        del os.environ[name]
    os.environ.update(environment)
    from prefect.context import refresh_global_settings_context

    refresh_global_settings_context()


def gpus() -> list[str]:
    """The accelerators that workers may hand out, as CUDA_VISIBLE_DEVICES names them."""
    if (chosen := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name for part in chosen.split(",") if (name := part.strip()) not in ("", "-1")]
    return sorted(
        (m[1] for file in Path("/dev").glob("nvidia*") if (m := re.fullmatch(r"nvidia(\d+)", file.name))), key=int
    )


def _workers(folder: Path) -> list[Service]:
    """The workers that run here."""
    files = sorted(folder.glob("worker-*.json"))
    return [worker for file in files if (worker := services.find(folder, file.stem))]


def _pool(worker: Service) -> str:
    return worker.name.split("-")[1]


def _start_workers(root: Path, environment: dict[str, str], started: list[Service]) -> list[tuple[Service, float]]:
    """Start the missing workers, one for `local` and one for each GPU; returns each with the time of its start."""
    folder, new = servers.folder_of(root), []
    # Each GPU's worker takes one run at a time: further ones wait on the server, as "Late". Not a limit of the pool:
    # there, a run whose process was killed would keep its place.
    wanted = {"worker-local": (RUNS_AT_ONCE, {})}
    wanted |= {f"worker-gpu-{gpu}": (1, {"CUDA_VISIBLE_DEVICES": gpu}) for gpu in gpus()}
    for name, (limit, own) in wanted.items():
        if services.find(folder, name):
            continue
        pool = name.split("-")[1]
        words = ["--pool", pool, "--type", "process", "--limit", str(limit), "--name", name]
        command, since = [sys.executable, "-m", "prefect", "worker", "start", *words], time.time()
        worker = services.start(folder, name, command, {**environment, **own}, root)
        started.append(worker)
        new.append((worker, since))
    return new


def _recipe(root: Path, wanted: list[dict[str, Any]], prefect: Service) -> str:
    """What deployments and automations follow from: the plan, the flows' code, notifications, the server."""
    files = [*sorted((root / "flows").glob("*.py")), root / "dvc.yaml"]  # whose stages the forms offer
    code = b"".join(file.read_bytes() for file in files)
    named = {"block_documents": {"name": {"any_": [deploy.NOTIFY_BLOCK]}}}
    blocks = [(one["id"], one["block_type"]["slug"]) for one in servers.ask(prefect, "block_documents/filter", named)]
    presets = sorted(file.name for file in (root / "presets").glob("*.yaml"))
    told = json.dumps([wanted, presets, sorted(blocks), str(prefect), str(root.resolve())], sort_keys=True)
    return hashlib.sha256(code + told.encode()).hexdigest()


def _online(prefect: Service, worker: Service, since: float) -> bool:
    seen = servers.ask(prefect, f"work_pools/{_pool(worker)}/workers/filter")
    its = [one for one in seen if one["name"] == worker.name]
    return any(datetime.fromisoformat(one["last_heartbeat_time"]).timestamp() >= since for one in its)


def _report(root: Path, found: dict[str, Service], pointed: bool, say: Callable[[str], None]) -> None:
    prefect = found["prefect"]
    flows = {one["id"]: one["name"] for one in servers.ask(prefect, "flows/filter")}
    say(f"Prefect      {prefect.url}")
    say(f"MLflow       {found['mlflow'].url}")
    pools = {_pool(worker) for worker in _workers(servers.folder_of(root))}
    for line in _deployments(servers.ask(prefect, "deployments/filter"), flows, pools):
        say(f"deployment   {line}")
    for name in lost.waiting(prefect):
        say(f"goes on      {name}")
    command = os.path.relpath(Path(sys.executable).with_name("prefect"))
    command = str(Path(sys.executable).with_name("prefect")) if command.startswith("..") else command
    say(f"run one      {shlex.quote(command)} deployment run train-dit/digits --watch")
    where = "in another folder" if pointed else "first (the prefect.toml here is not ours)"
    say(f"{where}: export PREFECT_API_URL={prefect.url}/api")


def _deployments(found: list[dict[str, Any]], flows: dict[str, str], staffed: set[str]) -> list[str]:
    """A line for each flow: its deployments' names; for each pool without a worker: what needs one."""
    by_flow: dict[str, list[str]] = {}
    idle: dict[str, list[str]] = {}
    for one in sorted(found, key=lambda one: one["name"]):
        name, pool = flows[one["flow_id"]], one["work_pool_name"]
        by_flow.setdefault(name, []).append(one["name"])
        for needed in {pool, (one["parameters"] or {}).get("pool")} - {None, *staffed}:
            idle.setdefault(needed, []).append(f"{name}/{one['name']}")
    lines = [f"{name}/{{{', '.join(names)}}}" for name, names in sorted(by_flow.items(), reverse=True)]
    return lines + [
        f"(no worker for pool {pool}: {', '.join(names)} would wait)" for pool, names in sorted(idle.items())
    ]


def _end_flows(folder: Path, say: Callable[[str], None]) -> int:
    """End the flows and whatever they started; a stage may save. Returns how many there were."""
    running = lost.flows(folder)
    if running:
        below = {pid: its for pid, its in services.marked(folder).items() if lost.RUN_ID in its}
        patience = max(map(leash.save_seconds, below.values()), default=0.0)
        say(f"ending {len(running)} running flow(s): a stage may save, up to {patience:g} s")
        # The flows alone: each ends what is below it in the right order.
        services.signal_each(list(running), signal.SIGTERM)
        services.signal_each(services.wait_gone(list(below), patience + END_FLOW_SECONDS), signal.SIGKILL)
        if prefect := services.find(folder, "prefect"):
            with contextlib.suppress(OSError):
                for name in lost.settle_ended(prefect, folder, set(running.values())):
                    say(f"goes on at the next `up`: {name}")
    return len(running)


def main(arguments: list[str] | None = None) -> int:
    """Returns 0; 1 if something can't start, or (status) doesn't run."""
    parser = argparse.ArgumentParser(prog="python -m flows.local", description=__doc__)
    parser.add_argument("what", choices=["up", "down", "status", "deploy"])
    parser.add_argument("--kubernetes", action="store_true", help="deploy: also the work pools of infra/work_pools")
    chosen, root = parser.parse_args(arguments), Path.cwd()
    what = chosen.what
    try:
        if what == "status":
            return 0 if status(root) else 1
        if what == "deploy":
            deploy.deploy_all(root, kubernetes=chosen.kubernetes)
        else:
            (up if what == "up" else down)(root)
    except ValueError as error:
        print(f"{what}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{what}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `dit status | head`
        sys.stderr.close()
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
