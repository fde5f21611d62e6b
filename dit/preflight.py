"""Preflight: what a run will do and cost, in one line, and what can't end well, before anything is booked or begun.

A flow asks by `ask`, which runs `dit check --json` in the run's own worktree: the code there may be another than the
flow's, and the flow's process imports no torch. A person types `dit check`. What is stale DVC says, and nobody else.
"""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dit import reach
from dit.paths import Paths, write_json
from dit.pipeline import ACCELERATED, STAGES
from dit.progress import clock
from dit.staleness import stale_stages

if TYPE_CHECKING:
    from dit.estimate import Device
    from dit.expectations import Machine

LARGE_BYTES = 16e9  # of latents, which lie in memory while the network trains
HOW_ANYWAY = "start it all the same with --anyway (a deployment: -p anyway=true)"
DEVICE = "DIT_DEVICE"  # the variable in which a work pool tells its jobs the accelerator, as in estimate.DEVICES
RECORD = "preflight.json"  # in scratch/: what the run's last preflight said


@dataclass(frozen=True)
class Preflight:
    """What a run will do. Hours, bytes and price are estimates; None where nobody knows."""

    line: str
    faults: list[str]  # why it can't end well; `refuse` raises them
    warnings: list[str]
    stages: list[str] = field(default_factory=list)  # to run, in the order of the pipeline
    images: int | None = None
    steps: int = 0  # of training
    hours: float | None = None
    hours_of: dict[str, float] = field(default_factory=dict)  # each stage's
    memory_bytes: int = 0  # of one device, to train and to draw
    device: str = ""
    devices: int = 1
    price_usd_per_hour: float | None = None  # US dollars, of one device: an assumption; None for a CPU
    price_usd: float | None = None  # of the stages that use the accelerator

    def dump(self) -> str:
        """As JSON, for `load`."""
        return json.dumps(asdict(self))

    @classmethod
    def load(cls, text: str) -> "Preflight":
        """What `dump` wrote, perhaps by another version of this code: what this one does not know is left out."""
        told, known = json.loads(text), {each.name for each in fields(cls)}
        return cls(**{name: value for name, value in told.items() if name in known})


def refuse(told: Preflight, anyway: bool = False) -> None:
    """Raise ValueError, a line for each fault, unless the run is to begin anyway."""
    if told.faults and not anyway:
        raise ValueError("\n".join([*told.faults, HOW_ANYWAY]))


def ask(
    root: Path,
    *,
    stale: Sequence[str] | None = None,
    device: str | None = None,
    devices: int | None = None,
    push: bool = True,
    elsewhere: bool = False,
) -> Preflight:
    """The preflight of the worktree `root`, by its own code, kept in its scratch/preflight.json.

    The arguments are those of `preflight`. Raises ValueError, a line for each fault, where the settings themselves are
    wrong: that no `anyway` helps.
    """
    words = [sys.executable, "-m", "dit.cli", "check", "--json"]
    words += ["--device", device] if device else []
    words += ["--devices", str(devices)] if devices else []
    words += ["--stale", ",".join(stale)] if stale is not None else []
    words += [*([] if push else ["--no-push"]), *(["--elsewhere"] if elsewhere else [])]
    outside = {name: value for name, value in os.environ.items() if name not in ("DVC_STAGE", "PYTHONSAFEPATH")}
    done = subprocess.run(words, cwd=root, env=outside, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"dit check ended with {done.returncode}"]
        lines = [line.removeprefix("dit: ") for line in lines if line.startswith("dit: ")] or lines[-1:]
        raise ValueError("\n".join(lines))
    told = Preflight.load(done.stdout.strip().splitlines()[-1])
    write_json(Paths(root).scratch / RECORD, asdict(told))
    return told


def checked(
    paths: Paths,
    *,
    stale: Sequence[str] | None = None,
    device: str | None = None,
    devices: int | None = None,
    push: bool = True,
    elsewhere: bool = False,
) -> Preflight:
    """The preflight of params.yaml as it stands; what is stale is asked of DVC where it is not given.

    `devices` is run.processes, or one, of a `device` that is named, and else what a stage would use of this machine.
    Raises ValueError, a line for each fault, where the settings themselves are wrong.
    """
    if devices is not None and devices < 1:
        raise ValueError(f"--devices must be at least 1, got {devices}")
    with ThreadPoolExecutor(1) as beside:  # while torch is imported
        asked = beside.submit(stale_stages, paths.root) if stale is None else None
        from dit import check

        sections = check.check(paths, files=False)
        stale = asked.result() if asked else stale
    if unknown := set(stale or ()) - set(STAGES):
        raise ValueError(f"--stale: no stage {', '.join(sorted(unknown))}: choose among {', '.join(STAGES)}")
    run = sections["run"]
    devices = devices or (run.processes or 1 if device or elsewhere else _used(run))
    return preflight(sections, paths, stale=stale, device=device, devices=devices, push=push, elsewhere=elsewhere)


def _used(run: Any) -> int:
    """How many accelerators of this machine a stage that is shared will use."""
    from dit.runtime import accelerators

    try:
        kind, count = accelerators(run.device)
    except ValueError:  # which the preflight says itself
        return run.processes or 1
    return 1 if kind == "cpu" else min(run.processes, count) or count


def preflight(
    sections: dict[str, Any],
    paths: Paths,
    *,
    stale: Sequence[str] | None,
    device: "Device | str | None" = None,
    devices: int = 1,
    push: bool = True,
    elsewhere: bool = False,
) -> Preflight:
    """What these settings, valid and fitting together, will do on `devices` devices.

    Args:
        stale: the stages to run; None: nobody knows, so all are counted.
        device: one of estimate.DEVICES or its name, or `cpu`; None: what this machine has (and run.device asks for), or
            `elsewhere` nobody knows what, and then time, price and memory are not judged.
        push: whether the results go to the DVC remote, so that it must answer.
        elsewhere: the device is another machine's, which may have weights and a disk that are not seen from here.

    Raises ValueError for a device that nobody knows.
    """
    with ThreadPoolExecutor(1) as beside:
        remote = beside.submit(reach.remote, paths.root) if push else None
        answer = remote.result if remote else lambda: []
        return _preflight(sections, paths, stale, device, devices, elsewhere, answer)


def _preflight(
    sections: dict[str, Any],
    paths: Paths,
    stale: Sequence[str] | None,
    device: "Device | str | None",
    devices: int,
    elsewhere: bool,
    remote: Callable[[], list[str]],
) -> Preflight:
    from dit import capacity, check, workload
    from dit.estimate import Device
    from dit.latentshards import MEMORY_SHARE

    data, vae, train, run = (sections[name] for name in ("data", "vae", "train", "run"))
    faults, warnings = [], []
    unknown = elsewhere and device is None
    named = os.environ.get(DEVICE, "")
    machine, price_usd_per_hour = (None, None) if unknown else capacity.machine_of(device, run, faults, named=named)
    todo = [name for name in STAGES if stale is None or name in stale]
    alone = set(check.conflicts(sections))
    missing = [fault for fault in check.conflicts(sections, paths.root) if fault not in alone]
    missing += reach.autoencoder(vae.pretrained, paths) if "vae" in todo else []
    (warnings if elsewhere else faults).extend(missing)
    images, told = reach.source(data, paths, faults)
    if "train" in todo and train.init_from:
        faults += reach.registered_model(train.init_from, paths)
    network = workload.network_of(sections, check.latent_factor(vae, paths.root), paths.artifacts)
    network["batch_size"] = min(network["batch_size"], -(-train.global_batch_size // devices))
    network["shared_by"] = workload.sharing(network, run.parallel, devices, machine)
    cores = os.cpu_count() or 1
    hours_of, count = {}, images or 0
    own = device if isinstance(device, Device) else None
    fast = machine and workload.speeds(machine, train.precision, capacity.threads(run), own)
    if fast:
        pretrained = reach.autoencoder_config(vae.pretrained, paths)
        seconds = workload.seconds(sections, network, count, fast, vae=pretrained, devices=devices, cores=cores)
        hours_of = {name: seconds[name] / 3600 for name in todo}
    hours = sum(hours_of.values()) if fast else None
    price = None
    if price_usd_per_hour is not None and fast:
        price = sum(hours_of.get(name, 0) for name in ACCELERATED) * devices * price_usd_per_hour
    asked = {name: size for name, size in workload.memory(sections, network).items() if name in todo}
    latents = workload.latents_bytes(sections, network, count) if "train" in asked else 0
    on_cpu = machine is not None and machine.device == "cpu"
    share = MEMORY_SHARE * machine.memory_bytes if on_cpu else 0
    latents = latents if latents <= {"memory": math.inf, "auto": share}.get(run.latents, 0) else 0  # read as needed
    if "train" in todo:
        capacity.weigh_devices(train, run, machine, devices, faults)
    if on_cpu:
        capacity.weigh_time(hours or 0, machine, faults, warnings)
        asked |= {"train": asked["train"] + latents} if "train" in asked else {}
    elif latents > LARGE_BYTES:
        warnings.append(f"train: the latents take {latents / 1e9:.0f} GB of the machine's own memory")
    if machine is not None:
        capacity.weigh_memory(asked, sections, network, machine, devices, faults, warnings)
    room = reach.room(paths.root, workload.disk_bytes(sections, network, count), ["shard"] if elsewhere else todo)
    faults, warnings = faults + room[0], warnings + room[1]
    result = Preflight(
        line="", faults=faults + remote(), warnings=warnings, stages=todo, images=images,
        steps=train.max_steps if "train" in todo else 0, hours=hours, hours_of=hours_of,
        memory_bytes=max(asked.values(), default=0), device=machine.name if machine else "", devices=devices,
        price_usd_per_hour=price_usd_per_hour, price_usd=price,
    )  # fmt: skip
    return replace(result, line=describe(result, stale is not None, told, train.global_batch_size, machine))


def describe(told: Preflight, known: bool, images: str, batch: int, machine: "Machine | None") -> str:
    """A preflight in one line; `known`: DVC said which stages are stale; `images`: their number, in words."""
    from dit.capacity import size_of
    from dit.estimate import PRICES_OF

    if known and not set(told.stages) - {"scan", "register"}:
        return f"nothing is stale: only what always runs will ({', '.join(told.stages) or 'no stage'}); {images}"
    what = f"{len(told.stages)} of {len(STAGES)} stages to run"
    if not known:
        what += " (DVC can't say what is stale, so all are counted)"
    elif len(told.stages) < len(STAGES):
        what += f" ({', '.join(told.stages)})"
    parts = [images, *([f"{told.steps:,} steps of {batch}"] if told.steps else [])]
    if machine is None:
        memory = f"{size_of(told.memory_bytes)} of a device's memory, " if told.memory_bytes else ""
        unknown = "which device it will run on is not known, so time, price and memory are not judged"
        return f"{what}: {', '.join(parts)}, {memory}{unknown}"
    name = machine.name if machine.device == "cpu" else f"{told.devices} x {machine.name}"
    if told.hours is None:
        parts.append(f"how long on {name} is not known")
    else:
        longest = max(told.hours_of, key=told.hours_of.__getitem__)
        most = f"{longest} {clock(3600 * told.hours_of[longest])}"
        parts.append(f"about {clock(3600 * told.hours)} on {name} ({most})")
    if told.memory_bytes:
        parts.append(f"{size_of(told.memory_bytes)} of its {size_of(machine.memory_bytes)} of memory")
    if told.price_usd is not None:
        price = f"{told.price_usd:,.2f}" if told.price_usd < 100 else f"{told.price_usd:,.0f}"
        parts.append(f"US$ {price} at {told.price_usd_per_hour:.2f} an hour (assumed, {PRICES_OF})")
    return f"{what}: {', '.join(parts)}"
