"""What DVC would run, asked of DVC: nothing here decides what is stale. Only its command line is used."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from dit.config import read_params

DVC_SECONDS = 60  # the longest wait for an answer


def dvc(
    root: Path, *words: str, seconds: float | None = DVC_SECONDS, **environment: str
) -> "subprocess.CompletedProcess[str] | None":
    """A question to DVC in `root`; None where there is no answer in time."""
    environment = {**os.environ, "DVC_NO_ANALYTICS": "1", "DO_NOT_TRACK": "true", **environment}
    words = (sys.executable, "-m", "dvc", *words)
    try:
        return subprocess.run(
            words, cwd=root, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True,
            timeout=seconds,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None


def stale_stages(root: Path) -> list[str] | None:
    """The stages that DVC would run, in the order of dvc.yaml: those that it finds changed, and all that follow them.

    Results that are missing here but recorded in dvc.lock count as there: DVC takes them out of its cache. It is the
    most that will run: what the run-cache has beside them is known once `restore` has taken it out. A stage that always
    runs makes no other stale by that. None where DVC can't say.
    """
    try:
        plan = read_params(root / "dvc.yaml")["stages"]
        needs, always = _needs(plan), {name for name, stage in plan.items() if stage.get("always_changed")}
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    done = dvc(root, "repro", "--dry", "--allow-missing", "--ignore-errors")
    if done is None or done.returncode:
        return None
    stale = set(plan) - set(re.findall(r"^Stage '(.+)' didn't change, skipping$", done.stdout, re.MULTILINE))
    while more := {name for name in plan if needs[name] & (stale - always)} - stale:
        stale |= more
    return [name for name in plan if name in stale]


def restore(root: Path, *, pull: bool = False) -> None:
    """Take what DVC's run-cache knows of these settings out of it, and run nothing; with `pull`, out of the remote's too.

    For a run's own worktree: as when it really runs, DVC deletes the outputs of a stage that it finds stale. DVC has no
    such command, so its shell is one that fails: what is known needs none.
    """
    shell = shutil.which("false") or "/bin/false"
    dvc(root, "repro", "--ignore-errors", *(["--pull"] if pull else []), seconds=None, SHELL=shell)


def _needs(plan: dict[str, Any]) -> dict[str, set[str]]:
    """The stages whose outputs a stage depends on."""
    outs = {
        name: [next(iter(out)) if isinstance(out, dict) else out for out in plan[name].get("outs", ())] for name in plan
    }

    def reads(dep: str, out: str) -> bool:
        return f"{dep}/".startswith(f"{out}/") or out.startswith(f"{dep}/")

    return {
        name: {maker for maker in plan for out in outs[maker] if any(reads(dep, out) for dep in stage.get("deps", ()))}
        for name, stage in plan.items()
    }
