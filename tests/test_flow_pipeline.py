"""The whole pipeline on the `micro` settings through the flow, in a process of its own under a real Prefect server."""

import json
import os
import shutil
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import checkout
import pytest
from test_pipeline import lengthen, read, stages_in, states, until
from test_services import free_port
from toy_pipeline import processes_in

from dit.check import STAGES
from flows import dag, servers, services

FLOW = [sys.executable, "-m", "flows.train_dit"]
LOCAL = [sys.executable, "-m", "flows.local"]
EVERY_TIME = {"scan", "register"}
pytestmark = pytest.mark.slow


class Place:
    """A micro checkout and the Prefect server that its first flow starts."""

    def __init__(self, root, home, port):
        self.root, self.port = root, port
        self.more = {"PREFECT_PORT": str(port), "PREFECT_HOME": str(home)}  # not the person's own profile

    def flow(self, *options, code=0):
        """Run the flow; what it printed, and each stage's state as the server has it."""
        printed = checkout.run(self.root, *FLOW, *options, code=code, **self.more)
        [newest, *_] = self.ask("flow_runs/filter", sort="START_TIME_DESC", limit=1)
        return printed, newest, self.tasks(newest["id"])

    def tasks(self, run):
        """{stage: state's name} in the order in which they ran; they reach the server a moment later, as events."""

        def final():
            found = self.ask("task_runs/filter", flow_runs={"id": {"any_": [run]}})
            done = all(task["state_type"] in ("COMPLETED", "FAILED", "CRASHED") for task in found)
            return sorted(found, key=lambda task: task["start_time"]) if found and done else None

        return {task["name"]: task["state"]["name"] for task in until(final)}

    def ask(self, path, **body):
        url = f"http://127.0.0.1:{self.port}/api/{path}"
        request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(request) as reply:
            return json.loads(reply.read())


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A checkout in which the flow ran once; everything is ended afterwards, which is part of what is tested."""
    it = Place(checkout.make(tmp_path_factory.mktemp("micro")), tmp_path_factory.mktemp("home"), free_port())
    try:
        it.first = it.flow()
        yield it
    finally:
        said = checkout.run(it.root, *LOCAL, "down")
        left = processes_in(it.root) + list(services.marked(servers.folder_of(it.root)))
        services.signal_each([getattr(one, "pid", one) for one in left], signal.SIGKILL)
    assert said.endswith("ended prefect\n") and not left, said
    assert services.holder(it.port) is None and not (it.root / "prefect.toml").exists()


def mlflow_runs(root):
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{root}/mlflow.db")
    return client, [run for one in client.search_experiments() for run in client.search_runs([one.experiment_id])]


def test_every_stage_completes_and_the_model_is_registered(place):
    printed, flow_run, tasks = place.first
    assert list(tasks) == list(dag.stages(place.root)) and set(tasks) == set(STAGES)
    assert set(tasks.values()) == {"Completed"}
    assert flow_run["state"]["name"] == "Completed"
    assert flow_run["state"]["message"] == f"{len(STAGES)} stages, 0 of them cached"
    assert f"http://127.0.0.1:{place.port} (it stays; `make down` ends it)" in printed and "Traceback" not in printed
    client, [run] = mlflow_runs(place.root)
    assert run.info.status == "FINISHED" and run.info.run_id == read(place.root, "train/run.json")["mlflow_run_id"]
    model = read(place.root, "register/model.json")
    assert (model["registered"], model["alias"], model["version"]) == (True, "champion", 1)
    assert client.get_model_version_by_alias("dit-digits", "champion").run_id == run.info.run_id
    # Nothing but the server is left.
    ours = set(services.marked(servers.folder_of(place.root)))
    assert ours and {process.pid for process in processes_in(place.root)} <= ours


def test_the_second_time_all_but_scan_and_register_are_cached(place):
    lock = (place.root / "dvc.lock").read_bytes()
    _, flow_run, tasks = place.flow()
    assert tasks == {name: "Completed" if name in EVERY_TIME else "Cached" for name in STAGES}
    assert flow_run["state"]["message"] == f"{len(STAGES)} stages, {len(STAGES) - 2} of them cached"
    assert (place.root / "dvc.lock").read_bytes() == lock
    assert read(place.root, "register/model.json")["version"] == 1 and len(mlflow_runs(place.root)[1]) == 1


def test_a_setting_that_is_wrong_is_told_and_touches_no_artifact(place):
    params = place.root / "params.yaml"
    before, lock = params.read_text(), (place.root / "dvc.lock").read_bytes()
    files = {path: path.stat().st_mtime_ns for path in (place.root / "artifacts").rglob("*")}
    assert "lr: 4e-3 " in before
    try:
        params.write_text(before.replace("lr: 4e-3 ", "lr: fast ", 1))
        printed, flow_run, tasks = place.flow(code=1)
    finally:
        params.write_text(before)
    assert tasks == {"scan": "Failed"} and "Traceback" not in printed
    assert "dit: train.lr: input should be a valid number, got 'fast'" in flow_run["state"]["message"]
    assert {path: path.stat().st_mtime_ns for path in (place.root / "artifacts").rglob("*")} == files
    assert (place.root / "dvc.lock").read_bytes() == lock


def test_a_flow_killed_while_training_and_run_again_equals_an_uninterrupted_one(place, tmp_path):
    own = shutil.ignore_patterns("local", "prefect.toml")
    copy = shutil.copytree(place.root, tmp_path / "copy", symlinks=True, ignore=own)
    lengthen(copy)
    whole = shutil.copytree(copy, tmp_path / "whole", symlinks=True)
    environment = checkout.environment(**place.more, PREFECT_API_URL=f"http://127.0.0.1:{place.port}/api")
    counts, before = [], states(copy)

    def trainers():
        counts.append(sum("dit.stages.train" in stage.cmdline() for stage in stages_in(copy)))
        return counts[-1]

    def start(log):
        with Path(log).open("w") as file:
            return subprocess.Popen(FLOW, cwd=copy, env=environment, stdout=file, stderr=subprocess.STDOUT)

    killed = start(tmp_path / "killed.log")
    try:
        until(lambda: trainers() and states(copy) - before, 120)
    finally:
        os.kill(killed.pid, signal.SIGKILL)
    assert killed.wait(10) == -signal.SIGKILL
    again = start(tmp_path / "again.log")  # at once: the killed flow's training may still be saving
    try:
        until(lambda: trainers() is not None and again.poll() is not None, 200)
    finally:
        again.kill()
    printed = (tmp_path / "again.log").read_text()
    assert again.returncode == 0, printed
    assert "going on at step" in printed and "Finished in state Completed" in printed
    assert max(counts) == 1, counts
    assert not processes_in(copy)
    checkout.repro(whole, "train")
    for name in ("model.safetensors", "ema/step-00001500.safetensors", "loss.csv"):
        once = (whole / "artifacts" / "train" / name).read_bytes()
        assert (copy / "artifacts" / "train" / name).read_bytes() == once, name
    client, runs = mlflow_runs(copy)
    assert len(runs) == 2 and {run.info.status for run in runs} == {"FINISHED"}  # the short training's, and this one's
    assert read(copy, "register/model.json")["registered"]
