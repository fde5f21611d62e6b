"""The stage `train`, killed while it writes or sends something: the same command ends as if nothing had happened."""

import os
import shutil
import threading
import time
from pathlib import Path

import pytest
from test_storage import credentials, faulty  # noqa: F401 (fixtures)
from tiny_training import NOWHERE, another, counted, ended, killed, write_project, written
from waiting import until

RUN = {"log_every_steps": 3, "checkpoint_every_steps": 4}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A training that nobody disturbs."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in NOWHERE.items():
            patch.setenv(name, value)
        project = write_project(tmp_path_factory.mktemp("whole"), RUN, snapshot_every_steps=5)
        ended(project)
    assert {"model.safetensors", "loss.csv", "ema/step-00000010.safetensors"} <= written(project).keys()
    assert len(written(project)["loss.csv"].splitlines()) == 1 + 4  # rows of three steps, and the last one of one
    return project


@pytest.fixture
def project(whole, tmp_path, monkeypatch):
    """The same training, which is mirrored to a folder, and has not begun."""
    for name, value in NOWHERE.items():
        monkeypatch.setenv(name, value)
    return mirrored(another(whole, tmp_path / "project"), tmp_path / "mirror")


def mirrored(project, place):
    params = project / "params.yaml"
    params.write_text(params.read_text().replace('"run": {', f'"run": {{\n  "mirror": "{place}",'))
    return project


def disk_that_hangs(root, pattern):
    """From here on this process's disk never ends to write what is to be called so: it has half of it, by another name."""

    def hanging(move):
        def hangs(source, target, **given):
            if not Path(target).absolute().match(pattern):
                return move(source, target, **given)
            if Path(source).is_file():
                os.truncate(source, Path(source).stat().st_size // 2)
            (root / "hangs").touch()
            time.sleep(300)

        return hangs

    os.rename, os.replace = hanging(os.rename), hanging(os.replace)  # by these everything here comes to its name


HERE, THERE = "project/scratch/train/*/", "mirror/train/*/"
# What is being written when SIGKILL comes, and the step from which the same command goes on then, with what is here;
# None: averages may be copied with the state before them already.
PHASES = {
    "tensors": (HERE + "step-00000008.safetensors", 5),
    "averages": (HERE + "snapshots/power-0.1-00000005.safetensors", 4),
    "sidecar": (HERE + "step-00000008.json", 5),
    "the last sidecar": (HERE + "step-00000010.json", 8),
    "result": ("project/artifacts/train", 10),
    "copied tensors": (THERE + "step-00000010.safetensors", 10),
    "copied averages": (THERE + "snapshots/step-00000010.safetensors", None),
    "copied sidecar": (THERE + "step-00000010.json", 10),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "phase,lost", [*((phase, True) for phase in PHASES), *((phase, False) for phase in PHASES if "copied" not in phase)]
)
def test_sigkill_while_it_is_written_changes_nothing(whole, project, tmp_path, phase, lost):
    pattern, step = PHASES[phase]
    with killed(project, lambda: disk_that_hangs(tmp_path, pattern)):
        until(lambda: (tmp_path / "hangs").exists() and mirrored_steps(tmp_path), 30)
    assert not list(tmp_path.glob(pattern)) and not (project / "artifacts" / "train").exists()
    assert max(counted(project)) == step or step is None
    there = max(mirrored_steps(tmp_path))
    assert there < 10 or phase == "result"
    if lost:
        shutil.rmtree(project / "scratch")
    said = ended(project)
    assert f"going on at step {there if lost else step} of 10" in said
    assert ("run.mirror: took the state of step" in said) == lost
    assert written(project) == written(whole)


def mirrored_steps(tmp_path):
    return [int(file.stem.removeprefix("step-")) for file in (tmp_path / "mirror").glob("train/*/step-*.json")]


@pytest.mark.slow
def test_sigkill_in_the_first_copy_leaves_what_is_here(whole, project, tmp_path):
    with killed(project, lambda: disk_that_hangs(tmp_path, THERE + "step-00000004.safetensors")):
        until(lambda: (tmp_path / "hangs").exists() and max(counted(project), default=0) > 4)
    assert not mirrored_steps(tmp_path)
    assert "going on at step" in ended(project) and written(project) == written(whole)
    shutil.rmtree(project / "scratch")
    shutil.rmtree(project / "artifacts" / "train")
    ended(project)  # with what was copied since, if anything was left to do
    assert written(project) == written(whole)


@pytest.mark.slow
def test_killed_again_and_again_it_ends_as_if_it_had_not_been(whole, project, tmp_path):
    for phase in ("averages", "tensors", "sidecar", "the last sidecar", "result"):  # in the order in which they come
        with killed(project, lambda phase=phase: disk_that_hangs(tmp_path, PHASES[phase][0])):
            until((tmp_path / "hangs").exists, 30)
        (tmp_path / "hangs").unlink()
        assert not (project / "artifacts" / "train").exists()
    ended(project)
    assert written(project) == written(whole)


@pytest.mark.slow
@pytest.mark.parametrize("end,lost", [("safetensors", False), ("safetensors", True), ("json", True)])
def test_sigkill_while_a_bucket_takes_what_is_sent_changes_nothing(whole, tmp_path, monkeypatch, faulty, end, lost):  # noqa: F811
    for name, value in NOWHERE.items():
        monkeypatch.setenv(name, value)
    project = mirrored(another(whole, tmp_path / "project"), "s3://b/states")
    stalled, go = threading.Event(), threading.Event()

    def fault(path, count):
        if path.endswith(f"/step-00000010.{end}") and "/snapshots/" not in path and not go.is_set():
            stalled.set()
            assert go.wait(100)
            return "reset"
        return ""

    faulty.fault = fault
    with killed(project):
        assert stalled.wait(90)
    go.set()
    there = [
        int(name[-13:-5])
        for name in faulty.objects
        if name.startswith("states/") and "/step-" in name and name.endswith(".json")
    ]
    assert there and max(there) < 10 and counted(project)[-1] == 10
    if lost:
        shutil.rmtree(project / "scratch")
    said = ended(project)
    assert f"going on at step {max(there) if lost else 10} of 10" in said
    assert written(project) == written(whole)
