import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dit import resume
from dit.checkpoint import TrainingState, save_state
from dit.paths import Paths


@pytest.fixture
def paths(tmp_path):
    (tmp_path / "model.py").write_text("one")
    (tmp_path / "dvc.yaml").write_text("stages: {train: {deps: [artifacts/encode, model.py]}}\n")
    return Paths(tmp_path)


def trained(paths, step, name="abc"):
    work = resume.begin(paths, name, max_steps=10)
    save_state(work.folder, TrainingState(step, {"a": torch.ones(1)}, {"rows": []}), keep=2)
    return work


def record(paths, export):
    (paths.root / "dvc.lock").write_text(f"stages: {{train: {{outs: [{{path: artifacts/train, md5: {export}}}]}}}}\n")


def test_the_same_training_goes_on_and_another_begins(paths, capsys):
    trained(paths, 4).note(mlflow_run_id="r1")
    work = resume.begin(paths, "abc", max_steps=10)
    assert work.state.step == 4 and work.notes["mlflow_run_id"] == "r1"
    assert "going on at step 4 of 10" in capsys.readouterr().out
    assert resume.begin(paths, "other", max_steps=10).state is None


def test_finished_but_unknown_to_dvc_is_exported_again(paths):
    trained(paths, 10).note(export="x.dir")
    record(paths, "y.dir")
    assert resume.begin(paths, "abc", max_steps=10).state.step == 10


def test_finished_and_recorded_starts_afresh_when_asked_to_run(paths, capsys):
    trained(paths, 10).note(export="x.dir", mlflow_run_id="r1")
    record(paths, "x.dir")
    work = resume.begin(paths, "abc", max_steps=10)
    assert work.state is None and "mlflow_run_id" not in work.notes and "starting afresh" in capsys.readouterr().out


def test_recorded_and_raised_goes_on(paths):
    trained(paths, 10).note(export="x.dir")
    record(paths, "x.dir")
    assert resume.begin(paths, "abc", max_steps=20).state.step == 10


def test_lowered_below_what_was_done_starts_afresh(paths):
    trained(paths, 10)
    assert resume.begin(paths, "abc", max_steps=5).state is None


def test_what_was_just_set_aside_is_not_pruned(paths):
    trained(paths, 4)
    os.utime(paths.scratch / "train" / "abc", (0, 0))
    for number in range(3):
        trained(paths, 4, f"n{number}")
    (paths.root / "model.py").write_text("two")
    resume.begin(paths, "abc", max_steps=10)
    assert (paths.scratch / "train" / "abc.1").exists()


def test_changed_code_starts_afresh_and_says_how_to_go_on(paths, capsys, monkeypatch):
    trained(paths, 4)
    (paths.root / "model.py").write_text("two")
    assert resume.begin(paths, "abc", max_steps=10).state is None
    said = capsys.readouterr().out
    assert "To go on with the old state instead: DIT_CONTINUE=abc.1 dvc repro" in said
    monkeypatch.setenv("DIT_CONTINUE", "abc.1")
    work = resume.begin(paths, "abc", max_steps=10)
    assert work.state.step == 4 and len(work.notes["earlier_code"]) == 1
    monkeypatch.delenv("DIT_CONTINUE")
    assert resume.begin(paths, "abc", max_steps=10).state.step == 4


@pytest.mark.parametrize("wanted", ["nothing.1", "other.1"])
def test_only_the_same_training_can_be_continued(paths, monkeypatch, wanted):
    trained(paths, 4, "other.1")
    monkeypatch.setenv("DIT_CONTINUE", wanted)
    with pytest.raises(ValueError, match="DIT_CONTINUE"):
        resume.begin(paths, "abc", max_steps=10)


def test_the_last_few_are_kept_and_one_command_cleans(paths):
    for number in range(7):
        trained(paths, 4, f"n{number}")
    assert len(list((paths.scratch / "train").iterdir())) == resume.KEEP
    assert resume.clean(paths) > 0 and not list((paths.scratch / "train").iterdir())


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
