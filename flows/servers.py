"""The two servers of a checkout: how each is started, what they and their clients need in the environment.

Both listen on 127.0.0.1 only. Prefect's database and settings are in `scratch/local/prefect`: ~/.prefect is not
touched. MLflow's `mlflow.db` and `mlartifacts/` are the pipeline's own, which it also uses when no server runs.
"""

import contextlib
import json
import os
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dit import locks
from flows import services
from flows.services import Service

NAMES = ("prefect", "mlflow")
START_SECONDS = 120.0
_PORTS = {"prefect": 4200, "mlflow": 5000}
_HEALTH = {"prefect": "/api/health", "mlflow": "/health"}
_POINTER_HEAD = (
    "# Written by `make up`, removed by `make down`: in this folder `prefect` talks to this checkout's server.\n"
)


def folder_of(root: Path) -> Path:
    """Where everything local is written down."""
    return root / "scratch" / "local"


def ensure(
    root: Path, names: tuple[str, ...], started: list[Service], say: Callable[[str], None]
) -> dict[str, Service]:
    """These servers, answering; those that had to be started are appended to `started`.

    Raises ValueError where a port is somebody else's (nothing is started then) or a server doesn't come up.
    """
    folder = folder_of(root)
    found = {name: service for name in names if (service := services.find(folder, name))}
    ports = {name: _port(name) for name in names if name not in found}
    if len(set(ports.values())) < len(ports):
        raise ValueError(f"PREFECT_PORT and MLFLOW_PORT are both {next(iter(ports.values()))}: they must differ")
    for name, port in ports.items():
        services.end_orphans(folder, port)
        if who := services.holder(port):
            raise ValueError(f"port {port} is taken by {who}: end it, or choose another with {name.upper()}_PORT=...")
    if ports:
        say(f"starting {' and '.join(f'{name} on port {port}' for name, port in ports.items())} ...")
    # A stage that sets up the same fresh database at this moment holds this lock.
    database = locks.held(root / "scratch" / "lock" / "mlflow", say, "the start of MLflow's server")
    with database if "mlflow" in ports else contextlib.nullcontext():
        for name, port in ports.items():
            its_environment = environment(root, {name: Service(name, 0, 0, port)})
            found[name] = services.start(folder, name, _command(name, root, port), its_environment, root, port)
            started.append(found[name])
        for service in found.values():
            wait_until(lambda s=service: answers(s), service, folder)
    return found


def answers(server: Service) -> bool:
    """Whether a server is healthy."""
    return services.answers(server.url + _HEALTH[server.name])


def ask(prefect: Service, path: str, question: dict[str, Any] | None = None) -> Any:
    """What Prefect's server answers to a POST, without importing Prefect, which takes seconds. Raises OSError."""
    request = urllib.request.Request(
        f"{prefect.url}/api/{path}",
        data=json.dumps(question or {}).encode(),
        headers={"Content-Type": "application/json"},
        method="POST",
    )
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=10) as reply:
        return json.loads(reply.read())


def wait_until(ready: Callable[[], bool], service: Service, folder: Path) -> None:
    """Wait for a service that was started; raises ValueError with the end of its log if it ends or takes too long."""
    deadline = time.monotonic() + START_SECONDS
    while not ready():
        if not services.runs(service) or time.monotonic() > deadline:
            why = "ended at once" if not services.runs(service) else f"does not answer after {START_SECONDS:.0f} s"
            log = folder / f"{service.name}.log"
            raise ValueError(f"{service.name} {why}; {log} ends:\n{services.last_lines(folder, service.name)}")
        time.sleep(0.1)


def environment(root: Path, servers: dict[str, Service]) -> dict[str, str]:
    """The environment of servers, workers and flows: this interpreter first on PATH, nobody else's Prefect settings."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("PREFECT_") or k.startswith("PREFECT_LOGGING_")}
    wanted = kept | {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
        "PREFECT_HOME": str(folder_of(root).resolve() / "prefect"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_WORKER_QUERY_SECONDS": "2",  # of a server on this machine: a run need not wait up to 10 s
        "DO_NOT_TRACK": "true",
        "DVC_NO_ANALYTICS": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # it is eight processes and 2 GB
        "PYTHONUNBUFFERED": "1",
    }
    if "prefect" in servers:
        wanted["PREFECT_API_URL"] = f"{servers['prefect'].url}/api"
    if "mlflow" in servers:
        wanted["MLFLOW_TRACKING_URI"] = servers["mlflow"].url
    return wanted


def for_this_process(root: Path, configured: str | None, say: Callable[[str], None] = print) -> dict[str, str]:
    """What a flow in this process needs in its environment: a Prefect server, and MLflow's if it runs.

    A server that the person has chosen (`configured`) is used. Else this checkout's is, and started if need be; it
    stays, for the next run and for looking at this one.
    """
    folder = folder_of(root)
    if configured and configured != pointer(root):
        return {}
    with locks.held(folder / "lock", say, "another `up` or `down`"):
        started: list[Service] = []
        try:
            servers = ensure(root, ("prefect",), started, say)
        except BaseException:
            for service in started:
                services.end(folder, service)
            raise
        point_here(root, servers["prefect"])
    say(f"Prefect: {servers['prefect'].url}" + (" (it stays; `make down` ends it)" if started else ""))
    if (mlflow := services.find(folder, "mlflow")) and "MLFLOW_TRACKING_URI" not in os.environ:
        servers["mlflow"] = mlflow
    return {key: value for key, value in environment(root, servers).items() if os.environ.get(key) != value}


def point_here(root: Path, prefect: Service) -> bool:
    """Write `prefect.toml`, so that `prefect` typed in the checkout finds the server; false if a person's is there."""
    file = root / "prefect.toml"
    if file.exists() and pointer(root) is None:
        return False
    home = folder_of(root).resolve() / "prefect"
    settings = f'home = "{home}"\nprofiles_path = "{home}/profiles.toml"\n\n[api]\nurl = "{prefect.url}/api"\n'
    file.write_text(_POINTER_HEAD + settings)
    return True


def point_away(root: Path) -> None:
    """Remove `prefect.toml` if it is ours."""
    if pointer(root) is not None:
        (root / "prefect.toml").unlink()


def pointer(root: Path) -> str | None:
    """The address in our own prefect.toml; None if there is none, or a person's."""
    try:
        text = (root / "prefect.toml").read_text()
    except OSError:
        return None
    return text.rpartition('url = "')[2].partition('"')[0] if text.startswith(_POINTER_HEAD) else None


def _port(name: str) -> int:
    variable = f"{name.upper()}_PORT"
    text = os.environ.get(variable, "")
    if text and not (text.isdecimal() and 0 < int(text) < 65536):
        raise ValueError(f"{variable} must be a port number, got {text!r}")
    return int(text) if text else _PORTS[name]


def _command(name: str, root: Path, port: int) -> list[str]:
    if name == "prefect":
        return [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    root = root.resolve()
    return [
        *[sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"],
        *["--backend-store-uri", f"sqlite:///{root / 'mlflow.db'}"],
        # Artifacts are named by where they lie, not by this server's proxy: so they are found when it doesn't run too.
        *["--no-serve-artifacts", "--default-artifact-root", (root / "mlartifacts").as_uri()],
        *["--allowed-hosts", f"127.0.0.1:{port},localhost:{port}"],
    ]
