"""The walk over DVC's stages as Prefect shows it: a task a stage, tried again where a machine and not a person is at fault."""

from collections.abc import Iterable, Sequence
from typing import Any

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.runtime import flow_run
from prefect.states import Completed, Failed, State

from dit import entry
from flows import dag, display, events, onhosts
from flows.workplace import Workplace

STAGE_RETRIES, RETRY_SECONDS = 3, 10.0  # where params.yaml's section `run` says nothing else
AGAIN = {"interrupted": "Interrupted", "lost": "Lost"}
SLOWER = 6.0  # each wait is so many times the one before


class Stopped(Exception):
    """A stage did not complete. `state` is the run's state that follows from it, `states` are those of all stages so far."""

    def __init__(self, stage: str, states: dict[str, State]):
        super().__init__(f"stage {stage}: {states[stage].message}")
        self.stage, self.states = stage, states
        self.state = Failed(name=states[stage].name, message=str(self))


# Called in the flow's own thread (not submitted): only there a cancellation reaches the stage at once, and it saves.
@task(
    name="stage",
    task_run_name="{name}",
    description="One DVC stage.",
    cache_policy=NO_CACHE,  # DVC is the cache
    persist_result=False,
)
def run_stage(name: str, place: Workplace, force: bool) -> State:
    """One stage by DVC. A State tells the outcome: Completed, Cached; Failed, or what another try may mend (AGAIN)."""
    log = get_run_logger()
    afresh = {entry.AFRESH: "1"} if force else {}
    with display.following(place.root, log.info) as environment:
        result = dag.run_stage(
            name,
            place.root,
            log.info,
            force=force,
            pull=place.remote is not None,
            environment={
                "DIT_FLOW_RUN_ID": str(flow_run.id),
                **place.environment,
                **afresh,
                **environment,
                **onhosts.shell(),
            },
            hold=place.hold,
        )
    events.emit(events.RUN_IDLE, events.run(str(flow_run.id)))
    took = f"{result.seconds:.1f} s"
    match result.status:
        case "ran":
            return Completed(message=took)
        case "cached":
            return Completed(name="Cached", message=f"nothing to do, {took}")
        case "failed":
            return Failed(message=result.message)
    return Failed(name=AGAIN[result.status], message=result.message)


def walk(place: Workplace, stages: Sequence[str], force: Iterable[str] = ()) -> dict[str, State]:
    """Bring these stages up to date, in their order; returns their states.

    A stage is forced once: a run that is started again does not begin anew what it has finished. Raises Stopped at the
    first that does not complete, whatever was tried.
    """
    tries, forced = _retries(place.params), place.root / "scratch" / "forced"
    states: dict[str, State] = {}
    for name in stages:
        afresh = name in force and not (forced / name).exists()
        states[name] = run_stage.with_options(**tries)(name, place, afresh, return_state=True)
        if not states[name].is_completed():
            raise Stopped(name, states)
        if afresh:
            forced.mkdir(parents=True, exist_ok=True)
            (forced / name).touch()
    return states


def _retries(params: dict[str, Any]) -> dict[str, Any]:
    run = params.get("run") or {}
    count, first = run.get("stage_retries", STAGE_RETRIES), run.get("retry_seconds", RETRY_SECONDS)
    waits = [first * SLOWER**number for number in range(count)]
    return {"retries": count, "retry_delay_seconds": waits, "retry_condition_fn": _worth_another_try}


def _worth_another_try(task: Any, run: Any, state: State) -> bool:
    return state.name in AGAIN.values()
