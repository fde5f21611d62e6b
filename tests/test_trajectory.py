"""FID over a training, from the averages that it kept."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from test_snapshots import write_training

from dit import cli, trajectory
from dit.imagesets import open_images

PARAMS = """
sample:
  num_images: 8
  seed: 0
  labels: balanced
  block_images: 4
  settings:
  - {name: guided, cfg_scale: 1.5, sampler: euler, num_steps: 2}
  - {name: plain, cfg_scale: 1.0, sampler: euler, num_steps: 2}
"""
ASKED = ("--extractor", "random", "--num-images", "6")


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A checkout with artifacts/train, which kept the averages of steps 5 and 10, and real images."""
    train = write_training(tmp_path / "artifacts")
    side = json.loads((train / "config.json").read_text())["image_size"]
    images = np.random.default_rng(0).integers(0, 256, (20, side, side, 3)).astype(np.uint8)
    np.savez(tmp_path / "real.npz", arr_0=images)
    (tmp_path / "params.yaml").write_text(PARAMS)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_kept_average_is_drawn_from_and_measured(root, capsys):
    command = ["evaluate", "--snapshots", "artifacts/train", "--reference", "real.npz", *ASKED]
    assert cli.main([*command, "--setting", "plain"]) == 0
    out = capsys.readouterr().out
    told = json.loads(Path("snapshots.metrics.json").read_text())
    assert [row["step"] for row in told["steps"]] == [5, 10] and told["setting"]["name"] == "plain"
    first, last = (row["metrics"] for row in told["steps"])
    assert set(first) == set(last) and first["fid_random_6"] != last["fid_random_6"]
    assert told["best"]["fid_random_6"] == (5 if first["fid_random_6"] < last["fid_random_6"] else 10)
    assert "step 5" in out and f"{first['fid_random_6']:.4g}"[:4] in out and out.count("*") >= len(first)
    assert Path("snapshots.metrics.png").stat().st_size > 1000
    assert not list((root / "scratch" / "snapshots").iterdir()), "what was drawn is gone"
    assert cli.main(command) == 2 and "snapshots.metrics.json is there already" in capsys.readouterr().err


def test_a_figure_is_the_one_that_its_images_have(root, monkeypatch):
    seen = {}

    def spied(images, *arguments, **named):
        assert named["labels"] is images.labels, "what was asked for, for class agreement"
        seen[images.name] = images.read(0, images.count).copy()
        return evaluate(images, *arguments, **named)

    evaluate = trajectory.evaluate_images
    monkeypatch.setattr(trajectory, "evaluate_images", spied)
    assert cli.main(["evaluate", "--snapshots", "artifacts/train", "--reference", "real.npz", *ASKED]) == 0
    told = json.loads(Path("snapshots.metrics.json").read_text())
    np.savez("drawn.npz", arr_0=next(iter(seen.values())))
    assert open_images("drawn.npz").count == 6
    assert cli.main(["evaluate", "drawn.npz", "--reference", "real.npz", "--extractor", "random"]) == 0
    alone = json.loads(Path("drawn.metrics.json").read_text())["metrics"]
    assert alone == pytest.approx({name: told["steps"][0]["metrics"][name] for name in alone}, rel=1e-9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--setting", "nosuch"), "'nosuch' is none of sample.settings: use guided or plain"),
        (("--num-images", "3"), "--num-images must be at least 4, got 3"),
        (("--papers",), "--papers cannot be had with --snapshots"),
        (("--output", "scratch"), "--output: scratch is a folder"),
        (("--output", "real.npz"), "real.npz would be written over what is to be read"),
        (("--reference", "small.npz"), "the training in artifacts/train holds images of .* the reference of 4 x 4"),
        (("--reference", "nowhere"), "nowhere is not there"),
        (("--labels", "x.npy", "--keep-reference", "kept"), "--labels and --keep-reference cannot be had"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(root, capsys, arguments, message):
    (root / "scratch").mkdir()
    np.savez("small.npz", arr_0=np.zeros((9, 4, 4, 3), np.uint8))
    command = ["evaluate", "--snapshots", "artifacts/train", "--reference", "real.npz", "--extractor", "random"]
    assert cli.main([*command, *arguments]) == 2
    err = capsys.readouterr().err
    assert re.search(message, err) and err.count("\n") == 1
    assert not (root / "scratch" / "snapshots").exists(), "nothing is drawn first"


def test_the_best_of_a_figure_is_its_highest_or_lowest_and_the_first_of_equals():
    rows = {
        5: {"fid_x_6": 3.0, "recall_x_6": 0.2, "kid_x_6": 1.0},
        9: {"fid_x_6": 2.0, "recall_x_6": 0.1, "kid_x_6": 1.0},
    }
    assert trajectory.best(rows) == {"fid_x_6": 9, "recall_x_6": 5, "kid_x_6": 5}


@pytest.mark.parametrize("content", ["{", "{}", "[]", '{"image_size": null}'])
def test_a_torn_training_is_refused(root, capsys, content):
    (root / "artifacts" / "train" / "config.json").write_text(content)
    assert cli.main(["evaluate", "--snapshots", "artifacts/train", "--reference", "real.npz", *ASKED]) == 2
    err = capsys.readouterr().err
    assert "artifacts/train/config.json is torn" in err and err.count("\n") == 1


def test_a_folder_that_is_no_training_is_refused(root, capsys):
    assert cli.main(["evaluate", "--snapshots", "nowhere", "--reference", "real.npz", *ASKED]) == 2
    err = capsys.readouterr().err
    assert "nowhere is no training's folder" in err and err.count("\n") == 1
