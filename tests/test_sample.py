"""The stage `sample`, as one process and as two that torchrun starts."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_model import SIZE, write_model

from dit.grids import overview
from dit.paths import Paths, file_sha256
from dit.runtime import RunConfig
from dit.setting import SampleConfig, Setting
from dit.stages.sample import sample

ROOT = Path(__file__).parents[1]
RUN = RunConfig(device="cpu")
PLAIN, GUIDED = Setting("plain", 1.0, "euler", 3), Setting("guided", 1.5, "heun", 2)
SECTIONS = {
    "sample": {
        "num_images": 11,
        "seed": 0,
        "labels": "random",
        "block_images": 4,
        "settings": [
            {"name": "plain", "cfg_scale": 1.0, "sampler": "euler", "num_steps": 3},
            {"name": "guided", "cfg_scale": 1.5, "sampler": "heun", "num_steps": 2},
        ],
    },
    "run": {"device": "cpu"},
}


def contents(folder):
    return {str(f.relative_to(folder)): file_sha256(f) for f in sorted(folder.rglob("*")) if f.is_file()}


@pytest.fixture
def paths(tmp_path):
    write_model(tmp_path / "artifacts")
    (tmp_path / "params.yaml").write_text(json.dumps(SECTIONS))
    return Paths(tmp_path)


def test_it_writes_pictures_labels_a_grid_and_how_they_were_drawn(paths):
    config = SampleConfig(11, 0, "random", 4, (PLAIN, GUIDED))
    sample(config, RUN, paths=paths)
    for setting in (PLAIN, GUIDED):
        folder = paths.artifacts / "sample" / setting.name
        assert sorted(f.name for f in folder.iterdir()) == ["grid.png", "samples.json", "samples.npz"]
        with np.load(folder / "samples.npz") as content:
            images, labels = content["arr_0"], content["labels"]
        assert images.shape == (11, SIZE, SIZE, 3) and images.dtype == np.uint8 and set(labels) <= {0, 1, 2}
        assert np.array_equal(np.asarray(Image.open(folder / "grid.png")), overview(images, labels))
        told = json.loads((folder / "samples.json").read_text())
        assert told["num_images"] == 11 and told["labels"] == "random" and told["setting"]["name"] == setting.name
        assert told["checkpoint"]["digest"] == file_sha256(paths.artifacts / "ema" / "model.safetensors")
    assert list((paths.scratch / "sample").glob("*")) == []
    before = contents(paths.artifacts / "sample")
    sample(config, RUN, paths=paths)
    assert contents(paths.artifacts / "sample") == before


def test_blocks_of_other_settings_are_forgotten_and_its_own_taken(paths, monkeypatch):
    old = paths.scratch / "sample" / "0123456789abcdef"
    old.mkdir(parents=True)
    (old / "block-00000000.safetensors").write_bytes(b"old")
    calls = []

    def stop(*arguments, **options):
        calls.append(1)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        return real(*arguments, **options)

    from dit import drawing

    real = drawing.generate
    monkeypatch.setattr(drawing, "generate", stop)
    config = SampleConfig(11, 0, "balanced", 4, (PLAIN,))
    with pytest.raises(OSError):
        sample(config, RUN, paths=paths)
    assert not old.exists() and not (paths.artifacts / "sample").exists()
    sample(config, RUN, paths=paths)
    assert len(calls) == 4, "two blocks were kept, one was drawn twice"


def test_a_setting_that_does_not_fit_is_refused_before_any_work(paths):
    with pytest.raises(ValueError, match="sampler 'ddim' does not fit objective 'transport'"):
        sample(SampleConfig(4, 0, "balanced", 4, (PLAIN, Setting("x", 1.0, "ddim", 5))), RUN, paths=paths)
    assert not paths.scratch.exists()


# In two processes: the stage itself, or one in which process 1 comes to grief while process 0 works or waits.
START = """
import os, signal, sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
from dit import drawing, entry
from dit.stages.sample import sample

real, rank = drawing.generate, os.environ["RANK"]
def generate(*arguments, **options):
    what = os.environ.get("GRIEF")
    if rank == "1" and what == "killed":
        while len(list(Path("scratch/sample").rglob("block-*.safetensors"))) < 4:  # process 0 is done then, and waits
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGKILL)
    if rank == "1" and what == "refused":
        raise ValueError("the second process cannot read this")
    if rank == "1" and what == "bug":
        raise RuntimeError("broken")
    if what == "slow":
        time.sleep(60)
    return real(*arguments, **options)
generate.__module__ = "dit.drawing"
drawing.generate = generate
entry.main(sample, together=True)
"""


def torchrun(paths, grief=""):
    (paths.root / "start.py").write_text(START.format(root=str(ROOT)))
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "start.py"],
        cwd=paths.root,
        env={**os.environ, "GRIEF": grief, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def outcome(paths):
    return json.loads((paths.scratch / "outcome" / "sample.json").read_text())


@pytest.mark.slow
def test_two_processes_give_the_bytes_of_one(paths):
    sample(SampleConfig(11, 0, "random", 4, (PLAIN, GUIDED)), RUN, paths=paths)
    one = contents(paths.artifacts / "sample")
    (paths.artifacts / "sample").rename(paths.root / "one")
    process = torchrun(paths)
    stdout, stderr = process.communicate(timeout=200)
    assert process.returncode == 0, stderr
    assert contents(paths.artifacts / "sample") == one and outcome(paths)["status"] == "completed"
    assert "process 1 of 2" in stdout and "process 2 of 2" not in stdout
    assert list((paths.scratch / "sample").glob("*")) == []
    assert [file.name for file in (paths.scratch / "outcome").iterdir()] == ["sample.json"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "grief,status,message",
    [
        ("killed", "interrupted", "the same command goes on where this one stopped"),
        ("refused", "refused", "the second process cannot read this"),
        ("bug", "failed", "RuntimeError: broken"),
    ],
)
def test_a_process_that_dies_takes_the_others_along_and_leaves_no_half(paths, grief, status, message):
    process = torchrun(paths, grief)
    _, stderr = process.communicate(timeout=200)
    assert process.returncode != 0 and not (paths.artifacts / "sample").exists()
    told = outcome(paths)
    assert told["status"] == status and message in told["message"], (told, stderr)
    assert [file.name for file in (paths.scratch / "outcome").iterdir()] == ["sample.json"]
    if grief == "killed":
        assert len(list((paths.scratch / "sample").rglob("*.safetensors"))) == 4, "what process 0 drew is kept"
    again = torchrun(paths)
    assert again.wait(timeout=120) == 0 and outcome(paths)["status"] == "completed"


@pytest.mark.slow
def test_torchrun_that_is_told_to_stop_stops_them_all(paths):
    process = torchrun(paths, "slow")
    deadline = time.monotonic() + 120
    while not list((paths.scratch / "sample").glob("*")) and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=200)
    assert outcome(paths)["status"] == "interrupted" and not (paths.artifacts / "sample").exists()
