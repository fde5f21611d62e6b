"""flows/dag.py on a real DVC pipeline: order, what DVC skips, what fails, and that nothing outlives its walker."""

import os
import signal
import subprocess
import sys
import time

import pytest
import toy_pipeline
from hypothesis import given
from hypothesis import strategies as st
from toy_pipeline import REPOSITORY, processes_in, tell, train_started, words_of
from waiting import until

from dit import locks
from flows import dag

toy, toy_template = toy_pipeline.toy, toy_pipeline.toy_template

WALKER = """
import sys
from pathlib import Path
from dit import locks
from flows import dag
with locks.held(Path("scratch/lock/flow"), print, "the first walker") as hold:
    print(dag.run_stage("train", Path("."), lambda line: print(line, flush=True), hold=hold).status, flush=True)
"""


def walk(root, name="train", **options):
    lines = []
    return dag.run_stage(name, root, lines.append, **options), lines


@pytest.fixture
def scanned(toy):
    """The toy checkout, whose first stage is done."""
    assert walk(toy, "scan")[0].status == "ran"
    return toy


def start_walker(root):
    """A process that runs the train stage; returns it when that stage works."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    walker = subprocess.Popen([sys.executable, "-c", WALKER], cwd=root, env=environment, stdout=subprocess.PIPE)
    train_started(root)
    return walker


def test_stages_come_in_topological_order_with_what_they_need(toy):
    assert dag.stages(toy) == {"scan": (), "train": ("scan",), "report": ("train", "scan")}
    assert list(dag.stages(toy)) == ["scan", "train", "report"]


def test_a_broken_pipeline_is_refused_in_dvcs_words(toy):
    (toy / "dvc.yaml").write_text("stages:\n  scan:\n    comand: echo\n")
    with pytest.raises(ValueError, match="comand"):
        dag.stages(toy)


def test_a_stage_runs_once_and_is_cached_then(toy):
    first, lines = walk(toy, "scan")
    assert first.status == "ran" and "scanning" in lines
    assert not any("git add" in line for line in lines)
    assert walk(toy, "scan")[0].status == "cached"
    (toy / "listing").unlink()
    assert walk(toy, "scan")[0].status == "cached" and (toy / "listing").read_text() == "listing\n"
    forced, lines = walk(toy, "scan", force=True)
    assert forced.status == "ran" and "scanning" in lines


def test_a_stage_gets_this_interpreter_and_its_environment(scanned):
    (scanned / "train.py").write_text(
        "import os, shutil; open('model', 'w').write(os.environ['GIVEN'] + shutil.which('python'))"
    )
    assert walk(scanned, environment={"GIVEN": "given "})[0].status == "ran"
    assert (scanned / "model").read_text() == f"given {os.path.join(os.path.dirname(sys.executable), 'python')}"


def test_a_refusal_is_the_stages_own_line_and_a_failure_tells_its_last_lines_too(scanned):
    tell(scanned, fail="train.lr must be positive")
    result, _ = walk(scanned)
    assert (result.status, result.message) == ("failed", "train.lr must be positive")
    (scanned / "train.py").write_text(
        (scanned / "train.py").read_text().replace('outcome("refused", ', 'outcome("failed", ')
    )
    result, _ = walk(scanned)
    assert result.status == "failed" and result.message.startswith("train.lr must be positive\n")
    assert "last words of train.py" in result.message and "exited with 1" in result.message


def test_results_that_do_not_get_into_the_cache_are_no_success(scanned, monkeypatch):
    said = "ERROR: failed to transfer '1dca' - [Errno 28] No space left on device: 'a' -> 'b'"
    dvc = [sys.executable, "-c", f"print({said!r}); print('Updating lock file')"]  # of a folder it says so, and exits 0
    monkeypatch.setattr(dag, "_dvc_command", lambda *words: dvc)
    result, _ = walk(scanned)
    assert (result.status, result.message) == ("failed", f"not all of train's results are in DVC's cache: {said}")


def test_an_outcome_file_of_an_earlier_run_is_not_believed(scanned):
    tell(scanned, fail="an old message")
    walk(scanned)
    time.sleep(0.05)
    (scanned / "train.py").write_text("raise SystemExit('it failed anew')")
    result, _ = walk(scanned)
    assert result.status == "failed" and "an old message" not in result.message and "it failed anew" in result.message


def test_a_stage_that_was_interrupted_from_outside_is_no_success(scanned):
    tell(scanned, seconds=60)
    lines = []

    def interrupt_it(line):
        lines.append(line)
        if line.startswith("training with"):
            os.kill(train_started(scanned), signal.SIGTERM)

    result = dag.run_stage("train", scanned, interrupt_it)
    assert (result.status, result.message) == ("interrupted", "interrupted at step 3")
    assert "saved" in "\n".join(lines)


def test_an_interruption_lets_the_stage_save_and_leaves_no_process(scanned):
    tell(scanned, seconds=60, child=True)
    lines, asked = [], []

    def stop_when_it_trains(line):
        lines.append(line)
        if line.startswith("training with"):
            train_started(scanned)
            assert len(processes_in(scanned)) >= 4  # leash, DVC, stage and the child in a session of its own
            asked.append(time.monotonic())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        dag.run_stage("train", scanned, stop_when_it_trains)
    assert not processes_in(scanned)
    assert time.monotonic() - asked[0] < 15
    assert not [line for line in lines if "still run" in line], "one signal was enough"
    said = "\n".join(lines)  # DVC and its stage write to one pipe: a word of DVC's may stand before one of the stage's
    assert 0 <= said.find("saving") < said.find("saved"), said


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT])
def test_a_walker_that_is_ended_takes_everything_with_it(scanned, number):
    tell(scanned, seconds=60, child=True)
    walker = start_walker(scanned)
    walker.send_signal(number)
    walker.communicate()
    until(lambda: not processes_in(scanned), seconds=17)  # before the second signal
    assert (scanned / "scratch" / "saved").exists()
    assert (scanned / ".dvc" / "tmp" / "rwlock").read_text() == "{}"  # nothing that blocks the next run


def test_the_next_run_waits_for_a_stage_that_still_saves(scanned):
    tell(scanned, seconds=60)
    hold, said = scanned / "scratch" / "hold", []
    hold.touch()

    def say(line):
        said.append(line)
        hold.unlink(missing_ok=True)

    walker = start_walker(scanned)
    walker.kill()
    walker.communicate()
    with locks.held(scanned / "scratch" / "lock" / "flow", say, "the second"):
        assert (scanned / "scratch" / "saved").exists()
        assert f"the first walker (process {walker.pid}" in said[0]
    tell(scanned)
    assert walk(scanned)[0].status == "ran"


def test_a_stage_whose_dvc_is_killed_does_not_run_on(scanned):
    tell(scanned, seconds=60)
    walker = start_walker(scanned)
    dvc = next(process for process in processes_in(scanned) if "dvc" in words_of(process)[:3])
    dvc.kill()
    said, _ = walker.communicate(timeout=60)
    assert said.decode().splitlines()[-1] == "interrupted" and (scanned / "scratch" / "saved").exists()
    until(lambda: not processes_in(scanned))


@given(st.text(alphabet="ab\n é", max_size=30), st.integers(1, 5))
def test_lines_do_not_depend_on_how_the_bytes_arrive(text, size):
    data = text.encode()
    chunks = [data[i : i + size] for i in range(0, len(data), size)]
    assert list(dag._lines(chunks)) == [line.rstrip() for line in text.split("\n") if line.strip()]


def test_of_a_progress_bar_the_first_and_the_last_line_are_passed_on():
    bar = b"".join(b"\r\x1b[32m%d%%\x1b[0m" % percent for percent in range(101))
    assert list(dag._lines([b"start\n", bar, b"\nend"])) == ["start", "0%", "100%", "end"]
    assert list(dag._lines([b"1%\r2%\r3%\r\n"])) == ["1%", "3%"]


def test_of_a_slow_progress_bar_a_line_is_passed_on_now_and_then(monkeypatch):
    monkeypatch.setattr(dag, "PROGRESS_EVERY_SECONDS", 0.0)
    assert list(dag._lines([b"1%\r", b"2%\r", b"3%\n"])) == ["1%", "2%", "3%"]
