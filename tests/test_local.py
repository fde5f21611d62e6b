"""`dit up` and its like for real, on random ports and a toy checkout: up, runs by its worker, kills, down."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
import toy_pipeline
from ports import free_port
from toy_pipeline import processes_in, tell, train_started, with_code, words_of
from waiting import until

from flows import services

toy_template = toy_pipeline.toy_template
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
PREFECT = str(Path(sys.executable).with_name("prefect"))


class Checkout:
    """A toy checkout with its own ports and home folder, as a person would use it."""

    def __init__(self, root, home):
        self.root, self.home, self.port = root, home, free_port()
        keep = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "MLFLOW_", "PYTHONPATH"))}
        ports = {"PREFECT_PORT": str(self.port), "MLFLOW_PORT": str(free_port())}
        self.environment = {**keep, **ports, "HOME": str(home), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
        self.environment["DIT_SAVE_SECONDS"] = "40"
        self.environment["CUDA_VISIBLE_DEVICES"] = ""  # no worker for accelerators, on whatever machine
        self.folder = root / "scratch" / "local"

    def do(self, *command, code=0, seconds=400):
        """Run a command in the checkout; its output, once the exit code is checked."""
        done = subprocess.run(
            command, cwd=self.root, env=self.environment, capture_output=True, text=True, timeout=seconds
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    def local(self, what, *more, code=0):
        return self.do(sys.executable, "-m", "dit.cli", what, *more, code=code)

    def deploy_run(self, name, *options, code=0):
        """`prefect deployment run` as the README has it; returns the run's number."""
        said = self.do(PREFECT, "deployment", "run", name, *options, code=code)
        return re.search(r"UUID: ([0-9a-f-]{36})", said)[1]

    def ask(self, path, body=None):
        data = None if body is None else json.dumps(body).encode()
        url = f"http://127.0.0.1:{self.port}/api/{path}"
        with urllib.request.urlopen(urllib.request.Request(url, data, {"Content-Type": "application/json"})) as reply:
            return json.loads(reply.read())

    def state(self, run):
        return self.ask(f"flow_runs/{run}")["state"]["name"]

    def tasks(self, run):
        found = self.ask("task_runs/filter", {"flow_runs": {"id": {"any_": [run]}}, "sort": "EXPECTED_START_TIME_ASC"})
        return [task["state"]["name"] for task in found]

    def states(self, run):
        """All states of a run so far, by type."""
        found = self.ask(f"flow_run_states/?flow_run_id={run}")
        return [one["type"] for one in sorted(found, key=lambda one: one["timestamp"])]

    def pids(self):
        return {file.stem: json.loads(file.read_text())["pid"] for file in self.folder.glob("*.json")}


@pytest.fixture(scope="module")
def checkout(toy_template, tmp_path_factory):
    root, home = tmp_path_factory.mktemp("local") / "a checkout", tmp_path_factory.mktemp("home")
    shutil.copytree(toy_template, root, symlinks=True)
    source = (root / "train.py").read_text()
    saw = 'open(home + "/scratch/saw", "w").write(os.environ["MLFLOW_TRACKING_URI"] + " " + sys.executable)'
    given = 'open(home + "/scratch/gpus", "w").write(os.environ["CUDA_VISIBLE_DEVICES"])'
    (root / "train.py").write_text(
        source.replace("todo = ", f"if 'MLFLOW_TRACKING_URI' in os.environ:\n    {saw}\n    {given}\ntodo = ", 1)
    )
    it = Checkout(with_code(root), home)
    it.first_words = it.local("up")
    yield it
    it.local("down")
    left = processes_in(root) + list(services.marked(it.folder))
    services.signal_each([getattr(one, "pid", one) for one in left], signal.SIGKILL)
    assert not left
    assert not [file for file in home.rglob("*") if file.is_file()], "the person's own Prefect settings were touched"
    assert not (root / "prefect.toml").exists()


def engines(checkout):
    """The processes of the flows that the worker started."""
    return [one for one in processes_in(checkout.root) if "prefect.engine" in words_of(one)]


def quiet(checkout):
    """Wait until only the services are left in the checkout."""
    until(lambda: not [one for one in processes_in(checkout.root) if {"dvc", "train.py"} & set(words_of(one))], 60)


def test_up_says_where_things_are_and_a_second_one_uses_them(checkout):
    for line in (
        f"Prefect      http://127.0.0.1:{checkout.port}",
        "deployment   train-dit/{any, b2, digits, ",
        "deployment   retrain/{digits, imagenet256, imagenet512}\n",
        "deployment   (no worker for pool gpu: ",
    ):
        assert line in checkout.first_words
    before = checkout.pids()
    assert sorted(before) == ["mlflow", "prefect", "worker-local"]
    assert checkout.local("up").startswith("everything runs already")
    assert checkout.pids() == before
    assert "does not run" not in checkout.local("status")


def test_a_deployment_runs_to_completed_and_is_cached_then(checkout):
    tell(checkout.root)
    run = checkout.deploy_run("train-dit/digits", "--watch")
    until(lambda: checkout.tasks(run) == ["Completed"] * 3)
    uri, python = (checkout.root / "scratch" / "saw").read_text().split(" ", 1)
    assert uri == f"http://127.0.0.1:{checkout.environment['MLFLOW_PORT']}" and python == sys.executable
    run = checkout.deploy_run("train-dit/digits", "--watch")
    until(lambda: checkout.tasks(run) == ["Cached"] * 3)


def test_a_failed_stage_is_told_by_the_exit_code(checkout):
    tell(checkout.root, fail="no luck today")
    run = checkout.deploy_run("train-dit/smoke", "--watch", code=1)
    assert "no luck today" in checkout.ask(f"flow_runs/{run}")["state"]["message"]


def test_a_cancelled_run_saves_and_leaves_no_process_and_stays_cancelled(checkout):
    tell(checkout.root, seconds=100, child=True)
    (checkout.root / "scratch" / "saved").unlink(missing_ok=True)
    run = checkout.deploy_run("train-dit/digits", "--param", 'force=["train"]')
    train_started(checkout.root)
    checkout.do(PREFECT, "flow-run", "cancel", run)
    until(lambda: checkout.state(run) == "Cancelled")
    assert (checkout.root / "scratch" / "saved").exists()
    until(lambda: not engines(checkout), 60)
    quiet(checkout)


def test_two_runs_go_on_beside_each_other(checkout):
    tell(checkout.root, seconds=400)
    first = checkout.deploy_run("train-dit/digits", "--param", 'force=["train"]')
    train_started(checkout.root)
    second = checkout.deploy_run("train-dit/any", "--param", 'preset="smoke"', "--watch")  # the toy is slow but once
    assert (checkout.state(first), checkout.state(second)) == ("Running", "Completed")
    checkout.do(PREFECT, "flow-run", "cancel", first)
    until(lambda: checkout.state(first) == "Cancelled")
    quiet(checkout)


def test_a_flow_that_is_killed_starts_again_by_itself(checkout):
    tell(checkout.root, seconds=100)
    run = checkout.deploy_run("train-dit/digits", "--param", 'force=["train"]')
    train_started(checkout.root)
    before = checkout.pids()
    for engine in engines(checkout):
        engine.kill()
    until(lambda: "CRASHED" in checkout.states(run))
    until(lambda: checkout.state(run) == "Completed", 240)
    assert checkout.states(run).count("RUNNING") == 2 and "CRASHED" in checkout.states(run)
    assert checkout.pids() == before  # and the worker, to which it came back, runs
    assert "does not run" not in checkout.local("status")
    quiet(checkout)


def test_a_run_whose_worker_was_killed_too_starts_again_with_up(checkout):
    tell(checkout.root, seconds=100)
    run = checkout.deploy_run("train-dit/digits", "--param", 'force=["train"]')
    train_started(checkout.root)
    before = checkout.pids()
    name = checkout.ask(f"flow_runs/{run}")["name"]
    for pid in (before["worker-local"], *(engine.pid for engine in engines(checkout))):
        os.kill(pid, signal.SIGKILL)
    quiet(checkout)
    assert checkout.state(run) == "Running", "somebody else told the server: nothing is tested"
    said = checkout.local("up")
    assert f"ended before its time: {name}\n" in said
    after = checkout.pids()
    assert after["prefect"] == before["prefect"] and after["worker-local"] != before["worker-local"]
    until(lambda: checkout.state(run) == "Completed", 240)
    assert checkout.states(run).count("RUNNING") == 2


def test_down_ends_a_flow_that_saves_and_up_takes_it_up_again(checkout):
    tell(checkout.root, seconds=100, child=True)
    (checkout.root / "scratch" / "saved").unlink(missing_ok=True)
    run = checkout.deploy_run("train-dit/digits", "--param", 'force=["train"]')
    train_started(checkout.root)
    os.kill(checkout.pids()["worker-local"], signal.SIGKILL)  # it ends the flows of workers that are gone, too
    assert "1 flow(s) running" in checkout.local("status", code=1)
    name = checkout.ask(f"flow_runs/{run}")["name"]
    del checkout.environment["DIT_SAVE_SECONDS"]  # the flow's own counts, not that of whoever ends it
    said = checkout.local("down")
    assert "ending 1 running flow(s): a stage may save, up to 40 s\n" in said
    assert f"goes on at the next `up`: {name}\n" in said
    assert "ended 1 running flow(s), mlflow, prefect\n" in said
    assert (checkout.root / "scratch" / "saved").exists()
    assert not processes_in(checkout.root)
    assert checkout.local("down") == "nothing to end\n"
    assert "does not run" in checkout.local("status", code=1)
    assert "there is no Prefect server" in checkout.local("deploy", code=1)
    checkout.local("up")
    until(lambda: checkout.state(run) == "Completed" and not engines(checkout), 240)
    assert checkout.local("down") == "ended worker-local, mlflow, prefect\n"


def test_a_run_without_servers_starts_one_and_keeps_it_and_up_uses_it(checkout):
    tell(checkout.root)
    command = [sys.executable, "-m", "flows.train_dit", "--preset", "smoke", "--force", "scan"]
    said = checkout.do(*command)
    assert f"Prefect: http://127.0.0.1:{checkout.port} (it stays; `make down` ends it)" in said
    assert sorted(checkout.pids()) == ["prefect"]
    assert "stays" not in checkout.do(*command)
    before = checkout.pids()["prefect"]
    assert "starting mlflow" in checkout.local("up")  # and makes the deployments, which that server did not have
    assert checkout.pids()["prefect"] == before
    assert len(checkout.ask("deployments/filter", {})) == 21
    left_out = "left out     train-dit/on-kubernetes-gpu: the server has no work pool kubernetes-gpu"
    assert left_out in checkout.local("deploy")


def test_a_server_that_a_flow_in_a_terminal_uses_is_not_ended(checkout):
    tell(checkout.root, seconds=100)
    command = [sys.executable, "-m", "flows.train_dit", "--preset", "smoke", "--force", "train"]
    before = checkout.pids()
    with subprocess.Popen(command, cwd=checkout.root, env=checkout.environment) as flow:
        train_started(checkout.root, seconds=60)
        said = checkout.local("down", code=1)
        assert said.startswith(
            f"dit: process {flow.pid} (-m flows.train_dit --preset smoke --force train) uses the server"
        )
        flow.send_signal(signal.SIGINT)
        assert flow.wait(60) == 130
    assert checkout.pids() == before
    quiet(checkout)


def test_gpus_are_shared_out_as_asked_and_a_run_has_its_workers(checkout):
    tell(checkout.root)
    checkout.local("down")
    checkout.environment["CUDA_VISIBLE_DEVICES"] = "4,5,6,7"
    said = checkout.local("up", "--gpus-per-run", "2")
    assert "pool gpu     2 GPUs for each of 2 runs at a time" in said and "(no worker for pool gpu: " not in said
    assert sorted(checkout.pids()) == ["mlflow", "prefect", "worker-gpu-4", "worker-gpu-6", "worker-local"]
    again = checkout.local("up", "--gpus-per-run", "4", code=1)
    assert again.startswith("dit: the workers that run have 2 GPUs for each of 2 runs at a time: `dit down` first")
    run = checkout.deploy_run("train-dit/xl2", "--watch")  # begun on pool local, and done on pool gpu
    assert checkout.state(run) == "Completed"
    assert (checkout.root / "scratch" / "gpus").read_text() in ("4,5", "6,7")
    assert "ended worker-gpu-4, worker-gpu-6, worker-local, mlflow, prefect\n" in checkout.local("down")
