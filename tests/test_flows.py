"""flows/train_dit.py under a real Prefect server (its test harness), and prefect.yaml."""

import os
import signal
import subprocess
import sys

import pytest
import toy_pipeline
from prefect import flow
from toy_pipeline import REPOSITORY, processes_in, tell, train_started
from waiting import until

from flows import worktrees
from flows.workplace import Wanted

toy, toy_template = toy_pipeline.toy, toy_pipeline.toy_template


@pytest.fixture
def run(server, toy, monkeypatch):
    """Run the flow in the toy checkout; gives its state and {task: (state's name, message)}."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId

    from flows import dag
    from flows.train_dit import train_dit

    monkeypatch.chdir(toy)
    stages, run_stage = set(), dag.run_stage
    monkeypatch.setattr(
        dag, "run_stage", lambda name, *told, **more: stages.add(name) or run_stage(name, *told, **more)
    )

    def go(**parameters):
        stages.clear()
        state = train_dit(**parameters, return_state=True)
        with get_client(sync_client=True) as client:
            only = FlowRunFilter(id=FlowRunFilterId(any_=[state.state_details.flow_run_id]))
            flow_run = client.read_flow_run(state.state_details.flow_run_id)
            tasks = until(lambda: finished(client.read_task_runs(flow_run_filter=only), stages))
            ordered = sorted(tasks, key=lambda task: task.start_time)
            return state, {task.name: (task.state.name, task.state.message) for task in ordered}, flow_run

    return go


def finished(tasks, stages):
    # Task runs reach the server a moment later, as events: one of them may not be there at all yet.
    ended = {task.name for task in tasks if task.state and task.state.is_final()}
    return tasks if tasks and ended >= stages | {task.name for task in tasks} else None


def test_one_task_a_stage_all_cached_the_second_time_and_forced_if_asked(run, toy):
    from prefect.artifacts import Artifact

    state, tasks, flow_run = run(preset="digits")
    assert state.is_completed(), state.message
    assert list(tasks) == ["scan", "train", "report"]
    assert {name for name, _ in tasks.values()} == {"Completed"}
    assert flow_run.name.startswith("digits ")
    page = Artifact.get("train-dit")
    assert "digits" in page.data and "| train | Completed" in page.data

    state, tasks, _ = run(preset="digits")
    assert state.is_completed() and state.message.startswith("3 stages, 3 of them cached; dit adopt ")
    assert {name for name, _ in tasks.values()} == {"Cached"}

    _, tasks, _ = run(force=["train"])
    assert [name for name, _ in tasks.values()] == ["Cached", "Completed", "Cached"]


def test_a_run_that_starts_again_forces_only_what_it_had_not_finished(run, toy):
    """As when its process was killed in the last stage: the worktree is still there."""
    from flows import walk, workplace

    @flow(name="killed", persist_result=False)
    def killed(go_on):
        with workplace.opened(toy, "0123456789", Wanted(), print) as place:
            states = walk.walk(place, ["scan", "train"], ["train", "report"])
            if not go_on:
                raise KeyboardInterrupt
            return {name: state.name for name, state in (states | walk.walk(place, ["report"], ["report"])).items()}

    with pytest.raises(KeyboardInterrupt):
        killed(False)
    assert killed(True) == {"scan": "Cached", "train": "Cached", "report": "Completed"}
    assert (toy / "scratch" / "tries").read_text() == "1"


def test_a_run_works_in_a_worktree_and_its_result_is_adopted(run, toy):
    before = contents(toy, own=("scratch", ".git", ".dvc"))
    state, _, flow_run = run(preset="smoke", set=["train.max_steps=2"])
    assert state.is_completed(), state.message
    assert contents(toy, own=("scratch", ".git", ".dvc")) == before and not list(toy.glob("scratch/worktrees/*"))
    assert flow_run.name.startswith("smoke train.max_steps=2 ")
    said = worktrees.adopt(toy, str(flow_run.id))
    assert f"runs/smoke-set/{str(flow_run.id)[:8]}" in said[0]
    assert "preset: smoke" in (toy / "params.yaml").read_text() and (toy / "model").read_text() == "weights"
    assert "max_steps: 2  # a comment to keep" in (toy / "params.yaml").read_text()


def test_a_refused_stage_fails_the_run_with_its_line_and_is_not_tried_again(run, toy):
    tell(toy, fail="train.lr must be positive")
    state, tasks, flow_run = run()
    assert state.is_failed() and state.message == "stage train: train.lr must be positive"
    assert list(tasks) == ["scan", "train"] and tasks["train"] == ("Failed", "train.lr must be positive")
    assert (toy / "scratch" / "tries").read_text() == "1"
    assert worktrees.lock_at(toy, f"runs/digits/{str(flow_run.id)[:8]}")["stages"].keys() == {"scan"}  # not lost


def test_a_stage_that_fails_twice_for_a_reason_that_passes_is_tried_again(run, toy):
    tell(toy, fail_times=2)
    state, tasks, _ = run()
    assert state.is_completed(), state.message
    assert tasks["train"][0] == "Completed" and (toy / "scratch" / "tries").read_text() == "3"


@pytest.mark.slow
def test_a_stage_that_fails_however_often_it_is_tried_is_lost(run, toy):
    tell(toy, fail_times=9)
    state, tasks, _ = run()
    assert state.is_failed() and state.name == "Lost" and (toy / "scratch" / "tries").read_text() == "3"


@pytest.mark.parametrize("number", [pytest.param(signal.SIGTERM, marks=pytest.mark.slow), signal.SIGKILL])
def test_a_stage_that_is_ended_from_outside_is_started_again(run, toy, number):
    tell(toy, seconds=60)  # only once
    environment = {**os.environ, "SIGNAL": str(int(number))}
    interrupter = subprocess.Popen([sys.executable, "-c", INTERRUPTER], cwd=toy, env=environment)
    state, tasks, _ = run()
    interrupter.wait()
    assert state.is_completed() and (toy / "scratch" / "tries").read_text() == "2", state.message
    assert [name for name, _ in tasks.values()] == ["Completed"] * 3


INTERRUPTER = """
import os, signal, time
while not os.path.exists("scratch/pid"):
    time.sleep(0.05)
os.kill(int(open("scratch/pid").read()), int(os.environ["SIGNAL"]))
"""


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"force": ["trian"]}, "force: no stage trian in dvc.yaml: choose among scan, train, report"),
        ({"preset": "smoke", "force": ["scan", "trian"]}, "force: no stage trian in dvc.yaml"),
        ({"preset": "digit"}, "preset 'digit' does not exist"),
        ({"set": ["train.max_step=1"]}, "set: train.max_step: no such setting"),
        ({"set": ["max_steps"]}, "set: "),
        ({"pool": "nosuch"}, "pool: the Prefect server knows no work pool 'nosuch'"),
        ({"branch": "runs/digits/00000000"}, "git knows no commit runs/digits/00000000"),
    ],
)
def test_what_is_not_there_is_refused_before_anything_is_changed(run, toy, caplog, parameters, message):
    from flows.train_dit import train_dit

    before = contents(toy)
    state = train_dit(**parameters, return_state=True)
    assert state.is_failed() and state.message.startswith(message)
    assert contents(toy) == before
    assert "Finished in state Failed" in caplog.text and "Traceback" not in caplog.text
    assert not worktrees.git(toy, "branch", "--list", "runs/*")  # with nothing on it


def contents(root, own=("scratch/lock", ".dvc/tmp", ".git")):
    """What is in the checkout, but for these folders."""
    return {
        file: file.read_bytes()
        for file in root.rglob("*")
        if file.is_file() and not any(file.is_relative_to(root / folder) for folder in own)
    }


@pytest.mark.parametrize(
    ("arguments", "params", "line"),
    [
        (["--preset", "nosuch"], None, "preset 'nosuch' does not exist: choose one of digits, smoke, xl2"),
        (["--force", "nosuch"], None, "force: no stage nosuch in dvc.yaml: choose among scan, train, report"),
        (["--preset", "smoke", "--force", "nosuch"], None, "force: no stage nosuch in dvc.yaml"),
        ([], "train: [1\n  lr: 2\n", "{root}/params.yaml is not readable YAML: "),
        (["--set", "train.max_step=1"], None, "set: train.max_step: no such setting"),
        (["--force", "train"], "- 1\n", "{root}/params.yaml must hold sections"),
    ],
)
def test_bad_input_at_the_terminal_is_one_line_and_changes_nothing(toy, tmp_path, arguments, params, line):
    if params:
        (toy / "params.yaml").write_text(params)
    before = contents(toy)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PREFECT_")}
    environment |= {"PYTHONPATH": str(REPOSITORY), "PREFECT_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-m", "flows.train_dit", *arguments]
    done = subprocess.run(command, cwd=toy, env=environment, capture_output=True, text=True, timeout=200)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1), done.stdout + done.stderr
    assert done.stderr.startswith("train-dit: " + line.format(root=toy))
    assert contents(toy) == before  # and no server was started: the checkout holds no record of one


@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow), signal.SIGKILL]
)
def test_a_run_in_a_process_of_its_own_ends_with_all_it_started(server, toy, number):
    from prefect.settings import get_current_settings

    tell(toy, seconds=60, child=True)
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "PREFECT_API_URL": get_current_settings().api.url}
    flow = subprocess.Popen([sys.executable, "-m", "flows.train_dit"], cwd=toy, env=environment)
    train_started(toy)
    flow.send_signal(number)
    assert flow.wait(timeout=90) == (130 if number == signal.SIGINT else -number)
    until(lambda: not processes_in(toy), seconds=60)
    assert (toy / "scratch" / "saved").exists()


@pytest.mark.slow
def test_the_exit_code_tells_how_it_went(server, toy):
    from prefect.settings import get_current_settings

    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "PREFECT_API_URL": get_current_settings().api.url}
    command = [sys.executable, "-m", "flows.train_dit", "--preset", "smoke"]
    done = subprocess.run(command, cwd=toy, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "3 stages, 0 of them cached; dit adopt " in done.stdout + done.stderr
    tell(toy, fail="no luck")
    failing = [*command, "--force", "train"]
    done = subprocess.run(failing, cwd=toy, env=environment, capture_output=True, text=True, timeout=200)
    assert (done.returncode, done.stdout) == (1, "train-dit: Failed: stage train: no luck\n")
    assert "no luck" not in done.stderr and "last words of train.py" in done.stderr
    unknown = [*command[:-1], "smok"]
    done = subprocess.run(unknown, cwd=toy, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 1 and done.stderr.startswith("train-dit: preset 'smok' does not exist")
