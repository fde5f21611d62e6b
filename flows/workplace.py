"""Where a run works: its worktree with its settings in it, its dataset's history, its turn, and what is kept at the end.

Two runs of the same settings take turns, so that the second finds in DVC's cache what the first has made. Runs of
different settings, and a person in the checkout, go on beside each other. Knows nothing of Prefect.
"""

import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from dit import locks, presets
from dit.config import digest, read_params
from flows import leash, remotes, worktrees
from flows.worktrees import Worktree

UNDECIDING = ("preset", "run", "retrain")  # sections of params.yaml that change no result
_SHOWN = 5


@dataclass(frozen=True)
class Wanted:
    """What a run's params.yaml becomes: a preset, then single settings (`train.max_steps=1000`), then the source."""

    preset: str | None = None
    set: tuple[str, ...] = ()
    source: str | None = None

    @property
    def overrides(self) -> list[str]:
        return [*self.set, *([f"data.source={self.source}"] if self.source else [])]


@dataclass
class Workplace:
    """A run's worktree while the run has it. `hold` is its lock's file descriptor, for whatever may outlive the run."""

    tree: Worktree
    hold: int
    say: Callable[[str], None]
    push: bool
    continued: bool = False  # another run's branch, perhaps another machine's: this machine may be gone tomorrow
    params: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)  # of its stages, in addition
    unpushed: str = ""  # why the results are on this machine alone, if they should not be

    @property
    def root(self) -> Path:
        return self.tree.root

    @property
    def home(self) -> Path:
        return self.tree.home

    @property
    def branch(self) -> str:
        return self.tree.branch

    @property
    def label(self) -> str:
        return self.tree.label

    @property
    def dataset(self) -> str:
        """The name of the images: data.name."""
        return str((self.params.get("data") or {}).get("name", "data"))

    @property
    def remote(self) -> str | None:
        """The DVC remote that this run pulls from and pushes to."""
        return remotes.default(self.root) if self.push else None

    def set(self, overrides: list[str]) -> None:
        """Put single settings into the run's params.yaml and on its branch. Raises ValueError."""
        if overrides:
            presets.override(self.root / "params.yaml", overrides)
        self.params = read_params(self.root / "params.yaml")
        worktrees.commit(self.tree, f"{self.label}: {', '.join(overrides) or 'settings'}")

    def keep(self, what: str) -> None:
        """Commit the results so far on the run's branch, and push them to the DVC remote where there is one."""
        worktrees.commit(self.tree, f"{self.label}: {what}")
        if remote := self.remote:
            self.unpushed = remotes.push(self.root)
            if self.unpushed:
                self.say(f"the results could not be pushed to the DVC remote {remote}: {self.unpushed}")

    def succeeded(self) -> None:
        """Remember this run as the last success on its dataset: what is new is counted from here."""
        worktrees.mark_success(self.tree, self.dataset, self.label)


@contextmanager
def opened(
    home: Path,
    run_id: str,
    wanted: Wanted,
    say: Callable[[str], None],
    *,
    purpose: str = "train-dit",
    start: str = "HEAD",
    push: bool = True,
    branch: str | None = None,
    key: Callable[[dict[str, Any]], str] | None = None,
) -> Iterator[Workplace]:
    """A worktree for one run, ready to be walked; it is removed at the end, its branch stays, unless the run was
    refused before any stage but `scan` was done: there is nothing on it then.

    Args:
        start: the commit that the run begins with.
        branch: go on with this branch, made by another run (perhaps on another machine), instead of a new one.
        key: what of the settings tells whose turn it is; default: all that decide a result.

    A run that is ended by a signal leaves its worktree, for the case that it comes back. Raises ValueError, one line,
    for what a person has to change.
    """
    leash.save_seconds()
    refuse(home, wanted)
    for name in worktrees.sweep(home):
        say(f"removed the worktree {name}, which a killed run had left")
    tree = (
        worktrees.describe(home, *reversed(branch.split("/")[1:]))
        if branch
        else worktrees.describe(home, run_id, label_of(home, wanted))
    )
    folder = home / "scratch" / "lock"
    with ExitStack() as held:
        hold = held.enter_context(
            locks.held(folder / worktrees.lock_name(tree.root.name), say, f"an earlier attempt of run {tree.id}")
        )
        if changed := worktrees.uncommitted(home):
            more = f" and {len(changed) - _SHOWN} more" if len(changed) > _SHOWN else ""
            say(f"not committed, so not in this run: {', '.join(changed[:_SHOWN])}{more}")
        if branch:
            remotes.fetch_branch(home, branch)
        worktrees.open_worktree(tree, branch or start)
        place = Workplace(tree, hold, say, push, continued=bool(branch))
        try:
            if not branch:
                _settle(place, wanted)
            place.set([])
            which = key(place.params) if key else digest(_deciding(place.params))
            held.enter_context(locks.held(folder / f"run-{which}", say, f"{purpose} run {tree.label}-{tree.id}"))
            _bring_history(place)
            yield place
            if branch:
                remotes.give_back(home, branch)
        except Exception:
            worktrees.close(tree)
            if not branch:
                _forget(tree, start)
            raise
        worktrees.close(tree)


def _forget(tree: Worktree, start: str) -> None:
    """Delete a run's branch if its stages' results are those that it began with."""

    def results(commit: str) -> dict[str, Any]:
        stages = worktrees.lock_at(tree.home, commit).get("stages", {})
        return {name: made for name, made in stages.items() if name != "scan"}  # which runs every time

    with suppress(ValueError):  # there is none
        worktrees.git(tree.home, "rev-parse", "-q", "--verify", f"refs/heads/{tree.branch}")
        if results(tree.branch) == results(start) and not worktrees.is_success(tree.home, tree.branch):
            worktrees.git(tree.home, "branch", "-q", "-D", tree.branch)


def refuse(home: Path, wanted: Wanted) -> None:
    """Raise ValueError for what can be seen to be wrong before anything is made."""
    if not (home / "dvc.yaml").exists():
        raise ValueError(f"no dvc.yaml in {home}: run in the project's folder")
    if wanted.preset:
        presets.resolve(_preset_file(home, wanted.preset), home / "presets")
    elif (home / "params.yaml").exists():
        read_params(home / "params.yaml")
    if wanted.overrides and (home / "params.yaml").exists():
        presets.override(home / "params.yaml", wanted.overrides, write=False)


def foreseen(home: Path, wanted: Wanted) -> dict[str, Any]:
    """The settings that a run would have, of the checkout as it lies there. Raises ValueError."""
    with TemporaryDirectory() as folder:
        params = Path(folder) / "params.yaml"
        (Path(folder) / "presets").symlink_to(home.resolve() / "presets")
        if (home / "params.yaml").exists():
            shutil.copy(home / "params.yaml", params)
        if wanted.preset:
            presets.apply(_preset_file(home, wanted.preset), params, home / "presets")
        if wanted.overrides:
            presets.override(params, wanted.overrides)
        return read_params(params)


def label_of(home: Path, wanted: Wanted) -> str:
    """What a run's branch is called, and whose success it is: its preset, or `<preset>-set` where settings or images were
    put in the preset's place. So a trial does not make new images old for the preset's own retraining."""
    return preset_of(home, wanted) + ("-set" if wanted.overrides else "")


def preset_of(home: Path, wanted: Wanted) -> str:
    """The preset's name; params.yaml's where none is asked for."""
    if wanted.preset:
        return Path(wanted.preset).stem
    try:
        return str(read_params(home / "params.yaml").get("preset") or "params")
    except ValueError:
        return "params"


def _settle(place: Workplace, wanted: Wanted) -> None:
    params = place.root / "params.yaml"
    if wanted.preset:
        told = presets.apply(_preset_file(place.root, wanted.preset), params, place.root / "presets")
        if told:
            place.say(f"preset {wanted.preset} put into the run's params.yaml:\n{told}")
    if wanted.overrides:
        presets.override(params, wanted.overrides)
        place.say(f"set: {', '.join(wanted.overrides)}")
    place.params = read_params(params)
    worktrees.commit(place.tree, f"{place.label}: {', '.join(wanted.overrides) or 'settings'}")


def _bring_history(place: Workplace) -> None:
    """The dataset's last successful listing, from which images keep their shards, unless the run has gone further."""
    if (place.root / worktrees.LISTING).exists():
        return
    if place.continued and worktrees.bring_listing(place.tree, place.branch):
        return
    remotes.fetch_history(place.home)
    own = worktrees.last_success(place.home, place.dataset, place.label)
    worktrees.bring_listing(place.tree, own or worktrees.last_success(place.home, place.dataset))


def _deciding(params: dict[str, Any]) -> dict[str, Any]:
    return {name: section for name, section in params.items() if name not in UNDECIDING}


def _preset_file(root: Path, preset: str) -> str:
    """A preset's name, or the path of a file, which is looked for in the run's own tree first."""
    inside = root / preset
    return str(inside) if preset.endswith(".yaml") and inside.is_file() else preset
