"""Pictures of the averages that a training kept."""

import json
import os
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from tiny_model import write_model

from dit.checkpoint import CONDITIONS, load_checkpoint, load_tensors, save_tensors
from dit.generation import generate_blocks
from dit.setting import SampleConfig, Setting
from dit.snapshots import best, drawn, open_snapshot, plot, snapshots
from dit.vae import Autoencoder

WAY = Setting("s", 1.5, "euler", 2)
CONFIG = SampleConfig(6, 0, "balanced", 4, (WAY, Setting("other", 1.0, "euler", 2)))


@pytest.fixture
def train(tmp_path):
    """artifacts/train with averages of steps 5 and 10 (and what belongs to other questions), as a training leaves it."""
    return write_training(tmp_path)


def write_training(root, **told):
    folder = root / "train"
    for step in (5, 10):
        write_model(root, seed=step, **told)
        save_tensors(folder / "ema" / f"step-{step:08d}.safetensors", load_tensors(root / "ema" / "model.safetensors"))
    write_model(root, **told)  # the autoencoder's weights must be the same for all: those of seed 0
    config = json.loads((root / "ema" / "config.json").read_text())
    config.pop("format")
    (folder / "config.json").write_text(json.dumps(config | {"weights": "raw"}))
    (folder / "ema" / "power-0.05-00000010.safetensors").write_bytes(b"another average")
    if (root / "ema" / CONDITIONS).exists():
        os.rename(root / "ema" / CONDITIONS, folder / "ema" / CONDITIONS)
    return folder


def test_they_are_found_in_order(train):
    assert [step for step, _ in snapshots(train)] == [5, 10]
    for step, file in snapshots(train):
        checkpoint = open_snapshot(train, step, file)
        assert checkpoint.config["step"] == step and checkpoint.config["weights"] == "ema"
        assert not checkpoint.model.training


@pytest.mark.parametrize("told", [{}, {"condition_shape": (2, 5)}, {"objective": "diffusion"}])
def test_what_is_drawn_is_each_ones_own(tmp_path, told):
    train = write_training(tmp_path, **told)
    way = Setting("s", 1.5, "ddim" if "objective" in told else "euler", 2)
    seen = []
    for step, file in drawn(train, tmp_path / "vae", way, CONFIG, tmp_path / "drawn", say=lambda line: None):
        weights = train / "ema" / f"step-{step:08d}.safetensors"
        expected = generate_blocks(open_snapshot(train, step, weights), Autoencoder.load(tmp_path / "vae"), way, CONFIG)
        with np.load(file) as content:
            assert np.array_equal(content["arr_0"], expected[0]) and np.array_equal(content["labels"], expected[1])
            seen.append(content["arr_0"])
        assert len(list((tmp_path / "drawn").iterdir())) == 1, "one at a time on the disk"
    assert len(seen) == 2 and not np.array_equal(*seen) and list((tmp_path / "drawn").iterdir()) == []


def test_what_an_interrupted_call_drew_from_another_seed_is_not_taken(train, tmp_path):
    place = {"train": train, "vae": train.parent / "vae", "folder": tmp_path / "drawn", "say": lambda line: None}
    found = []
    for seed in (0, 1, 0):
        _, file = next(drawn(setting=WAY, config=replace(CONFIG, seed=seed), **place))  # and is interrupted there
        found.append((file, np.load(file)["arr_0"]))
    assert found[0][0] == found[2][0] != found[1][0] and not np.array_equal(found[0][1], found[1][1])


def test_the_last_is_the_checkpoint_that_stage_ema_makes_of_it(train, tmp_path):
    write_model(tmp_path, seed=10)
    whole = load_checkpoint(tmp_path / "ema").model.state_dict()
    ours = open_snapshot(train, *snapshots(train)[-1]).model.state_dict()
    assert all((ours[name] == whole[name]).all() for name in whole) and ours.keys() == whole.keys()


def test_what_is_no_training_or_does_not_fit_is_refused_in_a_line(train, tmp_path):
    with pytest.raises(ValueError, match="^[^\n]*is no training's folder[^\n]*$"):
        snapshots(tmp_path / "nothing")
    with pytest.raises(ValueError, match="sampler 'ddim' does not fit"):
        next(drawn(train, tmp_path / "vae", Setting("s", 1.0, "ddim", 3), CONFIG, tmp_path / "drawn"))
    step, file = snapshots(train)[0]
    save_tensors(file, {"x": load_tensors(file)["pos_embed"]})
    with pytest.raises(ValueError, match="^[^\n]*step-00000005.safetensors does not fit [^\n]*$"):
        open_snapshot(train, step, file)
    for file in (train / "ema").glob("step-*"):
        file.unlink()
    with pytest.raises(ValueError, match="holds no snapshots: keep some with train.snapshot_every_steps"):
        snapshots(train)


def test_the_best_and_the_picture(tmp_path):
    points = [(5, 3.0), (10, 1.0), (15, 1.0), (20, 2.0)]
    assert best(points) == (10, 1.0) and best(points, lower=False) == (5, 3.0)
    plot({"fid": points, "recall": points[:1]}, tmp_path / "deep" / "curve.png")
    width, height = Image.open(tmp_path / "deep" / "curve.png").size
    assert width == 720 and 400 < height < 700
    plot({"fid": points, "recall": points[:1]}, tmp_path / "again.png")
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "deep" / "curve.png").read_bytes()
