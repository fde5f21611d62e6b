"""flows/study.py under a real Prefect server: real settings, `dit info` and DVC; training and evaluation are a toy."""

import csv
import json
import os
import shutil
import subprocess
import sys

import pytest
from PIL import Image
from toy_pipeline import REPOSITORY
from waiting import until

from dit import presets
from flows import study as flow_file
from flows import worktrees
from flows.findings import Finding

DVC_YAML = """\
stages:
  scan:
    cmd: mkdir -p artifacts/scan && echo listing > artifacts/scan/listing.json
    always_changed: true
    params: [data]
    outs: [artifacts/scan/listing.json]
  evaluate:
    cmd: python evaluate.py
    deps: [artifacts/scan/listing.json, evaluate.py]
    params: [model, train.max_steps]
    outs: [artifacts/evaluate]
"""
EVALUATE_PY = """\
import json, os, sys, time
from dit.config import read_params
from pathlib import Path
params = read_params(Path("params.yaml"))
if params["train"]["max_steps"] == 13:
    os.makedirs("scratch/outcome", exist_ok=True)
    told = {"stage": "evaluate", "status": "refused", "message": "no luck", "retry": False}
    json.dump(told, open("scratch/outcome/evaluate.json", "w"))
    sys.exit(2)
home = Path("scratch/home").read_text().strip() if os.path.exists("scratch/home") else "."
meeting = Path(home, "scratch", "meeting")
if meeting.exists():  # two variants are to be here at once
    (meeting / str(os.getpid())).touch()
    ends = time.monotonic() + 120
    while len(list(meeting.iterdir())) < 2:
        if time.monotonic() > ends:
            sys.exit("nobody came")
        time.sleep(0.1)
os.makedirs("artifacts/evaluate")
figures = {"fid_digits_classifier_1k": 640 / params["model"]["hidden_size"], "recall_digits_classifier_1k": 0.5}
json.dump({"settings": {"plain": {}, "cfg1.5": figures}}, open("artifacts/evaluate/metrics.json", "w"))
"""
WIDTHS = {"narrow": ["model.hidden_size=64"], "wide": ["model.hidden_size=160"]}


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A checkout with the digits' settings."""
    root = tmp_path / "checkout"
    (root / "presets").mkdir(parents=True)
    shutil.copy(REPOSITORY / "presets" / "digits.yaml", root / "presets")
    presets.apply("digits", root / "params.yaml")
    (root / "dvc.yaml").write_text(DVC_YAML)
    (root / "evaluate.py").write_text(EVALUATE_PY)
    (root / ".gitignore").write_text("/scratch\n/artifacts\n/mlflow.db\n__pycache__\n")
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "init.defaultBranch=main"]
    for command in ([*git, "init", "-q"], [sys.executable, "-m", "dvc", "init", "-q"], [*git, "add", "-A"]):
        subprocess.run(command, cwd=root, check=True, env={**os.environ, "DVC_NO_ANALYTICS": "1"})
    subprocess.run([*git, "commit", "-qm", "checkout"], cwd=root, check=True)
    monkeypatch.chdir(root)
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    return root


def found(root):
    """What the study left: {variant: its row} and the folder."""
    [file] = (root / "scratch" / "studies").glob("*/study.json")
    rows = json.loads(file.read_text())["variants"]
    return {row["variant"]: row for row in rows}, file.parent


@pytest.mark.slow
def test_a_table_and_a_chart_of_what_completed_and_the_reason_of_what_did_not(server, checkout):
    from prefect.artifacts import Artifact

    variants = {**WIDTHS, "unlucky": ["train.max_steps=13"]}
    state = flow_file.study(preset="digits", variants=variants, set=["data.mirror=true"], return_state=True)
    assert state.is_failed() and state.name == "Incomplete", state.message
    assert state.message.startswith("2 of 3 variants; best: wide, fid_digits_classifier_1k 4; scratch/studies/")
    rows, folder = found(checkout)
    assert {name: row.get("fid_digits_classifier_1k") for name, row in rows.items()} == {
        "narrow": 10.0, "wide": 4.0, "unlucky": None,
    }  # fmt: skip
    assert rows["narrow"]["Gflops"] < rows["unlucky"]["Gflops"] < rows["wide"]["Gflops"]
    assert rows["unlucky"]["state"] == "Failed" and "no luck" in rows["unlucky"]["reason"]
    assert rows["wide"]["recall_digits_classifier_1k"] == 0.5
    for row in rows.values():
        assert "mirror: true" in worktrees.git(checkout, "show", f"{row['branch']}:params.yaml")
    with open(folder / "study.csv") as file:
        assert [row["variant"] for row in csv.DictReader(file)] == list(variants)
    with Image.open(folder / "study.png") as picture:
        assert picture.format == "PNG"
    assert {row["variant"] for row in json.loads(Artifact.get("study").data)} == set(variants)
    page = Artifact.get("study-chart").data
    assert "data:image/png;base64," in page and "| wide | " in page and "no luck" in page
    assert not [path for path in (checkout / "scratch" / "worktrees").glob("*") if path.is_dir()]


@pytest.mark.slow
def test_a_variant_that_cannot_run_is_refused_before_any_runs(server, checkout):
    wrong = {**WIDTHS, "typo": ["model.hiden_size=3"], "odd": ["model.num_heads=3", "train.lr=-1"]}
    state = flow_file.study(preset="digits", variants=wrong, return_state=True)
    assert state.is_failed()
    lines = state.message.splitlines()
    assert lines[0] == "variant typo: set: model.hiden_size: no such setting (did you mean model.hidden_size?)"
    assert {line.partition(": ")[0] for line in lines} == {"variant typo", "variant odd"}
    assert (
        not worktrees.git(checkout, "for-each-ref", "refs/heads/runs") and not (checkout / "scratch/studies").exists()
    )
    state = flow_file.study(preset="digits", return_state=True)
    assert state.is_failed() and state.message.startswith("variants: there are none")


def refused(root, capsys, *variants):
    """What a study in a terminal says that is refused before a server is started."""
    assert flow_file.main(["--preset", "digits", *variants]) == 1
    assert not worktrees.git(root, "branch", "--list", "runs/*") and not (root / "scratch" / "local").exists()
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    return told.removeprefix("study: ")


def test_what_a_study_in_a_terminal_cannot_be_is_a_line_before_a_server_is_started(checkout, monkeypatch, capsys):
    monkeypatch.setenv("PREFECT_PORT", "0")  # which would be told instead
    assert refused(checkout, capsys).startswith("variants: there are none: give names and settings, ")
    twice = ["--variant", "a", "--variant", "a", "train.seed=1"]
    assert refused(checkout, capsys, *twice) == "--variant a: named more than once\n"
    typo = refused(checkout, capsys, "--variant", "a", "model.hiden_size=3")
    assert typo == "variant a: set: model.hiden_size: no such setting (did you mean model.hidden_size?)\n"


@pytest.mark.slow
def test_so_is_a_value(checkout, monkeypatch, capsys):
    monkeypatch.setenv("PREFECT_PORT", "0")
    assert refused(checkout, capsys, "--variant", "a", "train.lr=-1").startswith("variant a: train.lr must be above 0")


@pytest.mark.slow
def test_variants_run_on_workers_beside_each_other(server, checkout, tmp_path):
    from prefect.client.orchestration import get_client
    from prefect.settings import get_current_settings

    environment = {**os.environ, "PREFECT_API_URL": get_current_settings().api.url, "PREFECT_WORKER_QUERY_SECONDS": "1"}
    environment |= {"OMP_NUM_THREADS": "1", "PREFECT_HOME": str(tmp_path / "home")}
    (checkout / "prefect.yaml").write_text(
        f"""\
pull:
  - prefect.deployments.steps.set_working_directory: {{directory: {checkout}}}
deployments:
  - {{name: any, entrypoint: "{REPOSITORY}/flows/train_dit.py:train_dit", work_pool: {{name: here}}}}
"""
    )
    prefect = [sys.executable, "-m", "prefect", "--no-prompt"]
    subprocess.run([*prefect, "work-pool", "create", "here", "--type", "process"], env=environment, check=True)
    subprocess.run([*prefect, "deploy", "--all"], cwd=checkout, env=environment, check=True)
    assert not flow_file.workers_wait()
    (checkout / "scratch" / "meeting").mkdir(parents=True, exist_ok=True)  # no variant ends before the other began
    worker = subprocess.Popen([*prefect, "worker", "start", "--pool", "here"], cwd=checkout, env=environment)
    try:
        until(flow_file.workers_wait)
        state = flow_file.study(preset="digits", variants=WIDTHS, return_state=True)
        assert state.is_completed() and state.message.startswith("2 of 2 variants; best: wide"), state.message
    finally:
        worker.terminate()
        worker.wait(90)
    rows, _ = found(checkout)
    with get_client(sync_client=True) as client:
        runs = client.read_flow_runs()
    ours = [run for run in runs if any(row["branch"].endswith(str(run.id)[:8]) for row in rows.values())]
    assert len(ours) == 2 and all(run.deployment_id and run.parent_task_run_id for run in ours)
    assert len(list((checkout / "scratch" / "meeting").iterdir())) == 2


def test_stages_are_shared_as_far_as_settings_and_what_they_depend_on_agree():
    stages = {"scan": (), "shard": ("scan",), "vae": ("shard",), "encode": ("shard", "vae"), "train": ("encode",)}
    stages |= {"report": ("train",)}
    same = {name: {"data": 1} for name in stages}

    def alike(*settings):
        return flow_file.shared(
            stages, {str(k): Finding(str(k), 1, 1, "", "fid", "s", one) for k, one in enumerate(settings)}
        )

    assert alike(same, {**same, "train": {"model": 2}}) == ["scan", "shard", "vae", "encode"]
    assert alike(same, {**same, "vae": {"vae": 2}}) == ["scan", "shard"]
    assert alike(same, same) == list(stages) and alike(same) == []
