"""The first task of a run: what it will do and cost, or why it should not be begun (see `dit.preflight`)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.states import Completed, Failed, State

from dit import entry, preflight
from flows.placement import Devices
from flows.workplace import Workplace


@task(
    name="preflight",
    task_run_name="preflight",
    description="What the run will do and cost, and what can't end well.",
    cache_policy=NO_CACHE,
    persist_result=False,
)
def _preflight(root: Path, anyway: bool, stale: list[str], asked: dict[str, Any]) -> State:
    log = get_run_logger()
    try:
        told = preflight.ask(root, **asked)
        log.info(told.line)
        for warning in told.warnings:
            log.warning(warning)
        preflight.refuse(told, anyway)
    except ValueError as error:
        return Failed(message=str(error))
    for fault in told.faults:
        log.warning("%s (started anyway)", fault)
    stale += told.stages
    return Completed(message=told.line)


def look_ahead(place: Workplace, device: Devices | None, elsewhere: bool, anyway: bool) -> list[str] | None:
    """The stages that are not up to date, once the run's line is told; None where the run's commit has no preflight.

    Args:
        device: what the work will run on; None: this machine, or nobody knows what of another.
        elsewhere: it is another machine, whose files are its own business.
        anyway: go on whatever speaks against it.

    Raises ValueError, a line for each fault.
    """
    if anyway or elsewhere:
        place.environment[entry.ANYWAY] = "1"  # the check within `scan` looks at the same files once more
    if not (place.root / "dit" / "preflight.py").is_file():
        return None
    stale: list[str] = []
    asked = {"push": place.push, "elsewhere": elsewhere} | of_devices(device, place.params.get("run") or {})
    state = _preflight(place.root, anyway, stale, asked, return_state=True)
    if not state.is_completed():
        raise ValueError(state.message)
    return stale


def of_devices(device: Devices | None, run: Mapping[str, Any]) -> dict[str, Any]:
    """What `preflight.ask` is to know of the devices that a pool gives; `run` is that section of params.yaml."""
    if device is None:
        return {}
    count, processes = device.count, run.get("processes")
    if count and processes and not device.hosts:  # several hosts' own settings tell how many they start
        count = min(count, processes)
    told = {"device": device.name, "devices": count}
    return told if device.name else told | {"elsewhere": True}  # whatever it is, it is not what is seen from here
