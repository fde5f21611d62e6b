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
import shlex
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from dit import cli, locks
from flows import deploy, leash, lost, servers, services, workers
from flows.services import Service

TYPED = ("flows.train_dit", "flows.retrain", "flows.study")  # flows that a person may start in a terminal
END_FLOW_SECONDS = 9.0  # what a flow needs to end beyond its stage's time to save


def up(root: Path, say: Callable[[str], None] = print, gpus_per_run: int | None = None) -> None:
    """Start what doesn't run yet: servers, work pools, deployments, automations, workers. What runs is used.

    A run whose process is gone, of an earlier day or of a machine that went down, starts again where it stopped.
    Raises ValueError with the reason if something can't start; what this call had started is ended then.

    Args:
        gpus_per_run: how this machine's GPUs are shared out, see `workers`; None: as they are, else all for one run.
    """
    leash.save_seconds()  # a worker hands it to its flows: refused here, not there
    workers.shares(workers.gpus(), gpus_per_run)
    wanted = deploy.plan(root)
    began, folder = time.monotonic(), servers.folder_of(root)
    with locks.held(folder / "lock", say, "another `up` or `down`"):
        started: list[Service] = []
        shares = workers.wanted(folder, gpus_per_run)
        try:
            found = servers.ensure(root, servers.NAMES, started, say)
            prefect, environment = found["prefect"], servers.environment(root, found)
            deployed, recipe = folder / "deployed", _recipe(root, wanted, prefect)
            stale = not deployed.exists() or deployed.read_text() != recipe
            if stale:
                _settings(environment)
                deploy.prepare(root, wanted, say, ours=True)
            staffed = {workers.pool(worker) for worker in workers.running(folder)}
            for name in lost.settle(prefect, folder, staffed):
                say(f"ended before its time: {name}")
            begun = workers.start(root, environment, shares, started)
            if stale:
                deploy.deploy(root, wanted, lambda line: None, prune=True)
                deployed.write_text(recipe)
            for worker, since in begun:
                servers.wait_until(lambda w=worker, s=since: workers.online(prefect, w, s), worker, folder)
        except BaseException:
            for service in reversed(started):
                services.end(folder, service)
            raise
        pointed = servers.point_here(root, prefect)
    seconds = time.monotonic() - began
    say(f"started in {seconds:.0f} s" if started else "everything runs already")
    _report(root, found, pointed, say)


def down(root: Path, say: Callable[[str], None] = print) -> None:
    """End this checkout's servers, whoever started them (`up`, or a flow in a terminal), its workers and their flows.

    A stage may save, and a worker's flow goes on at the next `up`; to end one for good, cancel it before. Raises
    ValueError, and ends nothing, while a flow in a terminal uses the server: without it, that one could not go on.
    """
    folder = servers.folder_of(root)
    if not folder.exists():
        say("nothing to end")
        return
    with locks.held(folder / "lock", say, "another `up` or `down`"):
        if (prefect := services.find(folder, "prefect")) and (typed := _typed(root, prefect)):
            raise ValueError(f"{' and '.join(typed)} uses the server: end it first (Ctrl-C lets its stage save)")
        ours = workers.running(folder)
        for worker in ours:  # first: they would start again what ends now
            lost.end_worker(folder, worker)
        ended = [f"{count} running flow(s)"] if (count := _end_flows(folder, say)) else []
        ended += [worker.name for worker in ours]
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
    found |= {worker.name: worker for worker in workers.running(folder)}
    healthy = True
    for name, service in found.items():
        answers = service is not None and (service.port is None or servers.answers(service))
        healthy = healthy and answers
        where = f"{service.url}, process {service.pid}" if service and service.port else ""
        where = where or (f"process {service.pid}" if service else "does not run")
        if service and name.startswith("worker-gpu"):
            where += f", GPU {','.join(workers.share_of(service))}"
        say(f"{name:13} {where}" + (", no answer" if service and not answers else ""))
    if shares := workers.divided(folder):
        say(f"pool gpu      {workers.told(shares)}")
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


def _recipe(root: Path, wanted: list[dict[str, Any]], prefect: Service) -> str:
    """What deployments and automations follow from: the plan, the flows' code, notifications, the server."""
    files = [*sorted((root / "flows").glob("*.py")), root / "dvc.yaml"]  # whose stages the forms offer
    code = b"".join(file.read_bytes() for file in files)
    named = {"block_documents": {"name": {"any_": [deploy.NOTIFY_BLOCK]}}}
    blocks = [(one["id"], one["block_type"]["slug"]) for one in servers.ask(prefect, "block_documents/filter", named)]
    presets = sorted(file.name for file in (root / "presets").glob("*.yaml"))
    told = json.dumps([wanted, presets, sorted(blocks), str(prefect), str(root.resolve())], sort_keys=True)
    return hashlib.sha256(code + told.encode()).hexdigest()


def _report(root: Path, found: dict[str, Service], pointed: bool, say: Callable[[str], None]) -> None:
    prefect = found["prefect"]
    flows = {one["id"]: one["name"] for one in servers.ask(prefect, "flows/filter")}
    say(f"Prefect      {prefect.url}")
    say(f"MLflow       {found['mlflow'].url}")
    folder = servers.folder_of(root)
    if shares := workers.divided(folder):
        say(f"pool gpu     {workers.told(shares)} (shared out otherwise: dit down; dit up --gpus-per-run N)")
    pools = {workers.pool(worker) for worker in workers.running(folder)}
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


def _typed(root: Path, prefect: Service) -> list[str]:
    """The flows that run in terminals and talk to this server, in words for a person."""
    found = []
    for process in psutil.process_iter():
        try:
            words = process.cmdline()
            module = words[words.index("-m") + 1] if "-m" in words[:-1] else ""
            if module not in TYPED or Path(process.cwd()) != root.resolve():
                continue
            if process.environ().get("PREFECT_API_URL", f"{prefect.url}/api") == f"{prefect.url}/api":
                found.append(f"process {process.pid} ({' '.join(words[words.index('-m') :])[:80]})")
        except psutil.Error:
            pass  # another user's, or gone
    return found


def main(arguments: list[str] | None = None) -> int:
    """Returns 0; 1 if something can't start, or (status) doesn't run."""
    parser = argparse.ArgumentParser(prog="python -m flows.local", description=__doc__)
    parser.add_argument("what", choices=["up", "down", "status", "deploy"])
    parser.add_argument("--kubernetes", action="store_true", help="deploy: also the work pools of infra/work_pools")
    parser.add_argument("--gpus-per-run", type=int, metavar="N", help="up: share this machine's GPUs out, N to a run")
    chosen, root = parser.parse_args(arguments), Path.cwd()
    what = chosen.what
    try:
        if what == "status":
            return 0 if status(root) else 1
        if what == "deploy":
            deploy.deploy_all(root, kubernetes=chosen.kubernetes)
        elif what == "up":
            up(root, gpus_per_run=chosen.gpus_per_run)
        else:
            down(root)
    except ValueError as error:
        cli.complain(error)
        return 1
    except KeyboardInterrupt:
        cli.complain("interrupted")
        return 130
    except BrokenPipeError:  # `dit status | head`
        sys.stderr.close()
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
