"""The first task of a run: what it will do and cost, or why it should not be begun (see `dit.preflight`)."""

from pathlib import Path

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.states import Completed, Failed, State

from dit import entry, preflight
from flows.workplace import Workplace


@task(
    name="preflight",
    task_run_name="preflight",
    description="What the run will do and cost, and what can't end well.",
    cache_policy=NO_CACHE,
    persist_result=False,
)
def _preflight(root: Path, push: bool, device: str | None, elsewhere: bool, anyway: bool, stale: list[str]) -> State:
    log = get_run_logger()
    try:
        told = preflight.ask(root, device=device, push=push, elsewhere=elsewhere)
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


def look_ahead(place: Workplace, device: str | None, elsewhere: bool, anyway: bool) -> list[str] | None:
    """The stages that are not up to date, once the run's line is told; None where the run's commit has no preflight.

    Args:
        device: what the work will run on, one of `dit.estimate`'s names; None: this machine.
        elsewhere: it is another machine, whose files are its own business.
        anyway: go on whatever speaks against it.

    Raises ValueError, a line for each fault.
    """
    if anyway or elsewhere:
        place.environment[entry.ANYWAY] = "1"  # the check within `scan` looks at the same files once more
    if not (place.root / "dit" / "preflight.py").is_file():
        return None
    stale: list[str] = []
    state = _preflight(place.root, place.push, device, elsewhere, anyway, stale, return_state=True)
    if not state.is_completed():
        raise ValueError(state.message)
    return stale
