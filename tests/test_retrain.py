"""flows/retrain.py under a real Prefect server, in a checkout whose `scan` is the pipeline's own; its training is a toy."""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
from toy_pipeline import REPOSITORY
from waiting import until

from dit import locks
from dit.config import read_params
from dit.paths import Paths
from flows import retrain as flow_file
from flows import worktrees

DVC_YAML = """\
stages:
  scan:
    cmd: python -m dit.stages.scan
    always_changed: true
    params: [data]
    outs:
      - artifacts/scan/listing.json: {persist: true}
  train:
    cmd: python train.py
    deps: [artifacts/scan/listing.json, train.py]
    params: [train]
    outs: [model]
"""
TRAIN_PY = """\
import json, os, sys
home = open("scratch/home").read().strip()
open(home + "/scratch/trained", "a").write("once\\n")
open("model", "w").write("weights")
if "max_steps: 13" in open("params.yaml").read():
    os.makedirs("scratch/outcome", exist_ok=True)
    told = {"stage": "train", "status": "refused", "message": "no luck", "retry": False}
    json.dump(told, open("scratch/outcome/train.json", "w"))
    sys.exit(2)
"""
PARAMS = """\
preset: gallery
data: {name: my_photos, source: images, labels: folder, num_classes: 2, image_size: 32, mirror: true,
       held_out_fraction: 0.2, split_seed: 0, shard_images: 512, max_bad_fraction: 0.01}
train:
  init_from: null
  max_steps: 3
vae:
  pretrained: null
register: {model_name: dit-photos}
retrain: {quiet_seconds: 0.2, start_from: scratch}
run: {retry_seconds: 0.1, stage_retries: 1}
"""


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    root = tmp_path_factory.mktemp("template") / "gallery"
    root.mkdir()
    for name, content in {"dvc.yaml": DVC_YAML, "train.py": TRAIN_PY, "params.yaml": PARAMS}.items():
        (root / name).write_text(content)
    (root / ".gitignore").write_text("/scratch\n/artifacts\n/images\n/model\n/mlflow.db\n/mlartifacts\n__pycache__\n")
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "init.defaultBranch=main"]
    for command in ([*git, "init", "-q"], [sys.executable, "-m", "dvc", "init", "-q"], [*git, "add", "-A"]):
        subprocess.run(command, cwd=root, check=True, env={**os.environ, "DVC_NO_ANALYTICS": "1"})
    subprocess.run([*git, "commit", "-qm", "gallery"], cwd=root, check=True)
    return root


@pytest.fixture
def gallery(template, tmp_path, monkeypatch):
    """A checkout with four images in two classes."""
    root = tmp_path / "gallery"
    shutil.copytree(template, root, symlinks=True)
    for name in ("cat/1", "cat/2", "dog/1", "dog/2"):
        put(root, name)
    monkeypatch.chdir(root)
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return root


def put(root, name, content="pixels"):
    file = root / "images" / f"{name}.png"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"{content} of {name}")


def retrain(**parameters):
    return flow_file.retrain(**parameters, return_state=True)


def table():
    """The newest table of what changed: {class: its row}."""
    from prefect.artifacts import Artifact

    rows = json.loads(Artifact.get("retrain-my-photos").data)
    return {row.pop("class"): row for row in rows}


def trainings(root):
    return len((root / "scratch" / "trained").read_text().split())


def nothing_is_left_over(root):
    return not [path for path in (root / "scratch" / "worktrees").glob("*") if path.is_dir()]


def branches(root):
    return worktrees.git(root, "for-each-ref", "--format=%(refname:short)", "refs/heads/runs").split()


@pytest.mark.slow
def test_new_images_are_trained_on_once(server, gallery):
    from test_events import received

    state = retrain()
    assert state.is_completed() and state.name == "Completed", state.message
    assert trainings(gallery) == 1 and len(branches(gallery)) == 1
    assert table() == {
        "cat": {"new": 2, "changed": 0, "gone": 0, "now": 2},
        "dog": {"new": 2, "changed": 0, "gone": 0, "now": 2},
        "all": {"new": 4, "changed": 0, "gone": 0, "now": 4},
    }

    state = retrain()
    assert state.is_completed() and state.name == "NothingNew"
    assert state.message.startswith("0 new, 0 changed, 0 gone, since the run of ")
    (gallery / "images" / "cat" / "2.png").unlink()
    put(gallery, "dog/3")
    put(gallery, "dog/1", "other pixels")
    state = retrain(min_new_images=3)
    assert state.name == "NothingNew" and "1 new, 1 changed, 1 gone" in state.message and "is 3" in state.message
    assert trainings(gallery) == 1 and len(branches(gallery)) == 1 and nothing_is_left_over(gallery)

    assert retrain(min_new_images=2).name == "Completed" and trainings(gallery) == 2
    assert table() == {
        "cat": {"new": 0, "changed": 0, "gone": 1, "now": 1},
        "dog": {"new": 1, "changed": 1, "gone": 0, "now": 3},
        "all": {"new": 1, "changed": 1, "gone": 1, "now": 4},
    }
    assert retrain().name == "NothingNew" and trainings(gallery) == 2 and nothing_is_left_over(gallery)
    told = until(lambda: (got := received("dit.data.new", "dit.dataset.my_photos"))[1:] and got)
    assert told == [{"new": 4, "changed": 0, "gone": 0}, {"new": 1, "changed": 1, "gone": 1}]


@pytest.mark.slow
def test_a_refused_run_leaves_no_branch(server, gallery):
    state = retrain(min_new_images=0)
    assert state.is_failed() and state.message == "min_new_images must be at least 1, got 0"
    state = retrain(pool="nosuch")  # once it is seen that there is something to train on
    assert state.is_failed() and "no work pool 'nosuch'" in state.message
    assert branches(gallery) == [] and nothing_is_left_over(gallery)


@pytest.mark.slow
def test_an_upload_in_progress_is_waited_for_and_is_one_generation(server, gallery, monkeypatch):
    assert retrain().is_completed()
    put(gallery, "cat/3")
    uploads = iter(["dog/9", "cat/0"])

    def meanwhile(seconds):
        if name := next(uploads, None):
            put(gallery, name)

    monkeypatch.setattr(flow_file, "time", SimpleNamespace(monotonic=time.monotonic, sleep=meanwhile))
    state = retrain()
    assert state.name == "Completed", state.message
    assert table()["all"] == {"new": 3, "changed": 0, "gone": 0, "now": 7}
    listing = worktrees.lock_at(gallery, worktrees.last_success(gallery, "my_photos", "gallery"))
    [out] = listing["stages"]["scan"]["outs"]
    rows = json.loads((gallery / ".dvc/cache/files/md5" / out["md5"][:2] / out["md5"][2:]).read_text())["rows"]
    assert {row[0]: (row[4], row[5]) for row in rows if row[4]} == {
        "cat/0.png": (1, 0), "cat/3.png": (1, 1), "dog/9.png": (1, 2),
    }  # fmt: skip


@pytest.mark.slow
def test_training_starts_from_the_champion_s_number(server, gallery):
    from dit import tracking

    wanted = ["retrain.start_from=champion"]
    assert retrain(set=wanted).name == "Completed"  # there is none yet: as train.init_from says
    assert started_from(gallery) is None
    client = tracking.connect(Paths(gallery))
    client.create_registered_model("dit-photos")
    for _ in range(2):
        client.create_model_version("dit-photos", str(gallery), None)
    client.set_registered_model_alias("dit-photos", "champion", "2")
    (gallery / "artifacts" / "vae").mkdir(parents=True)
    (gallery / "artifacts" / "vae" / "config.json").write_text("{}")
    put(gallery, "cat/3")
    assert retrain(set=wanted).name == "Completed"
    assert started_from(gallery) == "models:/dit-photos/2"
    put(gallery, "cat/4")
    assert retrain(set=[*wanted, "train.init_from=weights/mine"]).name == "Completed"
    assert started_from(gallery) == "weights/mine"


def started_from(root):
    """train.init_from of the newest run."""
    commit = worktrees.last_success(root, "my_photos")
    file = root / "scratch" / "theirs.yaml"
    file.write_text(worktrees.git(root, "show", f"{commit}:params.yaml"))
    return read_params(file)["train"]["init_from"]


@pytest.mark.slow
def test_a_failed_training_leaves_the_images_new(server, gallery):
    state = retrain(set=["train.max_steps=13"])
    assert state.is_failed() and state.message.startswith("stage train: no luck")
    assert retrain().name == "Completed"
    shutil.rmtree(gallery / "images" / "dog")
    state = retrain()
    assert state.is_failed() and "scan" in state.message and "one class only" in state.message
    assert nothing_is_left_over(gallery)


@pytest.mark.slow
def test_a_model_that_the_registry_could_not_decide_on_is_decided_on_by_the_next_run(server, gallery):
    stage = "{cmd: python register.py, always_changed: true, deps: [model], outs: [artifacts/register]}"
    (gallery / "dvc.yaml").write_text(f"{DVC_YAML}  register: {stage}\n")
    (gallery / "register.py").write_text(
        "import json, os\nhome = open('scratch/home').read().strip()\n"
        "decision = 'challenger' if os.path.exists(home + '/scratch/answers') else 'offline'\n"
        "os.makedirs('artifacts/register', exist_ok=True)\n"
        "told = {'decision': decision, 'alias': None, 'reasons': ['MLflow is away.']}\n"
        "json.dump(told, open('artifacts/register/model.json', 'w'))\n"
    )
    worktrees.git(gallery, "add", "-A")
    worktrees.git(gallery, "-c", "user.name=t", "-c", "user.email=t@example.org", "commit", "-qm", "register")
    assert [retrain().name, retrain().name] == ["Completed", "Completed"]
    (gallery / "scratch" / "answers").touch()
    assert [retrain().name, retrain().name] == ["Completed", "NothingNew"] and trainings(gallery) == 1


@pytest.mark.parametrize(
    ("start", "decided", "asked"),
    [
        ("champion", set(), "vae.pretrained and train.init_from"),
        ("scratch", set(), "vae.pretrained"),
        ("champion", {"vae.pretrained", "train.init_from"}, None),
        ("scratch", {"vae.pretrained"}, None),
    ],
)
def test_the_champion_is_asked_for_only_where_something_is_taken_of_it(tmp_path, monkeypatch, start, decided, asked):
    def away(paths, name):
        raise ValueError("MLflow is away")

    monkeypatch.setattr(flow_file, "champion", away)
    said, params = [], {"register": {"model_name": "dit-photos"}, "retrain": {"start_from": start}}
    place = SimpleNamespace(root=tmp_path, params=params, say=said.append)
    if asked is None:
        flow_file.begin(place, decided)
        assert said == ["nothing is taken of the champion of dit-photos"]
    else:
        with pytest.raises(ValueError, match=f"^MLflow is away: run again when it answers, or set {asked} \\("):
            flow_file.begin(place, decided)


@pytest.mark.slow
def test_of_runs_that_wait_for_the_same_one_is_enough(server, gallery):
    folder = gallery / "scratch" / "lock"
    with locks.held(folder / "run-retrain-my_photos-dit-photos", print, "a retraining"):
        said = []
        waiting = threading.Thread(target=lambda: said.append(retrain().name))
        waiting.start()
        until(lambda: any(not locks.free(file) for file in folder.glob("retrain-next-*")))
        state = retrain()
        assert state.is_completed() and state.name == "AlreadyQueued"
    waiting.join()
    assert said == ["Completed"]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--preset", "nosuch"], "retrain: preset 'nosuch' does not exist"),
        (["--min-new-images", "many"], "usage: "),
        (["--min-new-images", "-5"], "retrain: min_new_images must be at least 1, got -5"),
        (["--set", "retrain.quiet_seconds=-5"], "retrain: retrain.quiet_seconds must not be negative, got -5"),
    ],
)
def test_bad_input_at_the_terminal_is_told_before_a_server_is_started(gallery, monkeypatch, capsys, arguments, line):
    monkeypatch.setenv("PREFECT_PORT", "0")  # which would be told instead
    try:
        assert flow_file.main(arguments) == 1
    except SystemExit as error:
        assert error.code == 2
    assert capsys.readouterr().err.startswith(line) and not (gallery / "scratch" / "local").exists()
