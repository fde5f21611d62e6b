"""The workers of a checkout: one of the pool `local`, and one of the pool `gpu` for each share of this machine's GPUs.

A run of the pool `gpu` has its worker's GPUs, and a stage uses all that it sees. By default they are one share: one run
at a time, on all of them. `dit up --gpus-per-run N` makes shares of N, for many small runs beside each other.
"""

import os
import re
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path

import psutil

from flows import servers, services
from flows.services import Service

RUNS_AT_ONCE = 4  # by the local worker, beside those that wait for the end of what they have started on GPUs
VISIBLE = "CUDA_VISIBLE_DEVICES"
Share = tuple[str, ...]  # GPUs, as CUDA_VISIBLE_DEVICES names them


def gpus() -> Share:
    """The GPUs that runs may have: those that CUDA_VISIBLE_DEVICES names, else all of this machine."""
    if (chosen := os.environ.get(VISIBLE)) is not None:
        return tuple(name for part in chosen.split(",") if (name := part.strip()) not in ("", "-1"))
    found = [file for file in Path("/dev").glob("nvidia*") if re.fullmatch(r"nvidia\d+", file.name)]
    return tuple(map(str, range(len(found))))  # not the files' numbers: in a container CUDA counts from 0 all the same


def shares(found: Share, per_run: int | None = None) -> list[Share]:
    """These GPUs in shares of `per_run`; None: all in one. Raises ValueError where that can't be."""
    if per_run is None:
        return [found] if found else []
    if not found:
        raise ValueError(f"--gpus-per-run: there is no GPU here{f', by {VISIBLE}' if VISIBLE in os.environ else ''}")
    ways = [count for count in range(1, len(found) + 1) if len(found) % count == 0]
    if per_run not in ways:
        raise ValueError(
            f"--gpus-per-run must divide the {len(found)} GPU(s) here: {', '.join(map(str, ways))}; got {per_run}"
        )
    return [found[first : first + per_run] for first in range(0, len(found), per_run)]


def running(folder: Path) -> list[Service]:
    """The workers that run here."""
    files = sorted(folder.glob("worker-*.json"))
    return [worker for file in files if (worker := services.find(folder, file.stem))]


def pool(worker: Service) -> str:
    return worker.name.split("-")[1]


def share_of(worker: Service) -> Share:
    """The GPUs that a worker of the pool `gpu` hands to its run."""
    try:
        return tuple(psutil.Process(worker.pid).environ().get(VISIBLE, "").split(","))
    except psutil.Error:  # it ended just now
        return ()


def divided(folder: Path) -> list[Share]:
    """The shares of the workers that run."""
    return [share for worker in running(folder) if pool(worker) == "gpu" and (share := share_of(worker))]


def wanted(folder: Path, per_run: int | None = None) -> list[Share]:
    """The shares that are to have a worker: as asked for, else as those that run have them, else all GPUs in one.

    Raises ValueError where the workers that run have others: their runs hold those GPUs.
    """
    found, now = gpus(), divided(folder)
    if now and per_run is None:
        like = [one for one in now if len(found) % len(one) == 0]
        all_of = shares(found, len(like[0])) if found and like else []
        return all_of if set(now) <= set(all_of) else now
    asked = shares(found, per_run)
    if set(now) - set(asked):
        raise ValueError(f"the workers that run have {told(now)}: `dit down` first, then --gpus-per-run {per_run}")
    return asked


def told(now: Sequence[Share]) -> str:
    """`8 GPUs for one run at a time`, `2 GPUs for each of 4 runs at a time`."""
    each = " or ".join(str(size) for size in sorted({len(share) for share in now}))
    gpus = "GPU" if each == "1" else "GPUs"
    return f"{each} {gpus} for {'one run' if len(now) == 1 else f'each of {len(now)} runs'} at a time"


def start(
    root: Path, environment: Mapping[str, str], gpu_shares: Sequence[Share], begun: list[Service]
) -> list[tuple[Service, float]]:
    """Start the missing workers, one for `local` and one for each share; returns each with the time of its start.

    They are appended to `begun`, one by one.
    """
    folder, new = servers.folder_of(root), []
    # Each share's worker takes one run at a time: further ones wait on the server, as "Late". Not a limit of the pool:
    # there, a run whose process was killed would keep its place.
    named = {"worker-local": (RUNS_AT_ONCE + len(gpu_shares), {})}
    named |= {f"worker-gpu-{one[0].replace('/', '_')}": (1, {VISIBLE: ",".join(one)}) for one in gpu_shares}
    for name, (limit, own) in named.items():
        if services.find(folder, name):
            continue
        since = time.time()
        worker = services.start(folder, name, _command(name, limit), {**environment, **own}, root)
        begun.append(worker)
        new.append((worker, since))
    return new


def online(prefect: Service, worker: Service, since: float) -> bool:
    """Whether the server has heard of a worker since then."""
    seen = servers.ask(prefect, f"work_pools/{pool(worker)}/workers/filter")
    its = [one for one in seen if one["name"] == worker.name]
    return any(datetime.fromisoformat(one["last_heartbeat_time"]).timestamp() >= since for one in its)


def _command(name: str, limit: int) -> list[str]:
    words = ["--pool", name.split("-")[1], "--type", "process", "--limit", str(limit), "--name", name]
    return [sys.executable, "-m", "prefect", "worker", "start", *words]
