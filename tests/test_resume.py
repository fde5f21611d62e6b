import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from waiting import until

from dit import resume
from dit.paths import Paths
from dit.runtime import RunConfig
from dit.saving import Saver
from dit.states import TrainingState, latest_state


@pytest.fixture
def paths(tmp_path):
    (tmp_path / "model.py").write_text("one")
    (tmp_path / "dvc.yaml").write_text("stages: {train: {deps: [artifacts/encode, model.py]}}\n")
    return Paths(tmp_path)


def begin(paths, name, max_steps, **given):
    with resume.begun(paths, name, max_steps, **given) as work:
        return work


def trained(paths, step, name="abc", **given):
    work = begin(paths, name, max_steps=10, **given)
    saver = Saver(work.folder, 2, mirror=work.mirror)
    saver.save(TrainingState(step, {"a": torch.full((1,), float(step))}, {"rows": []}))
    saver.close()
    return work


def record(paths, export):
    (paths.root / "dvc.lock").write_text(f"stages: {{train: {{outs: [{{path: artifacts/train, md5: {export}}}]}}}}\n")


def test_the_same_training_goes_on_and_another_begins(paths, capsys):
    trained(paths, 4).note(mlflow_run_id="r1")
    work = begin(paths, "abc", max_steps=10)
    assert work.state.step == 4 and work.notes["mlflow_run_id"] == "r1"
    assert "going on at step 4 of 10" in capsys.readouterr().out
    assert begin(paths, "other", max_steps=10).state is None


def test_finished_but_unknown_to_dvc_is_exported_again(paths):
    trained(paths, 10).note(export="x.dir")
    record(paths, "y.dir")
    assert begin(paths, "abc", max_steps=10).state.step == 10


def test_finished_and_recorded_starts_afresh_when_asked_to_run(paths, capsys):
    trained(paths, 10).note(export="x.dir", mlflow_run_id="r1")
    record(paths, "x.dir")
    work = begin(paths, "abc", max_steps=10)
    assert work.state is None and "mlflow_run_id" not in work.notes and "starting afresh" in capsys.readouterr().out


def test_a_flow_that_forces_it_takes_over_nothing_that_is_finished_but_goes_on_with_what_is_not(paths, monkeypatch):
    monkeypatch.setenv("DIT_AFRESH", "1")
    trained(paths, 4)
    assert begin(paths, "abc", max_steps=10).state.step == 4
    trained(paths, 10)
    assert begin(paths, "abc", max_steps=10).state is None and (paths.scratch / "train" / "abc.1").exists()


def test_recorded_and_raised_goes_on(paths):
    trained(paths, 10).note(export="x.dir")
    record(paths, "x.dir")
    assert begin(paths, "abc", max_steps=20).state.step == 10


def test_lowered_below_what_was_done_starts_afresh(paths):
    trained(paths, 10)
    assert begin(paths, "abc", max_steps=5).state is None


def test_what_was_just_set_aside_is_not_pruned(paths):
    trained(paths, 4)
    os.utime(paths.scratch / "train" / "abc", (0, 0))
    for number in range(3):
        trained(paths, 10, f"n{number}").note(export=str(number))
    (paths.root / "model.py").write_text("two")
    begin(paths, "abc", max_steps=10)
    assert (paths.scratch / "train" / "abc.1").exists()


def test_changed_code_starts_afresh_and_says_how_to_go_on(paths, capsys, monkeypatch):
    trained(paths, 4)
    (paths.root / "model.py").write_text("two")
    assert begin(paths, "abc", max_steps=10).state is None
    said = capsys.readouterr().out
    assert "To go on with the old state instead: DIT_CONTINUE=abc.1 dvc repro" in said
    monkeypatch.setenv("DIT_CONTINUE", "abc.1")
    work = begin(paths, "abc", max_steps=10)
    assert work.state.step == 4 and len(work.notes["earlier_code"]) == 1
    monkeypatch.delenv("DIT_CONTINUE")
    assert begin(paths, "abc", max_steps=10).state.step == 4


@pytest.mark.parametrize("wanted", ["nothing.1", "other.1"])
def test_only_the_same_training_can_be_continued(paths, monkeypatch, wanted):
    trained(paths, 4, "other.1")
    monkeypatch.setenv("DIT_CONTINUE", wanted)
    with pytest.raises(ValueError, match="DIT_CONTINUE"):
        begin(paths, "abc", max_steps=10)


def kept(paths):
    return sorted(folder.name for folder in (paths.scratch / "train").iterdir())


def test_the_last_few_are_kept_and_one_command_cleans(paths):
    for number in range(7):
        trained(paths, 10, f"n{number}").note(export=str(number))
        os.utime(paths.scratch / "train" / f"n{number}", (number, number))
    assert kept(paths) == ["n3", "n4", "n5", "n6"] and len(kept(paths)) == resume.KEEP
    assert resume.clean(paths) > 0 and not kept(paths)


def test_what_was_interrupted_waits_a_week_beside_the_last_few(paths):
    for number in range(7):
        trained(paths, 4, f"n{number}")
    assert len(kept(paths)) == 7
    long_ago = time.time() - 8 * 86400
    for number in range(5):
        os.utime(paths.scratch / "train" / f"n{number}", (long_ago + number, long_ago + number))
    trained(paths, 10, "last")
    assert kept(paths) == ["last", "n2", "n3", "n4", "n5", "n6"]


# Another process, of another worktree of the same checkout: it trains until the file `go` is there.
OTHER = """
import sys, time
from pathlib import Path
import torch
from dit import resume
from dit.paths import Paths
from dit.saving import Saver
from dit.states import TrainingState

def go(state=None):
    while not (paths.root / "go").exists():
        time.sleep(0.02)

paths, name, steps = Paths(Path(sys.argv[1])), sys.argv[2], int(sys.argv[3])
with resume.begun(paths, name, 10) as work:
    print("begun at", work.state.step if work.state else 0, flush=True)
    if len(sys.argv) == 4:
        go()
    saver = Saver(work.folder, 2, before=go)  # it may stop in the midst of its save
    saver.save(TrainingState(steps, {"a": torch.full((1,), float(steps))}, {"rows": []}))
    saver.close()
    work.note(export="x.dir")
"""


@pytest.fixture
def other(paths, tmp_path_factory):
    """other(name, steps) starts a training in a worktree of `paths` and gives the process and the worktree's Paths."""
    running = []

    def start(name, steps, *how):
        root = tmp_path_factory.mktemp("worktree")
        (root / "scratch").mkdir()
        (root / "scratch" / "home").write_text(f"{paths.root}\n")
        shutil.copy(paths.root / "dvc.yaml", root)
        shutil.copy(paths.root / "model.py", root)
        words = [sys.executable, "-c", OTHER, str(root), name, str(steps), *how]
        running.append(subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1]))
        return running[-1], Paths(root)

    yield start
    for process in running:
        process.kill()
        process.communicate()


def test_a_second_worktree_waits_and_takes_over_what_the_first_finished(paths, other):
    first, place = other("abc", 10)
    assert first.stdout.readline() == "begun at 0\n"
    second, second_place = other("abc", 10)
    said = second.stdout.readline()
    assert said.startswith(f"train: waiting for process {first.pid} on ") and "what it finishes is taken over" in said
    (second_place.root / "go").touch()
    (place.root / "go").touch()
    assert first.wait(timeout=120) == 0
    assert second.stdout.readline() == "going on at step 10 of 10\n"
    assert second.stdout.readline() == "begun at 10\n" and second.wait(timeout=120) == 0
    assert kept(paths) == ["abc"] and not (place.scratch / "train").exists()


def test_one_that_is_killed_in_a_save_leaves_its_training_to_who_waits(paths, other):
    trained(paths, 4)
    first, _ = other("abc", 10, "in its save")
    assert first.stdout.readline() == "going on at step 4 of 10\n" and first.stdout.readline() == "begun at 4\n"
    second, place = other("abc", 10)
    assert second.stdout.readline().startswith("train: waiting")
    half = paths.scratch / "train" / "abc" / "step-00000010.safetensors"
    until(half.exists)
    first.kill()
    assert second.stdout.readline() == "going on at step 4 of 10\n" and half.exists()
    (place.root / "go").touch()
    assert second.wait(timeout=120) == 0


def test_what_another_process_is_at_is_neither_pruned_nor_cleaned(paths, other):
    trained(paths, 10, "busy").note(export="old")
    process, place = other("busy", 20)
    while process.stdout.readline() != "begun at 10\n":
        pass
    os.utime(paths.scratch / "train" / "busy", (0, 0))
    for number in range(6):
        trained(paths, 10, f"n{number}").note(export=str(number))
        os.utime(paths.scratch / "train" / f"n{number}", (number + 1, number + 1))
    assert kept(paths) == ["busy", "n2", "n3", "n4", "n5"]
    (paths.scratch / "initial" / "weights").mkdir(parents=True)
    resume.clean(paths)
    assert kept(paths) == ["busy"] and (paths.scratch / "initial" / "weights").exists()
    (place.root / "go").touch()
    assert process.wait(timeout=120) == 0 and resume.clean(paths) > 0
    assert not kept(paths) and not (paths.scratch / "initial" / "weights").exists()


# Another machine: the same code and settings, a scratch of its own, and the mirror.


@pytest.fixture
def machine(paths, tmp_path_factory):
    """machine() gives the Paths of a fresh one."""

    def made():
        root = tmp_path_factory.mktemp("machine")
        for file in ("dvc.yaml", "model.py"):
            shutil.copy(paths.root / file, root)
        return Paths(root)

    return made


@pytest.fixture
def run(tmp_path_factory):
    return RunConfig(mirror=str(tmp_path_factory.mktemp("mirror")))


def test_another_machine_goes_on_with_what_is_newer_in_the_mirror(paths, machine, run, capsys):
    trained(paths, 4, run=run).note(mlflow_run_id="r1")
    trained(paths, 6, run=run)
    second = machine()
    work = begin(second, "abc", 10, run=run)
    assert work.state.step == 6 and work.state.read()["a"] == 6 and work.notes["mlflow_run_id"] == "r1"
    said = capsys.readouterr().out
    assert "run.mirror: took the state of step 6 from " in said and "going on at step 6 of 10" in said
    trained(second, 8, run=run)
    assert begin(paths, "abc", 10, run=run).state.step == 8, "and back"
    assert begin(paths, "abc", 10).state.step == 8, "it is here now"
    trained(paths, 9)
    assert begin(paths, "abc", 10, run=run).state.step == 9, "what is here is newer"


def test_other_code_begins_beside_what_the_old_code_left_in_the_mirror(paths, machine, run, monkeypatch):
    trained(paths, 6, run=run)
    (paths.root / "model.py").write_text("two")
    assert begin(paths, "abc", 10, run=run).state is None
    trained(paths, 2, run=run)
    assert begin(machine(), "abc", 10, run=run).state.step == 2
    (paths.root / "model.py").write_text("one")
    old = machine()
    assert begin(old, "abc", 10, run=run).state.step == 6, "nothing of it was lost"
    (old.root / "model.py").write_text("three")
    begin(old, "abc", 10, run=run)
    monkeypatch.setenv("DIT_CONTINUE", "abc.1")
    assert begin(old, "abc", 10, run=run).state.step == 6


def test_what_is_finished_in_the_mirror_is_exported_or_made_again(paths, machine, run, monkeypatch):
    trained(paths, 10, run=run).note(export="x.dir")
    assert begin(machine(), "abc", 10, run=run).state.step == 10, "DVC does not know it there"
    assert begin(machine(), "abc", 5, run=run).state is None, "fewer steps"
    monkeypatch.setenv("DIT_AFRESH", "1")
    assert begin(machine(), "abc", 10, run=run).state is None
    trained(machine(), 4, run=run)
    assert begin(machine(), "abc", 10, run=run).state.step == 4, "it took the other's place"


def test_a_mirror_that_can_not_be_is_said_before_anything_is_trained(paths):
    (paths.root / "file").touch()
    with pytest.raises(ValueError, match="^run.mirror: .*file/train/abc-.* can't be written to"):
        begin(paths, "abc", 10, run=RunConfig(mirror="file"))


def of_two(world, paths, run):
    with resume.begun(paths, "abc", 10, run=run, world=world) as work:
        work.note(rank=world.rank)
        first = work.folder, work.state, work.mirror is not None, work.notes["rank"]
    os.environ["DIT_CONTINUE"] = "nothing.1"
    try:
        with resume.begun(paths, "abc", 10, run=run, world=world):
            pass
    except ValueError as error:
        return first, str(error)


def test_several_processes_have_the_same_work_and_the_same_errors(paths, run):
    from test_parts import two

    folder = trained(paths, 4).folder
    (first, error), (second, other) = two(of_two, paths, run)
    assert first == (folder, latest_state(folder), True, 0) and second == (folder, latest_state(folder), False, 1)
    assert error == other and "DIT_CONTINUE: there is no set-aside training" in error
    assert '"rank": 0' in (folder / "work.json").read_text()


def test_the_hash_is_dvcs_own(tmp_path):
    folder = tmp_path / "out"
    (folder / "sub").mkdir(parents=True)
    (folder / "b.txt").write_text("b")
    (folder / "sub" / "ä.bin").write_bytes(bytes(range(256)))
    (folder / "sub.txt").write_text("")
    (tmp_path / ".dvc").mkdir()
    (tmp_path / ".dvc" / "config").write_text("[core]\n no_scm = true\n")
    subprocess.run([sys.executable, "-m", "dvc", "add", "-q", "out"], cwd=tmp_path, check=True)
    assert f"md5: {resume.dvc_hash(folder)}\n" in Path(tmp_path / "out.dvc").read_text()
