"""What a folder holds, counted on folders made for it."""

import numpy as np
import pytest
from PIL import Image

from dit import survey as page
from dit.survey import describe, survey


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
