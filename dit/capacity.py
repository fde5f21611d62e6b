"""What the work will run on, and what is too much for it: weeks without an accelerator, more than its memory, a batch
that its devices can't share."""

import os
from dataclasses import replace
from typing import Any

from dit import expectations, workload
from dit.estimate import Device, device_named
from dit.expectations import Machine
from dit.progress import clock

WEEK_HOURS, DAY_HOURS = 7 * 24, 24


def machine_of(
    device: Device | str | None, run: Any, faults: list[str], *, named: str = ""
) -> tuple[Machine, float | None]:
    """What the work will run on (None: this machine), and what an hour of it costs where that is in the table.

    `named` is what this machine's accelerator is called where torch has no name for it. Raises ValueError for a device that nobody knows.
    """
    if isinstance(device, str) and device != "cpu":
        device = device_named(device)
    if isinstance(device, Device):
        return _accelerator(device)
    try:
        machine = expectations.look(device or run.device)
    except ValueError as error:  # run.device asks for what this machine lacks
        faults.append(str(error))
        machine = expectations.look()
    if machine.flops is not None:
        count = threads(run)
        return replace(machine, name=f"{count} CPU threads") if count > 1 else machine, None
    for name in (machine.name, named if machine.name == machine.device else ""):  # as "tpu"
        try:
            known = device_named(name)
        except ValueError:
            continue
        return (machine, known.price) if name == machine.name else _accelerator(known)
    return machine, None


def _accelerator(device: Device) -> tuple[Machine, float]:
    return Machine("accelerator", device.name, int(device.memory_bytes), None), device.price


def threads(run: Any) -> int:
    """Of a CPU, that one process may use."""
    return run.num_threads or os.cpu_count() or 1


def weigh_devices(train: Any, run: Any, machine: Machine | None, devices: int, faults: list[str]) -> None:
    """Whether so many devices can share a training."""
    size = train.global_batch_size
    if machine and machine.device != "cpu" and run.processes > devices:
        faults.append(f"run.processes: {run.processes} are more than the {devices} devices: set 0, for all of them")
    elif size % devices:
        fewer = max(count for count in range(1, devices) if size % count == 0)
        near = [str(batch) for batch in (size // devices * devices, -(-size // devices) * devices) if batch]
        faults.append(
            f"train.global_batch_size: {size} images are no whole number for each of {devices} devices: "
            f"set it to {' or '.join(near)}, or take {fewer} of them (run.processes)"
        )


def weigh_time(hours: float, machine: Machine, faults: list[str], warnings: list[str]) -> None:
    """Whether so many hours of a CPU are too many."""
    about = f"no accelerator, and the work takes about {clock(3600 * hours)} on {machine.name}"
    if hours > WEEK_HOURS:
        faults.append(f"{about}: run it where there is one, or take a smaller preset")
    elif hours > DAY_HOURS:
        warnings.append(about)


def weigh_memory(
    asked: dict[str, int],
    sections: dict[str, Any],
    network: dict[str, Any],
    machine: Machine,
    devices: int,
    faults: list[str],
    warnings: list[str],
) -> None:
    """Whether what training and drawing ask of one of the devices (bytes, by stage) is there."""
    have = machine.memory_bytes
    where = f"{'this machine' if machine.device == 'cpu' else machine.name} has {size_of(have)}"
    if (train := asked.get("train", 0)) > 0.9 * have:
        told = f"train: {network['batch_size']} images at a time take {size_of(train)}, and {where}"
        fixed = train - workload.memory(sections, network)["train"]
        most = workload.largest_training_batch(network, have - fixed)
        shared = network | {"shared_by": devices}
        way = f"set run.device_batch_size to {most} or less" if most else "take a smaller model or a larger device"
        if not most and workload.largest_training_batch(shared, have - fixed) and machine.device != "cpu":
            way = f"set run.parallel to fsdp, for the {devices} devices to share what each holds now"
        (faults if train > have else warnings).append(f"{told}: {way}")
    if (sample := asked.get("sample", 0)) > have:
        block = sections["sample"].block_images
        faults.append(f"sample.block_images: {block} at a time take {size_of(sample)}, and {where}: lower it")


def size_of(size: float) -> str:
    """Bytes as a person reads them: 45 GB, 2.3 GB, 17 MB."""
    return f"{size / 1e9:.0f} GB" if size >= 1e10 else f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.0f} MB"
