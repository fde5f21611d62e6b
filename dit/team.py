"""The processes that do one stage together, and the hosts they are on, as the environment tells of them."""

import re
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

JOIN_SECONDS = 1800  # hosts wait for each other


@dataclass(frozen=True)
class Team:
    """The processes that do a stage together, as seen from one host."""

    processes: int  # on this host
    restarts: int
    id: str  # the same on all hosts, and no other launch's
    hosts: int = 1
    host: int = 0  # this one's number
    address: str = "127.0.0.1"  # of host 0
    port: int = 0  # there; 0 = any that is free

    def command(self, program: list[str]) -> list[str]:
        """torchrun for this host's part of `program`."""
        return [
            *[sys.executable, "-m", "torch.distributed.run", "--nnodes", str(self.hosts)],
            *["--nproc-per-node", str(self.processes), "--max-restarts", str(self.restarts)],
            *["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{self.address}:{self.port}", "--rdzv-id", self.id],
            *["--rdzv-conf", f"is_host={int(self.host == 0)},join_timeout={JOIN_SECONDS}"],
            *["--local-addr", self.address if self.host == 0 else _way_to(self.address)],
            *program,
        ]


def hosts(environment: Mapping[str, str]) -> dict[str, Any] | None:
    """`hosts`, `host`, `address`, `port` and `id` of a Team, from torchrun's own variables or Slurm's; None: one host."""

    def said(*names: str) -> str:
        return next((environment[name] for name in names if environment.get(name)), "")

    def whole(*names: str) -> int:
        if not said(*names).isdecimal():
            raise ValueError(f"{names[-1]} must be a whole number where there are several hosts, got {said(*names)!r}")
        return int(said(*names))

    address, port = said("PET_MASTER_ADDR", "MASTER_ADDR"), said("PET_MASTER_PORT", "MASTER_PORT")
    # Of srun's own step: a batch script is told of all nodes of the job too, and runs on one.
    step = said("SLURM_STEP_NUM_NODES", "SLURM_NNODES") if said("SLURM_STEP_ID") else ""
    if address and said("PET_NNODES", "NNODES") not in ("", "1"):
        count, host = whole("PET_NNODES", "NNODES"), whole("PET_NODE_RANK", "NODE_RANK")
        free, id = 29500, f"{address}:{port}"
    elif step not in ("", "1"):
        count, host = whole("SLURM_STEP_NUM_NODES", "SLURM_NNODES"), whole("SLURM_NODEID")
        if (tasks := said("SLURM_STEP_NUM_TASKS")) not in ("", str(count)):
            raise ValueError(f"srun started {tasks} tasks on {count} nodes: start one on each (--ntasks-per-node=1)")
        address = address or _first_host(said("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST"))
        free = 15000 + whole("SLURM_JOB_ID") % 15000  # jobs may share a node
        id = ".".join(said(f"SLURM_{name}") for name in ("JOB_ID", "STEP_ID", "RESTART_COUNT"))
    else:
        return None
    if host >= count or not address:
        raise ValueError(
            f"this is host {host} of {count} at {address!r}: a number from 0, and the address of the first"
        )
    port = whole("PET_MASTER_PORT", "MASTER_PORT") if port else free
    return {"hosts": count, "host": host, "address": address, "port": port, "id": id}


def _first_host(nodes: str) -> str:
    """The first of Slurm's list of hosts: gpu007 of "gpu[007-009,012],cpu1"."""
    first = re.match(r"(?:\[[^\]]*\]|[^,\[])*", nodes)
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first[0])


def _way_to(address: str) -> str:
    """This host's own address on the way to another: what its name means elsewhere is not certain."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as way:
        try:
            way.connect((address, 9))  # nothing is sent
            return way.getsockname()[0]
        except OSError:
            return socket.gethostname()
