"""A checkout of three tiny stages, for the tests of flows: what DVC, git and signals do is real, the work is not.

`scan -> train -> report` (dvc.yaml has them in another order). `train` reads from scratch/toy.json of the checkout
(not of the run's worktree) what to do:
{"seconds": how long, the first time; "fail_times": how often to fail for a reason that passes; "fail": a message to die
with, "child": start a process in a session of its own}. On SIGINT or SIGTERM it saves for 0.3 s, and on for as long as
there is a file scratch/hold, writes scratch/saved and its outcome file, and exits with 75.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from waiting import until

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

home = open("scratch/home").read().strip() if os.path.exists("scratch/home") else "."
toy = home + "/scratch/toy.json"
todo = json.load(open(toy)) if os.path.exists(toy) else {}

def outcome(status, message, retry=False):
    os.makedirs("scratch/outcome", exist_ok=True)
    told = {"stage": "train", "status": status, "message": message, "retry": retry}
    json.dump(told, open("scratch/outcome/train.json", "w"))

def save(number, frame):
    print("saving", flush=True)
    time.sleep(0.3)
    while os.path.exists(home + "/scratch/hold"):
        time.sleep(0.05)
    open(home + "/scratch/saved", "w").close()
    print("saved", flush=True)
    outcome("interrupted", "interrupted at step 3")
    sys.exit(75)

signal.signal(signal.SIGINT, save)
signal.signal(signal.SIGTERM, save)
if todo.get("child"):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"], start_new_session=True)
    open(home + "/scratch/child", "w").write(str(child.pid))
print("training with", sys.executable, flush=True)
tries = int(open(home + "/scratch/tries").read()) if os.path.exists(home + "/scratch/tries") else 0
open(home + "/scratch/tries", "w").write(str(tries + 1))
open(home + "/scratch/pid.new", "w").write(str(os.getpid()))  # last: who waits for it may kill at once
os.rename(home + "/scratch/pid.new", home + "/scratch/pid")
if tries < todo.get("fail_times", 0):
    outcome("failed", "the network is away", True)
    sys.exit("no network")
end = time.time() + (todo.get("seconds", 0) if tries == 0 else 0)
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
    run = "run: {stage_retries: 2, retry_seconds: 0.1}\n"
    (root / "params.yaml").write_text(f"preset: digits\ntrain:\n  max_steps: 3  # a comment to keep\n{run}")
    for preset, steps in {"digits": 3, "smoke": 1, "xl2": 9}.items():
        (root / "presets" / f"{preset}.yaml").write_text(f"train:\n  max_steps: {steps}\n{run}")
    (root / "ready").write_text("a file that DVC tracks with ready.dvc, which is no stage\n")
    (root / ".gitignore").write_text("/scratch\n/mlflow.db\n/mlartifacts\n/prefect.toml\n__pycache__\n")
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "init.defaultBranch=main"]
    dvc = [sys.executable, "-m", "dvc"]
    config = ["config", "core.check_update", "false"]
    add, keep = [*git, "add", "-A"], [*git, "commit", "-qm", "toy"]
    begin = ([*git, "init", "-q"], [*dvc, "init", "-q"], [*dvc, *config], [*dvc, "add", "-q", "ready"])
    for command in (*begin, add, keep):
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
    """Put the flows, what they import, the deployments and the work pools into the toy checkout, and commit them.

    All but `dit`: a run's worktree has no preflight then, which would refuse the toy's params.yaml.
    """
    without_caches = shutil.ignore_patterns("__pycache__")
    for folder in ("flows", "dit", "infra/work_pools"):
        shutil.copytree(REPOSITORY / folder, root / folder, ignore=without_caches)
    shutil.copy(REPOSITORY / "prefect.yaml", root)
    for preset in (REPOSITORY / "presets").glob("*.yaml"):  # all that deployments name
        if not (root / "presets" / preset.name).exists():
            shutil.copy(root / "presets" / "xl2.yaml", root / "presets" / preset.name)
    with (root / ".git" / "info" / "exclude").open("a") as ignored:
        ignored.write("/dit\n")
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@example.org"]
    for command in (["add", "-A"], ["commit", "-qm", "with the flows' code"]):
        subprocess.run([*git, *command], cwd=root, check=True)
    return root


def tell(root, **todo):
    """What the toy's train stage shall do the next time."""
    (root / "scratch" / "toy.json").write_text(json.dumps(todo))
    for name in ("pid", "tries"):
        (root / "scratch" / name).unlink(missing_ok=True)


def train_started(root, seconds=120):
    """Wait until the train stage works; returns its process number."""
    until(lambda: (root / "scratch" / "pid").exists(), seconds)
    return int((root / "scratch" / "pid").read_text())


def words_of(process):
    """The words of a process's command; none once it is gone."""
    try:
        return process.cmdline()
    except psutil.Error:
        return []


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
