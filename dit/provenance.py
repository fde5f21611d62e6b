"""Where a result comes from: settings, git commit, DVC's hashes of what went in."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

from dit.config import read_params
from dit.paths import Paths


def flatten(params: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Settings, one per line: {"train.lr": "0.001"}; lists as JSON, long values cut to 500 characters."""
    flat = {}
    for key, value in params.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value, default=str)
            flat[f"{prefix}{key}"] = text if len(text) <= 500 else text[:499] + "…"
    return flat


def settings(paths: Paths) -> dict[str, str]:
    """params.yaml, flattened; empty where it cannot be read."""
    return flatten(_read(paths.params))


def provenance(paths: Paths, stage: str = "train") -> dict[str, str]:
    """{"preset", "git.commit", "git.dirty", "dvc.artifacts/encode": hash of that input of `stage`, ...}.

    What is not known (no git, no dvc.lock) is left out.
    """
    tags = {"preset": str(_read(paths.params).get("preset", ""))}
    if commit := _git(paths.root, "rev-parse", "HEAD"):
        # dvc.lock is written while the pipeline runs: that is no change that a person made.
        changes = _git(paths.root, "status", "--porcelain", "--untracked-files=no", "--", ".", ":(exclude)dvc.lock")
        tags |= {"git.commit": commit, "git.dirty": str(bool(changes)).lower()}
    if run := os.environ.get("DIT_FLOW_RUN_ID"):  # set by flows/ for the stages it starts
        tags["prefect.flow_run_id"] = run
    return tags | {f"dvc.{path}": digest for path, digest in inputs(paths.root, stage).items()}


def inputs(root: Path, stage: str) -> dict[str, str]:
    """DVC's hashes of the artifacts that `stage` reads, by path.

    They are those of the stages that made them: while `stage` runs, its own entry in dvc.lock is that of last time.
    """
    reads = (_read(root / "dvc.yaml").get("stages") or {}).get(stage, {}).get("deps", [])
    made = (_read(root / "dvc.lock").get("stages") or {}).values()
    digests = {out["path"]: out["md5"] for entry in made for out in entry.get("outs", []) if "md5" in out}
    return {path: digests[path] for path in reads if isinstance(path, str) and path in digests}


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_params(path)
    except ValueError:
        return {}


def _git(root: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
