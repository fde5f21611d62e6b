"""A copy of this working tree as a git repository of its own, with the `micro` settings, for end-to-end tests."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def make(folder: Path) -> Path:
    """Copy what git knows or would add, commit it there, and put the micro settings in."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    files = subprocess.run(listed, cwd=ROOT, capture_output=True, check=True, text=True).stdout.split("\0")
    for name in files:
        if name and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    (folder / "dvc.lock").unlink(missing_ok=True)
    run(folder, sys.executable, "-m", "dit.cli", "preset", "tests/micro.yaml")
    run(folder, "git", "init", "-q")
    run(folder, "git", "add", "-A")
    run(folder, "git", "-c", "user.name=t", "-c", "user.email=t@example.org", "commit", "-qm", "micro")
    return folder


def environment(**more: str) -> dict[str, str]:
    """This interpreter first on PATH; nobody else's MLflow; quiet."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW_", "PREFECT_", "DVC_"))}
    kept["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{kept['PATH']}"
    return {**kept, "DVC_NO_ANALYTICS": "1", "MLFLOW_DISABLE_TELEMETRY": "true", "OMP_NUM_THREADS": "1", **more}


def run(folder: Path, *command: str, code: int = 0, **more: str) -> str:
    """Run a command there and return all it printed; its exit code must be `code`."""
    done = subprocess.run(
        command, cwd=folder, env=environment(**more), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == code, f"{command} ended with {done.returncode}:\n{done.stdout}"
    return done.stdout


def repro(folder: Path, *options: str, code: int = 0, **more: str) -> str:
    """`dvc repro`, and what it printed."""
    return run(folder, sys.executable, "-m", "dvc", "repro", *options, code=code, **more)


def ran(printed: str) -> list[str]:
    """The stages that DVC ran, in order."""
    return [line.split("'")[1] for line in printed.splitlines() if line.startswith("Running stage '")]


def stale(folder: Path) -> set[str]:
    """The stages that DVC would run for a changed dependency or setting of their own."""
    told = json.loads(run(folder, sys.executable, "-m", "dvc", "status", "--json"))
    return {name for name, changes in told.items() if any(isinstance(change, dict) for change in changes)}
