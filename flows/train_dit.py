"""The flow `train-dit`: DVC's DAG as one Prefect run, a task per stage, in a git worktree of its own.

On a worker: `prefect deployment run train-dit/digits --watch` (see `flows.local`). In this process:
`python -m flows.train_dit --preset smoke`, for which a local server is started if none runs.
"""

import logging
import sys
from collections.abc import Collection
from datetime import datetime
from pathlib import Path
from typing import Annotated, Literal

from prefect import flow, get_run_logger
from prefect.exceptions import FailedRun
from prefect.runtime import flow_run
from prefect.states import Completed, Failed, State
from pydantic import Field

from dit import presets, staleness
from dit.config import read_params
from dit.paths import Paths
from dit.pipeline import ACCELERATED
from flows import dag, events, forecast, placement, summary, terminal, walk, workplace
from flows.lost import RESTARTS
from flows.workplace import Wanted, Workplace

CHECKOUT = Path(__file__).parents[1]
PREPARE = ("scan", "shard")  # what needs no accelerator, and tells how much there is to do

# What Prefect's form offers, and its server accepts.
Preset = Literal[tuple(presets.names(CHECKOUT / "presets"))]
Stage = Literal[tuple(read_params(CHECKOUT / "dvc.yaml")["stages"])]
Override = Annotated[str, Field(pattern=r"^\w+(\.\w+)+=(.|\n)+$", examples=["train.max_steps=1000"])]


class _Told(logging.Filter):
    """Keeps Prefect from adding a traceback, of its own code, to a run that ended as Failed and has said why."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not (record.exc_info and isinstance(record.exc_info[1], FailedRun))


logging.getLogger("prefect.engine").addFilter(_Told())


def run_name() -> str:
    """Preset, what is set beside it, and the minute: what tells one run from another in a list."""
    told = flow_run.parameters
    wanted = Wanted(told.get("preset"), tuple(told.get("set") or ()), told.get("source"))
    label = (told.get("branch") or "").removeprefix("runs/") or workplace.preset_of(Path.cwd(), wanted)
    return " ".join([label, *wanted.overrides, f"{datetime.now():%d %b %H:%M:%S}"])[:200]


# Wrong parameters are told by us, in one line; Prefect would raise. The server checks those of deployments by the types.
@flow(name="train-dit", flow_run_name=run_name, persist_result=False, validate_parameters=False)
def train_dit(
    preset: Preset | None = None,
    set: list[Override] | None = None,  # noqa: A002 (the name on the form)
    force: list[Stage] | None = None,
    source: str | None = None,
    push: bool = True,
    pool: str | None = None,
    anyway: bool = False,
    branch: str | None = None,
) -> State:
    """Train and evaluate a diffusion transformer: brings every stage of dvc.yaml up to date, in a worktree of its own.

    Args:
        preset: settings, a file in presets/; empty: params.yaml as it is committed.
        set: single settings in their place, such as train.max_steps=1000.
        force: stages to run although nothing changed.
        source: other images: a folder, an archive, s3://bucket/prefix.
        push: give the results to the DVC remote, where one is configured.
        pool: the work pool of whatever needs an accelerator; empty: this one.
        anyway: start although the preflight says that it can't end well.
        branch: go on with this branch of another run, instead of a new one.
    """
    log = get_run_logger()
    try:
        wanted = Wanted(preset, tuple(set or ()), source)
        if (flow_run.run_count or 0) > RESTARTS + 1:
            raise ValueError(
                f"this run was started {flow_run.run_count} times and always lost: its machine needs a look"
            )
        with workplace.opened(Path.cwd(), str(flow_run.id), wanted, log.info, push=push, branch=branch) as place:
            at = placement.where(pool, place.home)
            state = work(place, force or [], anyway, pool, at)
        rest = [name for name in force or [] if name not in PREPARE]
        return placement.hand_over(place, pool, at, rest, anyway) if state is None else state
    except ValueError as error:
        return Failed(message=str(error))  # raised, it would be told with a traceback


def work(
    place: Workplace,
    force: list[str],
    anyway: bool,
    pool: str | None = None,
    at: placement.Where = "here",
    title: str = "train-dit",
    done: Collection[str] = (),
) -> State | None:
    """All stages but those `done` already; or, where an accelerator is on another pool and is needed, those that need
    none: then None.

    Raises ValueError for what a person has to change.
    """
    log = get_run_logger()
    stages = [name for name in plan(place.root, force) if name not in done]
    if at != "here":
        placement.require_worker(pool, at, anyway)
    if at == "elsewhere":
        placement.require_remotes(place, pool)
    device, states = placement.device_of(pool), {}
    try:
        forecast.look_ahead(place, device, at == "elsewhere", anyway)
        log.info("%d stages: %s", len(stages), ", ".join(stages))
        if at != "here":
            first = [name for name in stages if name in PREPARE]
            states |= walk.walk(place, first, force)
            staleness.restore(place.root, pull=place.remote is not None)  # what the run-cache has is not to do
            stale = forecast.look_ahead(place, device, at == "elsewhere", anyway)
            if stale is None or ACCELERATED & {*stale, *force}:
                place.keep("prepared")
                return None
            log.info("nothing is left that needs an accelerator")
        states |= walk.walk(place, [name for name in stages if name not in states], force)
    except walk.Stopped as stopped:
        states |= stopped.states
        summary.publish(place, title, states, str(stopped))
        place.keep(f"stopped at {stopped.stage}")
        return stopped.state
    place.keep("finished")
    place.succeeded()
    events.tell_champion(Paths(place.root))
    summary.publish(place, title, states)
    return finished(place, states)


def finished(place: Workplace, states: dict[str, State]) -> State:
    """How a run ends whose stages all completed."""
    cached = sum(state.name == "Cached" for state in states.values())
    told = (
        f"{len(states)} stages, {cached} of them cached; dit adopt {place.tree.id} brings the result into the checkout"
    )
    if place.unpushed and place.continued:
        return Failed(name="NotPushed", message=f"{told}; not pushed, so on this machine alone: {place.unpushed}")
    return Completed(message=told)


def plan(root: Path, force: list[str]) -> dict[str, tuple[str, ...]]:
    """The stages to walk; changes nothing. Raises ValueError where force or dvc.yaml are wrong."""
    stages = dag.stages(root)
    if not stages:
        raise ValueError(f"{root / 'dvc.yaml'} has no stages: run in the project's folder")
    if unknown := [name for name in force if name not in stages]:
        raise ValueError(f"force: no stage {', '.join(unknown)} in dvc.yaml: choose among {', '.join(stages)}")
    return stages


def main(arguments: list[str] | None = None) -> int:
    """Run the flow in this process; returns 0 if it completed."""
    parser = terminal.options(train_dit, "train_dit")
    parser.add_argument("--force", action="append", metavar="STAGE", help="run it although nothing changed")
    told = vars(parser.parse_args(arguments))
    return terminal.run(train_dit, told, lambda: plan(Path.cwd(), told["force"]) if told["force"] else None)


if __name__ == "__main__":
    sys.exit(main())
