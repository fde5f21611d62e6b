"""A checkout of three tiny stages, for the tests of flows: what DVC, git and signals do is real, the work is not.

`scan -> train -> report` (dvc.yaml has them in another order). `train` reads from scratch/toy.json what to do:
{"seconds": how long, "fail": a message to die with, "child": start a process in a session of its own}. On SIGINT or
SIGTERM it takes "save_seconds" to save, writes scratch/saved and its outcome file, and exits with 75.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

REPOSITORY = Path(__file__).parent.parent

DVC_YAML = """\
stages:
  report:
    cmd: cat listing model > page
    deps: [listing, model]
    outs: [page]
  train:
    cmd: python train.py
    deps: [listing, train.py]
    params: [train]
    outs: [model]
  scan:
    cmd: echo scanning; echo listing > listing
    deps: [ready]
    outs: [listing]
"""

TRAIN_PY = """\
import json, os, signal, subprocess, sys, time

todo = json.load(open("scratch/toy.json")) if os.path.exists("scratch/toy.json") else {}

def outcome(status, message):
    os.makedirs("scratch/outcome", exist_ok=True)
    json.dump({"stage": "train", "status": status, "message": message}, open("scratch/outcome/train.json", "w"))

def save(number, frame):
    print("saving", flush=True)
    time.sleep(todo.get("save_seconds", 0.3))
    open("scratch/saved", "w").close()
    print("saved", flush=True)
    outcome("interrupted", "interrupted at step 3")
    sys.exit(75)

signal.signal(signal.SIGINT, save)
signal.signal(signal.SIGTERM, save)
if todo.get("child"):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"], start_new_session=True)
    open("scratch/child", "w").write(str(child.pid))
open("scratch/pid.new", "w").write(str(os.getpid()))
os.rename("scratch/pid.new", "scratch/pid")
print("training with", sys.executable, flush=True)
end = time.time() + todo.get("seconds", 0)
while time.time() < end:
    time.sleep(0.05)
if todo.get("fail"):
    outcome("refused", todo["fail"])
    sys.exit("last words of train.py")
open("model", "w").write("weights")
outcome("completed", "")
"""


@pytest.fixture(scope="session")
def toy_template(tmp_path_factory):
    root = tmp_path_factory.mktemp("template") / "toy"
    (root / "presets").mkdir(parents=True)
    (root / "scratch").mkdir()
    (root / "dvc.yaml").write_text(DVC_YAML)
    (root / "train.py").write_text(TRAIN_PY)
    (root / "params.yaml").write_text("preset: digits\ntrain:\n  max_steps: 3  # a comment to keep\n")
    for preset, steps in {"digits": 3, "smoke": 1, "xl2": 9}.items():
        (root / "presets" / f"{preset}.yaml").write_text(f"preset: {preset}\ntrain:\n  max_steps: {steps}\n")
    (root / "ready").write_text("a file that DVC tracks with ready.dvc, which is no stage\n")
    (root / ".gitignore").write_text("/scratch\n/mlflow.db\n/mlartifacts\n/prefect.toml\n__pycache__\n")
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "init.defaultBranch=main"]
    dvc = [sys.executable, "-m", "dvc"]
    config = ["config", "core.check_update", "false"]
    for command in ([*git, "init", "-q"], [*dvc, "init", "-q"], [*dvc, *config], [*dvc, "add", "-q", "ready"]):
        subprocess.run(command, cwd=root, check=True, env={**os.environ, "DVC_NO_ANALYTICS": "1"})
    return root


@pytest.fixture
def toy(toy_template, tmp_path):
    """A fresh copy of the toy checkout; whatever still runs in it afterwards is ended, and is an error."""
    root = tmp_path / "toy"
    shutil.copytree(toy_template, root, symlinks=True)
    yield root
    left = processes_in(root)
    for process in left:
        process.kill()
    assert not left, f"left running: {left}"


def with_code(root):
    """Put the flows, what they import and the deployments into the toy checkout."""
    shutil.copytree(REPOSITORY / "flows", root / "flows", ignore=shutil.ignore_patterns("__pycache__"))
    (root / "dit").mkdir()
    for module in ("__init__", "paths", "config", "presets"):
        shutil.copy(REPOSITORY / "dit" / f"{module}.py", root / "dit")
    shutil.copy(REPOSITORY / "prefect.yaml", root)
    return root


def tell(root, **todo):
    """What the toy's train stage shall do the next time."""
    (root / "scratch" / "toy.json").write_text(json.dumps(todo))
    (root / "scratch" / "pid").unlink(missing_ok=True)


def train_started(root, seconds=60):
    """Wait until the train stage works; returns its process number."""
    until(lambda: (root / "scratch" / "pid").exists(), seconds)
    return int((root / "scratch" / "pid").read_text())


def until(condition, seconds=60):
    """Wait for something; an error if it takes longer."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)
    return value


def processes_in(root):
    """The running processes whose working folder is the checkout (or below it), this one apart."""
    found = []
    for process in psutil.process_iter():
        try:
            inside = Path(process.cwd()).is_relative_to(root)
            if inside and process.pid != os.getpid() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.Error, OSError):
            pass
    return found
