"""The flow `retrain`: looks whether a data set has new images, and only then trains, from the champion on or afresh.

`scan` runs in a worktree; its listing is compared with that of the last run of the same preset that succeeded. Enough
new or replaced images, and a source that has come to rest, start all of `train-dit`: what is not new comes out of DVC's
cache, and `register` lets the better of champion and challenger win. A second run right after finds nothing new.

On a worker: `prefect deployment run retrain/digits`; at once after an upload: `dit notify`. In this process:
`python -m flows.retrain --preset digits`.
"""

import json
import sys
import time
from collections import Counter
from collections.abc import Iterable, Set
from contextlib import ExitStack
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

from prefect import flow, get_run_logger
from prefect.artifacts import create_table_artifact
from prefect.runtime import flow_run
from prefect.states import Completed, Failed, State

from dit import locks
from dit.config import digest, parse
from dit.paths import Paths, write_atomic
from dit.retraining import Changes, RetrainConfig, class_of, compare
from dit.sources import Listing, read_listing
from flows import events, placement, terminal, train_dit, walk, workplace, worktrees
from flows.train_dit import Override, Preset
from flows.workplace import Wanted, Workplace

DECISION = "artifacts/register/model.json"


@flow(name="retrain", flow_run_name=train_dit.run_name, persist_result=False, validate_parameters=False)
def retrain(
    preset: Preset | None = None,
    set: list[Override] | None = None,  # noqa: A002 (the name on the form)
    source: str | None = None,
    min_new_images: int | None = None,
    push: bool = True,
    pool: str | None = None,
    anyway: bool = False,
) -> State:
    """Look for new images, and train on them if there are enough. Ends as NothingNew where there are not.

    Args:
        preset: settings, a file in presets/; empty: params.yaml as it is committed.
        set: single settings in their place, such as train.max_steps=1000.
        source: other images: a folder, an archive, s3://bucket/prefix.
        min_new_images: in the place of retrain.min_new_images: new and replaced images that are worth a training.
        push: give the results to the DVC remote, where one is configured.
        pool: the work pool of whatever needs an accelerator; empty: this one.
        anyway: start although the preflight says that it can't end well.
    """
    log, home = get_run_logger(), Path.cwd()
    wanted = Wanted(preset, tuple(set or ()), source)
    queue = home / "scratch" / "lock" / f"retrain-next-{digest(wanted, min_new_images)}"
    if not locks.free(queue):
        return Completed(name="AlreadyQueued", message="a run that asks the same waits already, and will look then")
    try:
        _threshold(RetrainConfig(), min_new_images)
        with ExitStack() as queued:
            queued.enter_context(locks.held(queue, log.info, f"retrain run {flow_run.name!r}"))
            run_id, how = str(flow_run.id), {"purpose": "retrain", "push": push, "key": _turn}
            with workplace.opened(home, run_id, wanted, log.info, **how) as place:
                queued.close()
                state, changes = look(place, min_new_images), None
                if isinstance(state, Changes):
                    changes = state
                    begin(place, {text.partition("=")[0].strip() for text in wanted.overrides})
                    at = placement.where(pool, home)
                    state = train_dit.work(place, [], anyway, pool, at, title="retrain", done={"scan"})
        if changes is None:
            if not worktrees.is_success(home, place.branch):  # as of a run that was killed at its very end
                worktrees.git(home, "branch", "-q", "-D", place.branch)  # there is nothing on it
        elif state is None:
            state = placement.hand_over(place, pool, at, [], anyway)
        if changes and state.is_completed():
            events.emit(events.DATA_NEW, events.dataset(place.dataset), _counts(changes))
        return state
    except ValueError as error:
        return Failed(message=str(error))  # raised, it would be told with a traceback


def look(place: Workplace, least: int | None = None) -> Changes | State:
    """What there is to learn; or the state in which the run ends: NothingNew, or that of a scan that failed.

    Nothing new goes on all the same where the last model still waits for the registry: all but `register` is cached.
    `least` stands in the place of retrain.min_new_images.
    """
    config = _threshold(config_of(place.params), least)
    since = worktrees.last_success(place.home, place.dataset, place.label)
    try:
        changes, now = settle(place, config, listing_of(place, since))
    except walk.Stopped as stopped:
        return stopped.state
    when = f"since {_when(place.home, since)}" if since else f"there was no run of {place.label} before"
    line = f"{_told(changes)}, {when}"
    place.say(line)
    publish(place, changes, now, line)
    if changes.total >= config.min_new_images:
        return changes
    if since and not changes and (reason := undecided(place, since)):
        place.say(f"that run's model waits for the registry's decision, so it is asked again. {reason}")
        return changes
    enough = f"; retrain.min_new_images is {config.min_new_images}" if changes.total else ""
    return Completed(name="NothingNew", message=f"{line}{enough}")


def settle(place: Workplace, config: RetrainConfig, before: Listing | None) -> tuple[Changes, Listing]:
    """Scan until the source has come to rest: until two scans, quiet_seconds apart, find the same.

    One scan is enough where too little is new. All that came meanwhile is one generation of images, as if it had been
    there at once: each scan starts from the same history. Raises walk.Stopped.
    """
    file = place.root / worktrees.LISTING
    history = file.read_bytes() if file.exists() else None
    began, last = time.monotonic(), None
    while True:
        if history is not None:
            write_atomic(file, history)
        walk.walk(place, ["scan"])
        now = read_listing(file)
        changes = compare(before, now)
        if changes.total < config.min_new_images or now == last or not config.quiet_seconds:
            return changes, now
        if time.monotonic() - began > 3600 * config.max_quiet_hours:
            place.say(f"the source still changes after {config.max_quiet_hours:g} hours: it is taken as it is now")
            return changes, now
        place.say(
            f"{_told(changes)}: an upload may be in progress, so it is looked at again in {config.quiet_seconds:g} s"
        )
        last = now
        time.sleep(config.quiet_seconds)


def begin(place: Workplace, decided: Set[str]) -> None:
    """Put into the run's settings what it builds on: the champion's weights (unless it starts from scratch), and in
    any case the champion's autoencoder, without which every image would have to be encoded anew.

    By the version's number and not by its alias, so that the run can be repeated later. What is `decided` (settings
    that were asked for) stays. Raises ValueError where MLflow can't say who the champion is.
    """
    name = str((place.params.get("register") or {}).get("model_name"))
    wanted = []
    if (place.params.get("vae") or {}).get("pretrained") is None and "vae.pretrained" not in decided:
        wanted.append("vae.pretrained")
    if config_of(place.params).start_from == "champion" and "train.init_from" not in decided:
        wanted.append("train.init_from")
    if not wanted:
        place.say(f"nothing is taken of the champion of {name}")
        return
    try:
        number = champion(Paths(place.root), name)
    except ValueError as error:
        raise ValueError(f"{error}: run again when it answers, or set {' and '.join(wanted)} (null: none)") from None
    if number is None:
        place.say(f"there is no champion of {name} yet: training starts as train.init_from says")
        return
    taken = [f"{setting}=models:/{name}/{number}" for setting in wanted]
    place.say(f"of the champion, {name} version {number}: {', '.join(taken)}")
    from dit import registry

    registry.download(Paths(place.root), name, number, part="vae")  # the preflight reads its size
    place.set(taken)


def champion(paths: Paths, name: str) -> int | None:
    """The version that is the champion; None where there is none. Raises ValueError where MLflow does not answer."""
    from dit import store, tracking
    from dit.registry import Registry

    try:
        with store.translated():
            return Registry(tracking.connect(paths), name, paths.scratch / "register").aliases().get("champion")
    except store.Unreachable as error:
        raise ValueError(f"the champion of {name} could not be asked of MLflow ({error})") from None


def undecided(place: Workplace, commit: str) -> str:
    """Why the registry has not decided on what that run made: MLflow or the champion was out of reach; "" if it has."""
    if "register" not in worktrees.lock_at(place.home, commit).get("stages", {}):
        return ""
    file = place.root / "scratch" / "decision.json"
    worktrees.dvc(place.root, "get", str(place.home), DECISION, "--rev", commit, "--force", "-o", str(file))
    try:
        told = json.loads(file.read_text())
        return "" if told["decision"] in ("champion", "challenger") else " ".join(told["reasons"])
    except (OSError, ValueError, KeyError):
        return ""


def listing_of(place: Workplace, commit: str | None) -> Listing | None:
    """The listing that a commit's run was trained on; None where there is none."""
    if commit is None:
        return None
    file = place.root / worktrees.LISTING
    history = file.read_bytes() if file.exists() else None
    try:
        return read_listing(file) if worktrees.bring_listing(place.tree, commit) else None
    finally:
        if history is not None:
            write_atomic(file, history)


def publish(place: Workplace, changes: Changes, now: Listing, line: str) -> None:
    """The table of what changed, a row a class, as an artifact of the run."""
    counts = {"new": changes.new, "changed": changes.changed, "gone": changes.gone}
    held = _held(now)
    names = sorted({name for counter in counts.values() for name in counter})
    rows = [
        {
            "class": name or "(no classes)",
            **{kind: counter[name] for kind, counter in counts.items()},
            "now": held[name],
        }
        for name in names
    ]
    total = {kind: counter.total() for kind, counter in counts.items()}
    create_table_artifact(
        key=f"retrain-{place.dataset.replace('_', '-')}",
        table=[*rows, {"class": "all", **total, "now": len(now.rows)}],
        description=line,
    )


def config_of(params: dict[str, Any]) -> RetrainConfig:
    """The section `retrain` of params.yaml, which may be absent."""
    return parse("retrain", params.get("retrain") or {}, RetrainConfig)


def _threshold(config: RetrainConfig, least: int | None) -> RetrainConfig:
    """The settings with another number of new images that are worth a training. Raises ValueError where it is none."""
    return config if least is None else replace(config, min_new_images=least)


def _turn(params: dict[str, Any]) -> str:
    return f"retrain-{(params.get('data') or {}).get('name')}-{(params.get('register') or {}).get('model_name')}"


def _counts(changes: Changes) -> dict[str, Any]:
    return {"new": changes.new.total(), "changed": changes.changed.total(), "gone": changes.gone.total()}


def _told(changes: Changes) -> str:
    told = ", ".join(f"{count:,} {kind}" for kind, count in _counts(changes).items())
    return f"{told} (another source or kind of labels: all count as new)" if changes.restarted else told


def _held(listing: Listing) -> Counter[str]:
    return Counter(class_of(listing, row) for row in listing.rows)


def _when(home: Path, commit: str) -> str:
    told = worktrees.git(home, "log", "-1", "--format=%cI", commit)
    return f"the run of {datetime.fromisoformat(told):%d %b %Y %H:%M} ({commit[:8]})"


def main(arguments: Iterable[str] | None = None) -> int:
    """Run the flow in this process; returns 0 if it completed, and that includes NothingNew."""
    parser = terminal.options(retrain, "retrain")
    parser.add_argument("--min-new-images", type=int, help="new and replaced images that are worth a training")
    told = vars(parser.parse_args(arguments))
    wanted = Wanted(told["preset"], tuple(told["set"] or ()), told["source"])

    def refuse() -> None:
        _threshold(config_of(workplace.foreseen(Path.cwd(), wanted)), told["min_new_images"])

    return terminal.run(retrain, told, refuse)


if __name__ == "__main__":
    sys.exit(main())
