"""The flow `study`: one preset in several variants, each a run of `train-dit`; one table and one bubble chart.

All variants are validated before the first one runs, and what they share (scan, shard, latents, as far as their settings
agree) is made once. They run on workers, beside each other, where `train-dit/any` is deployed and a worker of its pool
is alive; else here, one after the other. A variant that fails leaves its reason in the table.

On a worker: `prefect deployment run study/digits-sizes`. In this process:
`python -m flows.study --preset digits --variant small model.hidden_size=64 --variant large model.hidden_size=192`.
"""

import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

from prefect import flow, get_run_logger
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import WorkerStatus
from prefect.exceptions import ObjectNotFound
from prefect.runtime import deployment, flow_run
from prefect.states import Completed, Failed, State

from flows import dag, findings, placement, terminal, train_dit, walk, workplace, worktrees
from flows.findings import Finding
from flows.train_dit import Override, Preset
from flows.workplace import Wanted

RUNNER = "train-dit/any"


def run_name() -> str:
    """The study's own name, or its preset's, how many variants it has, and the minute."""
    told = flow_run.parameters
    return f"{_title(told.get('preset'))}, {len(told.get('variants') or {})} variants {datetime.now():%d %b %H:%M:%S}"


@flow(name="study", flow_run_name=run_name, persist_result=False, validate_parameters=False)
def study(
    preset: Preset | None = None,
    variants: dict[str, list[Override]] | None = None,
    set: list[Override] | None = None,  # noqa: A002 (the name on the form)
    source: str | None = None,
    push: bool = True,
    pool: str | None = None,
    anyway: bool = False,
) -> State:
    """Train several variants of one preset, and show their figures beside each other: a table, and FID over Gflops.

    Args:
        preset: settings, a file in presets/; empty: params.yaml as it is committed.
        variants: a name for each, and the settings in which it differs: {"wide": ["model.hidden_size=192"]}.
        set: single settings of all variants, such as train.max_steps=1000.
        source: other images: a folder, an archive, s3://bucket/prefix.
        push: give the results to the DVC remote, where one is configured.
        pool: the work pool of whatever needs an accelerator; empty: this one.
        anyway: start although the preflight says that it can't end well.
    """
    log, home, run_id = get_run_logger(), Path.cwd(), str(flow_run.id)
    try:
        wanted = asked(preset, variants, set, source)
        found = findings.expect(home, run_id, wanted)
        for finding in found.values():
            log.info("%s: %.4g Gflops, %s parameters", finding.name, finding.gflops, f"{finding.parameters:,}")
        folder = home / "scratch" / "studies" / run_id[:8]
        how = {"push": push, "pool": pool, "anyway": anyway}
        if stopped := prepare(home, run_id, wanted, found, push, pool):
            return stopped
        runs = on_workers(wanted, how) if workers_wait() else one_by_one(wanted, how)
        for name, (variant_run, state) in runs:
            label = workplace.label_of(home, wanted[name])
            found[name] = findings.gather(home, found[name], _branch(home, variant_run, label), state)
            log.info("%s: %s", name, findings.line(found[name]))
            findings.publish(folder, _title(preset), list(found.values()))
        done = [finding for finding in found.values() if finding.figure is not None]
        told = f"{len(done)} of {len(found)} variants; {findings.best(done)}{folder.relative_to(home)}/study.png"
        return Completed(message=told) if len(done) == len(found) else Failed(name="Incomplete", message=told)
    except ValueError as error:
        return Failed(message=str(error))  # raised, it would be told with a traceback


def asked(
    preset: str | None, variants: Mapping[str, Sequence[str]] | None, alike: Sequence[str] | None, source: str | None
) -> dict[str, Wanted]:
    """What each variant's params.yaml becomes; `alike` are the settings of all. Raises ValueError for what can't be."""
    if not variants:
        raise ValueError('variants: there are none: give names and settings, {"wide": ["model.hidden_size=192"]}')
    return {name: Wanted(preset, (*(alike or ()), *more), source) for name, more in variants.items()}


def prepare(
    home: Path,
    run_id: str,
    wanted: Mapping[str, Wanted],
    found: Mapping[str, Finding],
    push: bool,
    pool: str | None,
) -> State | None:
    """Make once what all variants need alike, so that none of them waits for, or repeats, what another one does.

    Returns the state in which the study ends where that can't be had. Raises ValueError.
    """
    first, say = next(iter(wanted.values())), get_run_logger().info
    here = placement.where(pool, home) == "here"
    how = {"purpose": "study", "push": push, "key": lambda params: f"study-{run_id[:8]}"}
    with workplace.opened(home, run_id, first, say, **how) as place:
        stages = dag.stages(place.root)
        alike = shared(stages, found)
        alike = [name for name in alike if here or name in train_dit.PREPARE]
        say(f"the same for all variants: {', '.join(alike) or 'no stage'}")
        try:
            walk.walk(place, alike)
        except walk.Stopped as stopped:
            return stopped.state
        place.keep("what the variants share")
    return None


def shared(stages: Mapping[str, Sequence[str]], found: Mapping[str, Finding]) -> list[str]:
    """The stages, in their order, on whose settings all variants agree, and on those of all that they depend on."""
    alike: list[str] = []
    for name, needs in stages.items():
        ours = [finding.stage_settings[name] for finding in found.values()]
        if all(need in alike for need in needs) and all(one == ours[0] for one in ours):
            alike.append(name)
    return alike if len(found) > 1 else []


def workers_wait() -> bool:
    """Whether `train-dit/any` is deployed on the server that this run talks to, and a worker of its pool is alive."""
    with get_client(sync_client=True) as client:
        try:
            pool = client.read_deployment_by_name(RUNNER).work_pool_name
            workers = client.read_workers_for_work_pool(pool) if pool else []
        except ObjectNotFound:
            return False
    return any(worker.status == WorkerStatus.ONLINE for worker in workers)


def on_workers(wanted: Mapping[str, Wanted], how: Mapping[str, Any]) -> Iterable[tuple[str, tuple[str, State]]]:
    """Start all variants, and yield name, run and final state of each. If this run is cancelled, so are they."""
    log, jobs = get_run_logger(), {}
    try:
        for name, one in wanted.items():
            parameters = {"preset": one.preset, "set": list(one.set), "source": one.source, **how}
            jobs[name] = placement.start(RUNNER, parameters)
        log.info("%d runs of %s wait for a worker", len(jobs), RUNNER)
        for name, job in jobs.items():
            yield name, (str(job.id), placement.wait(job.id))
    except BaseException:
        placement.cancel(jobs.values())
        raise


def one_by_one(wanted: Mapping[str, Wanted], how: Mapping[str, Any]) -> Iterable[tuple[str, tuple[str, State]]]:
    """Run the variants in this process, and yield name, run and final state of each."""
    for name, one in wanted.items():
        state = train_dit.train_dit(one.preset, list(one.set), source=one.source, return_state=True, **how)
        yield name, (str(state.state_details.flow_run_id), state)


def _branch(home: Path, run_id: str, label: str) -> str:
    """A run's branch; "" if it has none, as one that was refused."""
    name = worktrees.describe(home, run_id, label).branch
    return name if worktrees.git(home, "branch", "--list", name) else ""


def _title(preset: str | None) -> str:
    return str(deployment.name or preset or "params.yaml")


def main(arguments: Iterable[str] | None = None) -> int:
    """Run the flow in this process; returns 0 if all variants completed."""
    parser = terminal.options(study, "study")
    parser.add_argument(
        "--variant",
        action="append",
        default=[],
        nargs="+",
        metavar=("NAME", "SETTING=VALUE"),
        help="a variant's name and the settings in which it differs",
    )
    told = vars(parser.parse_args(arguments))
    named = told.pop("variant")
    told["variants"] = {name: more for name, *more in named}

    def refuse() -> None:
        if twice := [name for name in told["variants"] if sum(name == other for other, *_ in named) > 1]:
            raise ValueError(f"--variant {', '.join(twice)}: named more than once")
        findings.expect(Path.cwd(), uuid4().hex, asked(told["preset"], told["variants"], told["set"], told["source"]))

    return terminal.run(study, told, refuse)


if __name__ == "__main__":
    sys.exit(main())
