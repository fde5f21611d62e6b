"""The flow `train-dit`: DVC's DAG as one Prefect run, a task per stage.

On a worker: `prefect deployment run train-dit/digits --watch` (see `flows.local`). In this process:
`python -m flows.train_dit --preset smoke`, for which a local server is started if none runs.
"""

import argparse
import os
import signal
import sys
from datetime import datetime
from pathlib import Path

from prefect import flow, get_run_logger, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.runtime import flow_run
from prefect.states import Completed, Failed, State

from dit import presets
from dit.config import read_params
from flows import dag, leash, summary, turns


def run_name() -> str:
    """Preset and minute: what tells one run from another in a list."""
    return f"{flow_run.parameters.get('preset') or _preset_in_params()} {datetime.now():%d %b %H:%M:%S}"


# Called in the flow's own thread (not submitted): only there a cancellation reaches the stage at once, and it saves.
@task(
    name="stage",
    task_run_name="{name}",
    description="One DVC stage.",
    cache_policy=NO_CACHE,  # DVC is the cache
    persist_result=False,
)
def run_stage(name: str, force: bool, hold: int) -> State:
    """One stage by DVC. A State tells the outcome: Completed, Cached, Interrupted (a failure: run again), Failed."""
    environment = {"DIT_FLOW_RUN_ID": str(flow_run.id)}
    say = get_run_logger().info
    result = dag.run_stage(name, Path.cwd(), say, force=force, environment=environment, hold=hold)
    took = f"{result.seconds:.1f} s"
    match result.status:
        case "ran":
            return Completed(message=took)
        case "cached":
            return Completed(name="Cached", message=f"nothing to do, {took}")
        case "interrupted":
            return Failed(name="Interrupted", message=result.message)
        case "failed":
            return Failed(message=result.message)


@flow(name="train-dit", flow_run_name=run_name, persist_result=False)
def train_dit(preset: str | None = None, force: list[str] | None = None) -> State:
    """Train and evaluate a diffusion transformer: brings every stage of dvc.yaml up to date.

    Args:
        preset: settings to put into params.yaml first, a file in presets/; empty: params.yaml as it stands.
        force: stages to run although nothing changed.
    """
    log = get_run_logger()
    root = Path.cwd()
    with turns.turn(root / "scratch" / "lock", "flow", f"train-dit run {flow_run.name!r}", log.info) as hold:
        try:
            stages = plan(root, preset, force or [])
        except ValueError as error:
            return Failed(message=str(error))  # raised, it would be told with a traceback
        if preset:
            _apply(preset, root)
        log.info("%d stages: %s", len(stages), ", ".join(stages))
        states: dict[str, State] = {}
        for name, needs in stages.items():
            states[name] = run_stage(
                name, name in (force or []), hold, return_state=True, wait_for=[states[need] for need in needs]
            )
            if not states[name].is_completed():
                return Failed(name=states[name].name, message=f"stage {name}: {states[name].message}")
        described = {name: f"{state.name}, {state.message}" for name, state in states.items()}
        create_markdown_artifact(
            key="train-dit",
            markdown=summary.markdown(root, preset or _preset_in_params(), described),
            description="metrics, registry decision and report",
        )
        cached = sum(state.name == "Cached" for state in states.values())
        return Completed(message=f"{len(states)} stages, {cached} of them cached")


def plan(root: Path, preset: str | None, force: list[str]) -> dict[str, tuple[str, ...]]:
    """The stages to walk; changes nothing. Raises ValueError where preset, params.yaml, force or dvc.yaml are wrong."""
    refuse(root, preset)
    stages = dag.stages(root)
    if not stages:
        raise ValueError(f"{root / 'dvc.yaml'} has no stages: run in the project's folder")
    if unknown := [name for name in force if name not in stages]:
        raise ValueError(f"force: no stage {', '.join(unknown)} in dvc.yaml: choose among {', '.join(stages)}")
    return stages


def refuse(root: Path, preset: str | None) -> None:
    """Raise ValueError for what can be seen to be wrong without asking DVC."""
    leash.save_seconds()
    if not (root / "dvc.yaml").exists():
        raise ValueError(f"no dvc.yaml in {root}: run in the project's folder")
    if preset:
        presets.resolve(preset, root / "presets")
    if not preset or (root / "params.yaml").exists():
        read_params(root / "params.yaml")


def _apply(preset: str, root: Path) -> None:
    log, params = get_run_logger(), root / "params.yaml"
    before = params.read_bytes() if params.exists() else None
    if not (difference := presets.apply(preset, params, write=False)):
        log.info("params.yaml holds preset %s already", preset)
        return
    if before is not None:
        kept = root / "scratch" / f"params.before-{Path(preset).stem}.{datetime.now():%Y%m%d-%H%M%S}.yaml"
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_bytes(before)
        log.info("the params.yaml so far is kept as %s", kept.relative_to(root))
    presets.apply(preset, params)
    log.info("preset %s put into params.yaml:\n%s", preset, difference)


def _preset_in_params() -> str:
    try:
        return str(read_params(Path("params.yaml")).get("preset", "params.yaml"))
    except ValueError:
        return "params.yaml"


def main(arguments: list[str] | None = None) -> int:
    """Run the flow in this process; returns 0 if it completed."""
    from prefect.context import refresh_global_settings_context
    from prefect.settings import get_current_settings

    from flows import servers

    parser = argparse.ArgumentParser(prog="python -m flows.train_dit", description=train_dit.description)
    parser.add_argument("--preset", help="settings to put into params.yaml first: a file in presets/")
    parser.add_argument("--force", action="append", default=[], metavar="STAGE", help="run it although nothing changed")
    chosen = parser.parse_args(arguments)
    try:
        # Before a server is started; the flow asks again, when it has waited for its turn.
        if chosen.force:
            plan(Path.cwd(), chosen.preset, chosen.force)
        else:  # without a question to DVC, which takes a second
            refuse(Path.cwd(), chosen.preset)
        os.environ.update(servers.for_this_process(Path.cwd(), get_current_settings().api.url))
    except ValueError as error:
        print(f"train-dit: {error}", file=sys.stderr)
        return 1
    refresh_global_settings_context()  # Prefect read the environment when it was imported
    try:
        state = train_dit(preset=chosen.preset, force=chosen.force or None, return_state=True)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return 0 if state.is_completed() else 1


if __name__ == "__main__":
    sys.exit(main())
