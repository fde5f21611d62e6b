"""flows/train_dit.py under a real Prefect server (its test harness), and prefect.yaml."""

import fcntl
import os
import signal
import subprocess
import sys

import pytest
import toy_pipeline
from toy_pipeline import REPOSITORY, processes_in, tell, train_started, until

toy, toy_template = toy_pipeline.toy, toy_pipeline.toy_template


@pytest.fixture(scope="module")
def server():
    """A Prefect server of its own on a fresh database, for this file."""
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=120):
        yield


@pytest.fixture
def run(server, toy, monkeypatch):
    """Run the flow in the toy checkout; gives its state and {task: (state's name, message)}."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId

    from flows.train_dit import train_dit

    monkeypatch.chdir(toy)

    def go(**parameters):
        state = train_dit(**parameters, return_state=True)
        with get_client(sync_client=True) as client:
            only = FlowRunFilter(id=FlowRunFilterId(any_=[state.state_details.flow_run_id]))
            flow_run = client.read_flow_run(state.state_details.flow_run_id)
            tasks = until(lambda: finished(client.read_task_runs(flow_run_filter=only)))
            ordered = sorted(tasks, key=lambda task: task.start_time)
            return state, {task.name: (task.state.name, task.state.message) for task in ordered}, flow_run

    return go


def finished(tasks):
    # Task runs reach the server a moment later, as events.
    return tasks if tasks and all(task.state and task.state.is_final() for task in tasks) else None


def test_one_task_a_stage_all_cached_the_second_time_and_forced_if_asked(run, toy):
    from prefect.artifacts import Artifact

    state, tasks, flow_run = run(preset="digits")
    assert state.is_completed(), state.message
    assert list(tasks) == ["scan", "train", "report"]
    assert {name for name, _ in tasks.values()} == {"Completed"}
    assert flow_run.name.startswith("digits ")
    page = Artifact.get("train-dit")
    assert "preset digits" in page.data and "| train | Completed, " in page.data

    state, tasks, _ = run(preset="digits")
    assert state.is_completed() and state.message == "3 stages, 3 of them cached"
    assert {name for name, _ in tasks.values()} == {"Cached"}

    _, tasks, _ = run(force=["train"])
    assert [name for name, _ in tasks.values()] == ["Cached", "Completed", "Cached"]


def test_a_preset_is_put_into_params_and_what_was_there_is_kept(run, toy):
    before = (toy / "params.yaml").read_text()
    state, _, flow_run = run(preset="smoke")
    assert state.is_completed() and flow_run.name.startswith("smoke ")
    assert (toy / "params.yaml").read_text() == "preset: smoke\ntrain:\n  max_steps: 1  # a comment to keep\n"
    [kept] = (toy / "scratch").glob("params.before-smoke.*.yaml")
    assert kept.read_text() == before
    (toy / "params.yaml").write_text("preset: mine\ntrain:\n  max_steps: 7\n")
    assert run(preset="smoke")[0].is_completed()
    other = {file.read_text() for file in (toy / "scratch").glob("params.before-smoke.*.yaml") if file != kept}
    assert other == {"preset: mine\ntrain:\n  max_steps: 7\n"} and kept.read_text() == before


def test_a_failed_stage_fails_the_run_with_its_last_lines(run, toy):
    tell(toy, fail="train.lr must be positive")
    state, tasks, _ = run()
    assert state.is_failed() and "train.lr must be positive" in state.message
    assert list(tasks) == ["scan", "train"]
    assert tasks["train"][0] == "Failed" and "last words of train.py" in tasks["train"][1]


def test_an_interrupted_stage_is_no_success(run, toy):
    tell(toy, seconds=60)
    interrupter = subprocess.Popen([sys.executable, "-c", INTERRUPTER], cwd=toy)
    state, tasks, _ = run()
    interrupter.wait()
    assert state.is_failed() and state.name == "Interrupted"
    assert tasks["train"] == ("Interrupted", "interrupted at step 3")
    tell(toy)
    state, tasks, _ = run()
    assert [name for name, _ in tasks.values()] == ["Cached", "Completed", "Completed"]


INTERRUPTER = """
import os, signal, time
while not os.path.exists("scratch/pid"):
    time.sleep(0.05)
os.kill(int(open("scratch/pid").read()), signal.SIGTERM)
"""


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"force": ["trian"]}, "force: no stage trian in dvc.yaml: choose among scan, train, report"),
        ({"preset": "smoke", "force": ["scan", "trian"]}, "force: no stage trian in dvc.yaml"),
        ({"preset": "digit"}, "preset 'digit' does not exist"),
    ],
)
def test_what_is_not_there_is_refused_before_anything_is_changed(run, toy, caplog, parameters, message):
    from flows.train_dit import train_dit

    before = contents(toy)
    state = train_dit(**parameters, return_state=True)
    assert state.is_failed() and state.message.startswith(message)
    assert contents(toy) == before
    assert "Finished in state Failed" in caplog.text and "Traceback" not in caplog.text


def contents(root):
    """What is in the checkout, scratch/lock and DVC's own files apart."""
    own = (root / "scratch" / "lock", root / ".dvc" / "tmp")
    return {
        file: file.read_bytes()
        for file in root.rglob("*")
        if file.is_file() and not any(file.is_relative_to(folder) for folder in own)
    }


@pytest.mark.parametrize(
    ("arguments", "params", "line"),
    [
        (["--preset", "nosuch"], None, "preset 'nosuch' does not exist: choose one of digits, smoke, xl2"),
        (["--force", "nosuch"], None, "force: no stage nosuch in dvc.yaml: choose among scan, train, report"),
        (["--preset", "smoke", "--force", "nosuch"], None, "force: no stage nosuch in dvc.yaml"),
        ([], "train: [1\n  lr: 2\n", "{root}/params.yaml is not readable YAML: "),
        (["--preset", "smoke"], "train: {{\n", "{root}/params.yaml is not readable YAML: "),
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
    done = subprocess.run(command, cwd=toy, env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1), done.stdout + done.stderr
    assert done.stderr.startswith("train-dit: " + line.format(root=toy))
    assert contents(toy) == before  # and no server was started: the checkout holds no record of one


def test_a_second_run_waits_for_the_first(run, toy):
    lock = toy / "scratch" / "lock" / "flow"
    lock.parent.mkdir(parents=True)
    script = f"""if True:
        import fcntl, time
        file = open({str(lock)!r}, "w")
        fcntl.flock(file, fcntl.LOCK_EX)
        print(flush=True)
        time.sleep(1.5)
    """
    first = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    first.stdout.readline()
    state, tasks, _ = run()
    assert first.poll() == 0 and state.is_completed()
    with lock.open() as file:  # and is free again
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    first.stdout.close()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_run_in_a_process_of_its_own_ends_with_all_it_started(server, toy, number):
    from prefect.settings import get_current_settings

    tell(toy, seconds=60, child=True)
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "PREFECT_API_URL": get_current_settings().api.url}
    flow = subprocess.Popen([sys.executable, "-m", "flows.train_dit"], cwd=toy, env=environment)
    train_started(toy, seconds=60)
    flow.send_signal(number)
    assert flow.wait(timeout=90) == (130 if number == signal.SIGINT else -number)
    until(lambda: not processes_in(toy), seconds=30)
    assert (toy / "scratch" / "saved").exists()


def test_the_exit_code_tells_how_it_went(server, toy):
    from prefect.settings import get_current_settings

    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "PREFECT_API_URL": get_current_settings().api.url}
    command = [sys.executable, "-m", "flows.train_dit", "--preset", "smoke"]
    done = subprocess.run(command, cwd=toy, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "Finished in state Completed('3 stages, 0 of them cached')" in done.stdout + done.stderr
    tell(toy, fail="no luck")
    failing = [*command, "--force", "train"]
    assert subprocess.run(failing, cwd=toy, env=environment, capture_output=True, timeout=60).returncode == 1
    unknown = [*command[:-1], "smok"]
    done = subprocess.run(unknown, cwd=toy, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and done.stderr.startswith("train-dit: preset 'smok' does not exist")


def test_each_deployment_is_a_preset_and_says_what_it_does():
    from ruamel.yaml import YAML

    plan = YAML(typ="safe").load(REPOSITORY / "prefect.yaml")
    deployments = {one["name"]: one for one in plan["deployments"]}
    assert {"digits", "smoke", "xl2"} <= set(deployments)
    for name, one in deployments.items():
        assert (REPOSITORY / "presets" / f"{name}.yaml").exists(), f"presets/{name}.yaml is not there"
        assert one["parameters"] == {"preset": name} and one["description"]
        assert one["entrypoint"] == "flows/train_dit.py:train_dit"
    assert deployments["xl2"]["work_pool"]["name"] == "gpu"
    assert str(REPOSITORY) not in (REPOSITORY / "prefect.yaml").read_text()
