"""What a folder holds, counted on folders made for it."""

import json
import os
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from dit import survey as page
from dit.paths import Paths
from dit.sources import DataConfig
from dit.stages.scan import scan
from dit.stages.shard import shard
from dit.survey import describe, learnable, survey


def fill(folder, count, side=40, mode="RGB", start=0):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(start, start + count):
        pixels = np.random.default_rng(i).integers(0, 256, (side, side + 8, 3), np.uint8)
        Image.fromarray(pixels).convert(mode).save(folder / f"{i:03d}.png")


def test_a_folder_of_classes_is_counted_and_measured(tmp_path):
    fill(tmp_path / "cats", 12, 30)
    fill(tmp_path / "dogs" / "small", 9, 50, "L", start=50)
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "dogs" / "torn.png").write_bytes((tmp_path / "cats" / "000.png").read_bytes()[:100])
    (tmp_path / "dogs" / "copy.png").write_bytes((tmp_path / "cats" / "003.png").read_bytes())
    found = survey(str(tmp_path))
    assert (found.count, found.others, found.classes) == (23, 1, {"cats": 12, "dogs": 11})
    assert found.sides == (30, 30, 50) and found.modes == {"RGB": 13, "L": 9} and found.copies == 1
    assert [key for key, _ in found.unreadable] == ["dogs/torn.png"]
    told = "\n".join(describe(found))
    assert "23 images" in told and "2 classes of 11 to 12" in told and "dogs/torn.png" in told and "1 are exact" in told


def test_a_flat_folder_has_no_classes(tmp_path):
    fill(tmp_path, 16)
    found = survey(str(tmp_path))
    assert found.classes == {} and found.copies == 0 and "no classes" in "\n".join(describe(found))


def test_of_many_images_a_spread_is_opened(tmp_path, monkeypatch):
    fill(tmp_path, 40)
    monkeypatch.setattr(page, "LOOKED_AT", 16)
    monkeypatch.setattr(page, "COMPARED", 20)
    found = survey(str(tmp_path))
    assert found.opened == 16 and sum(found.modes.values()) == 16 and found.copies is None
    assert "of 16 looked at" in "\n".join(describe(found)) and "not looked for" in "\n".join(describe(found))


@pytest.mark.parametrize("seed", [0, 1])
def test_what_is_left_to_train_on_is_what_shard_leaves(tmp_path, seed):
    folder = tmp_path / "images"
    fill(folder / "a", 9, start=100 * seed)
    fill(folder / "b", 7, start=100 * seed + 20)
    fill(folder / "c", 2, start=100 * seed + 40)
    (folder / "b" / "copy.png").write_bytes((folder / "a" / f"{100 * seed:03d}.png").read_bytes())
    (folder / "a" / "torn.png").write_bytes(b"no image")
    data = DataConfig("x", str(folder), "folder", 3, 16, False, 0.2, seed, 5, 0.5)
    scan(data, paths=Paths(tmp_path))
    shard(data, paths=Paths(tmp_path))
    told = json.loads((tmp_path / "artifacts/shard/manifest.json").read_text())
    left = Counter()
    for made in told["shards"]:
        left.update(dict(zip("abc", made["class_counts"], strict=True)) if made["split"] == "train" else {})
    assert learnable(survey(str(folder)), data) == dict(left)


def test_what_cannot_be_divided_is_refused_in_a_line(tmp_path):
    fill(tmp_path / "a", 16)
    fill(tmp_path / "b", 1)
    (tmp_path / "b" / "000.png").write_bytes(b"no image")
    data = DataConfig("x", str(tmp_path), "folder", 2, 16, False, 0.2, 0, 512, 0.01)
    with pytest.raises(ValueError, match="1 of 2 classes \\('b'\\) would have no readable image left"):
        learnable(survey(str(tmp_path)), data)
    fill(tmp_path / "copies", 1)
    for i in range(1, 16):
        (tmp_path / "copies" / f"{i:03d}.png").write_bytes((tmp_path / "copies" / "000.png").read_bytes())
    data = DataConfig("x", str(tmp_path / "copies"), "none", 0, 16, False, 0.2, 0, 512, 0.01)
    with pytest.raises(ValueError, match="leaves none to judge by"):
        learnable(survey(str(tmp_path / "copies")), data)


def test_folders_without_images_are_named_and_hidden_ones_are_not(tmp_path):
    fill(tmp_path / "a", 8)
    fill(tmp_path / "b", 8, start=8)
    fill(tmp_path / ".thumbs", 3)
    for name in ("gifs", "__MACOSX"):
        (tmp_path / name).mkdir()
    (tmp_path / "gifs" / "x.gif").write_bytes(b"GIF89a")
    found = survey(str(tmp_path))
    assert found.without == ["gifs"] and found.classes == {"a": 8, "b": 8} and found.count == 16
    assert "no PNG, JPEG or WebP image in 'gifs'" in "\n".join(describe(found))
    fill(tmp_path / "__MACOSX" / "a", 2)
    with pytest.raises(ValueError, match="__MACOSX' holds 2 images: .* delete it"):
        survey(str(tmp_path))


def test_a_path_that_is_not_utf8_is_refused_in_a_line(tmp_path):
    folder = os.fsdecode(os.fsencode(tmp_path / "odd") + b"\xff")
    with pytest.raises(ValueError, match="is not valid UTF-8") as caught:
        survey(folder)
    assert str(caught.value).isprintable()


def mixed(folder):
    fill(folder / "a", 16)
    fill(folder, 1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: None, "no PNG, JPEG or WebP image"),
        (lambda folder: folder.rmdir(), "is not there"),
        (lambda folder: fill(folder, 5), "holds 5 images: at least 16"),
        (lambda folder: fill(folder / "only", 16), "one class only .*only'.* without classes"),
        (mixed, "1 images beside its sub-folders .*000.png"),
        (
            lambda folder: [(folder / f"{i}.png").write_bytes(b"no") for i in range(16)],
            "16 of 16 images cannot be read",
        ),
    ],
)
def test_what_nothing_can_be_trained_on_is_refused_in_a_line(tmp_path, make, message):
    folder = tmp_path / "images"
    folder.mkdir()
    make(folder)
    with pytest.raises(ValueError, match=message) as caught:
        survey(str(folder))
    assert "\n" not in str(caught.value) and "data." not in str(caught.value)
