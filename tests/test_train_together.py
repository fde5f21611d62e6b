"""dvc.yaml's command of the stage `train` with two processes: stopped and killed, it ends as if nothing had happened."""

import contextlib
import json
import shlex
import signal
import sys
from pathlib import Path

import psutil
import pytest
from checkout import environment
from tiny_training import NOWHERE, another, counted, write_project, written
from waiting import until

from dit.config import read_params

ROOT = Path(__file__).parents[1]
STEPS = {"ddp": 450, "fsdp": 60}  # many more than are made while a process is ended
RUN = {"processes": 2, "restarts": 1, "log_every_steps": 7, "checkpoint_every_steps": 5}
SETTINGS = {"snapshot_every_steps": 50, "grad_clip": 1.0, "lr": 1e-3}


class Command:
    """The command in a project, as DVC starts it. `team` are torchrun and the ranks, in their order."""

    def __init__(self, project):
        words = shlex.split(read_params(ROOT / "dvc.yaml")["stages"]["train"]["cmd"])
        assert words[0] == "python"
        self.project, self.seen = project, set()
        with open(project / "said", "a") as said:
            more = {**NOWHERE, "PYTHONPATH": str(ROOT), "DIT_SAVE_SECONDS": "60"}
            given = {"cwd": project, "env": environment(**more), "stdout": said, "stderr": said}
            self.launcher = psutil.Popen([sys.executable, *words[1:]], **given)

    def team(self):
        def ranks():
            assert self.running(), self.text()
            told = {}
            for process in self.seen:
                with contextlib.suppress(psutil.Error):
                    told[process.environ().get("RANK")] = process
            return told

        told = until(lambda: (found := ranks()).keys() >= {"0", "1"} and found, pause=0.05)
        return told["0"].parent(), told["0"], told["1"]

    def running(self):
        """Whether it has not ended; every process that it has by now is noted."""
        with contextlib.suppress(psutil.Error):
            self.seen.update(self.launcher.children(recursive=True))
        return self.launcher.poll() is None

    def further(self):
        """Wait until two more states count than do now."""
        before = max(counted(self.project), default=0)
        until(lambda: max(counted(self.project), default=0) >= before + 10 or not self.running(), pause=0.05)
        assert self.running(), self.text()

    def end(self):
        """Wait for it: its exit code, and how it says that it ended. None of its processes is left."""
        until(lambda: not self.running(), 240, pause=0.1)
        _, left = psutil.wait_procs(self.seen, 30)
        assert not left, left
        outcome = json.loads((self.project / "scratch" / "outcome" / "train.json").read_text())
        return self.launcher.returncode, outcome["status"], outcome["retry"]

    def text(self):
        return (self.project / "said").read_text()


@pytest.fixture
def start():
    """start(project) is a Command; what of it is left at the test's end is killed."""
    started = []

    def begin(project):
        started.append(Command(project))
        return started[-1]

    yield begin
    for command in started:
        left = [*command.seen, command.launcher]
        with contextlib.suppress(psutil.Error):
            left += command.launcher.children(recursive=True)
        for process in left:
            with contextlib.suppress(psutil.Error):
                process.kill()
        command.launcher.wait()


@pytest.fixture
def projects(tmp_path, start):
    """projects(how): one that is trained by a command that nobody disturbed, and one that has not begun."""

    def made(how):
        whole = write_project(tmp_path / "whole", {**RUN, "parallel": how}, max_steps=STEPS[how], **SETTINGS)
        project = another(whole, tmp_path / "project")
        assert (command := start(whole)).end() == COMPLETED, command.text()
        assert "2 processes" in command.text() and "going on at" not in command.text()
        return whole, project

    return made


COMPLETED, INTERRUPTED, LOST = (0, "completed", False), (75, "interrupted", True), (1, "failed", True)


def assert_same(project, whole):
    assert {"model.safetensors", "loss.csv", "config.json"} < written(whole).keys()
    ours, theirs = written(project), written(whole)
    assert ours.keys() == theirs.keys() and [name for name in ours if ours[name] != theirs[name]] == []


@pytest.mark.slow
def test_fsdp_stopped_and_started_again_is_the_same_bit_for_bit(projects, start):
    whole, project = projects("fsdp")
    first = start(project)
    first.further()
    first.launcher.send_signal(signal.SIGTERM)
    assert first.end() == INTERRUPTED, first.text()
    step = counted(project)[-1]
    assert next(project.glob(f"scratch/train/*/step-{step:08d}")).is_dir(), "each process has written its part"
    assert not (project / "artifacts" / "train").exists()
    again = start(project)
    assert again.end() == COMPLETED and f"going on at step {step} of 60" in again.text()
    assert_same(project, whole)


@pytest.mark.slow
def test_ddp_of_which_each_process_is_lost_in_turn_is_the_same_bit_for_bit(projects, start):
    whole, project = projects("ddp")
    command = start(project)
    torchrun, *_ = command.team()
    command.further()
    torchrun.kill()
    assert command.end() == LOST and "torchrun was ended by SIGKILL" in command.text()
    command = start(project)
    command.team()
    command.further()
    command.launcher.send_signal(signal.SIGTERM)
    assert command.end() == INTERRUPTED, command.text()
    command = start(project)
    _, _, second = command.team()
    command.further()
    second.kill()
    assert command.end() == COMPLETED, command.text()  # torchrun has started both again
    assert command.text().count("going on at step") == 3, command.text()
    assert_same(project, whole)
