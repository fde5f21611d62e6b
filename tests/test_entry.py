"""The stage's door, with real processes, signals and locks."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

STAGE = """
import signal, sys, time
from dataclasses import dataclass
from types import SimpleNamespace
from dit import entry, outcome
from dit.paths import Paths, publish
from dit.places import OutOfReach

@dataclass(frozen=True)
class Section:
    what: str

def toy(toy: Section, *, paths: Paths) -> None:
    if toy.what == "refuse":
        raise ValueError("toy.what: refuse is no good: use work")
    if toy.what == "fail":
        raise RuntimeError("broken")
    if toy.what == "reach":
        raise OutOfReach("s3://b did not answer")
    if toy.what == "bug":
        toy.no_such_thing
    if toy.what == "full":
        with publish(paths.artifacts / "toy", paths.scratch) as folder:
            (folder / "half").write_text("half")
            raise OSError(28, "No space left on device")
    if toy.what == "sleep":
        print("sleeping", flush=True)
        time.sleep(200)
    if toy.what == "step":
        with entry.deferred_interrupts() as stop:
            print("sleeping", flush=True)
            while not stop():
                time.sleep(0.05)
        (paths.root / "saved").write_text("yes")
        raise entry.Interrupted("stopped at step 3")
    if toy.what == "limit":
        with entry.deferred_interrupts(SimpleNamespace(time_limit_minutes=2 / 60)) as stop:
            while not stop(save_seconds=0.5):
                time.sleep(0.05)
        raise entry.Interrupted("stopped at step 3")
    if toy.what == "late":  # a signal comes when the work is done and its end is being told
        write = outcome.write_json
        outcome.write_json = lambda *told: (signal.raise_signal(signal.SIGTERM), write(*told))
    with publish(paths.artifacts / "toy", paths.scratch) as folder:
        (folder / "done").write_text("done")

if __name__ == "__main__":
    entry.main(toy)
"""


@pytest.fixture
def toy(tmp_path):
    (tmp_path / "toy.py").write_text(textwrap.dedent(STAGE))

    def start(what, **environment):
        (tmp_path / "params.yaml").write_text(f"toy: {{what: {what}}}\n")
        return subprocess.Popen(
            [sys.executable, "toy.py"],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return tmp_path, start


def outcome(folder):
    return json.loads((folder / "scratch" / "outcome" / "toy.json").read_text())


@pytest.mark.parametrize(
    "what,code,status,line",
    [
        ("work", 0, "completed", ""),
        ("late", 0, "completed", ""),
        ("refuse", 2, "refused", "toy: toy.what: refuse is no good: use work\n"),
        ("3", 2, "refused", "toy: toy.what: input should be a valid string, got 3\n"),
        (
            "full",
            1,
            "failed",
            "toy: the disk is full: free some space and run again; no half result was written, the last one is in DVC's cache (`dvc checkout`) ([Errno 28] No space left on device)\n",
        ),
    ],
)
def test_each_end_has_its_exit_code_its_line_and_its_outcome(toy, what, code, status, line):
    folder, start = toy
    _, stderr = (process := start(what)).communicate(timeout=120)
    assert (process.returncode, stderr) == (code, line)
    told = outcome(folder)
    assert (told["status"], told["exit_code"], told["retry"]) == (status, code, False)
    assert (folder / "artifacts" / "toy").exists() == (what in ("work", "late"))
    assert not list((folder / "scratch").glob("publish/*"))


def test_a_bug_shows_its_traceback(toy):
    folder, start = toy
    _, stderr = (process := start("fail")).communicate(timeout=120)
    assert process.returncode == 1 and "Traceback" in stderr and stderr.endswith("toy: RuntimeError: broken\n")
    assert outcome(folder)["message"] == "RuntimeError: broken"


@pytest.mark.parametrize("what, retry", [("fail", True), ("reach", True), ("bug", False)])
def test_the_outcome_says_whether_another_try_may_mend_it(toy, what, retry):
    folder, start = toy
    start(what).communicate(timeout=120)
    assert outcome(folder)["status"] == "failed" and outcome(folder)["retry"] is retry


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
@pytest.mark.parametrize("what", ["sleep", "step"])
def test_a_signal_ends_it_with_75_and_lets_it_save(toy, what, number):
    folder, start = toy
    process = start(what)
    assert process.stdout.readline() == "sleeping\n"
    process.send_signal(number)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 75 and outcome(folder)["status"] == "interrupted" and outcome(folder)["retry"]
    assert "the same command goes on where this one stopped" in stderr and "Traceback" not in stderr
    assert (folder / "saved").exists() == (what == "step")
    assert not (folder / "artifacts").exists()


def test_a_time_limit_ends_it_too(toy):
    folder, start = toy
    process = start("limit", SLURM_JOB_END_TIME=str(int(time.time()) + 1000))
    process.communicate(timeout=120)
    assert process.returncode == 75 and outcome(folder)["message"].startswith("stopped at step 3")


def test_one_at_a_time_and_the_lock_dies_with_its_holder(toy):
    folder, start = toy
    first = start("sleep")
    assert first.stdout.readline() == "sleeping\n"
    second = start("work")
    assert (
        second.stdout.readline()
        == f"toy: waiting for process {first.pid} on {os.uname().nodename} (in {folder}), 0 s so far: it runs this stage already\n"
    )
    time.sleep(0.3)
    assert second.poll() is None and not (folder / "artifacts").exists()
    first.kill()
    assert second.wait(120) == 0 and (folder / "artifacts" / "toy" / "done").exists()
    first.wait()


def test_a_stage_that_is_one_process_work_refuses_to_be_several(toy):
    folder, start = toy
    process = start("work", RANK="0", WORLD_SIZE="2")
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 2 and outcome(folder)["status"] == "refused"
    assert stderr == "toy: 2 processes cannot share this stage: start it without torchrun\n"
    other = start("work", RANK="1", WORLD_SIZE="2")
    assert other.communicate(timeout=120) == ("", "") and other.returncode == 2, "one of them speaks"
    assert [file.name for file in (folder / "scratch" / "outcome").iterdir() if file.name == "toy.process-1.json"]
    assert not (folder / "artifacts").exists()


def test_it_ends_when_the_dvc_that_started_it_is_killed(toy):
    folder, _ = toy
    (folder / "params.yaml").write_text("toy: {what: step}\n")
    (folder / "dvc").write_text("import os, subprocess, sys\nsubprocess.run([sys.executable, 'toy.py'])\n")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "DVC_STAGE": "toy"}
    dvc = subprocess.Popen([sys.executable, "dvc"], cwd=folder, env=environment, stdout=subprocess.PIPE, text=True)
    assert dvc.stdout.readline() == "sleeping\n"
    dvc.kill()
    dvc.wait()
    deadline = time.monotonic() + 60
    while not (folder / "saved").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert (folder / "saved").exists(), "the stage outlived its DVC"


def test_code_of_another_checkout_is_refused(tmp_path):
    (tmp_path / "dit").mkdir()
    (tmp_path / "dit" / "entry.py").write_text("")
    script = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from dit import entry; entry._refuse_foreign_code()"
    done = subprocess.run([sys.executable, "-P", "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and "would run on the artifacts of" in done.stderr
