"""Progress: a line now and then, and the file that others read."""

import json

import pytest

from dit import progress
from dit.progress import Progress


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.setenv("DIT_PROGRESS", str(tmp_path / "progress.json"))
    return tmp_path / "progress.json"


@pytest.fixture
def now(monkeypatch):
    """The clock, in a list: what it says is set by the test."""
    time = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: time[0])
    return time


def test_the_file_tells_how_far_how_fast_and_how_long_still(file, now):
    said = []
    report = Progress("train", 1000, say=said.append)
    now[0] += 1
    report(100, " (step 1/10, loss 0.5)")
    told = json.loads(file.read_text())
    assert told.pop("time") > 1e9
    assert told == {
        "what": "train",
        "done": 100,
        "total": 1000,
        "unit": "images",
        "rate": 100.0,
        "eta_seconds": 9.0,
        "note": "(step 1/10, loss 0.5)",
        "images_per_second": 100.0,
    }
    assert said == [] and [each.name for each in file.parent.iterdir()] == ["progress.json"]


def test_it_is_written_every_two_seconds_and_at_the_end(file, now):
    report = Progress("vae", 10, "steps", say=lambda line: None)
    seen = []
    for _ in range(10):
        report(1)
        seen.append(json.loads(file.read_text())["done"])
        now[0] += 0.5
    assert seen == [1, 1, 1, 1, 5, 5, 5, 5, 9, 10]
    assert json.loads(file.read_text())["images_per_second"] is None


def test_where_nobody_asks_or_it_cannot_be_written_the_work_goes_on(tmp_path, monkeypatch):
    monkeypatch.delenv("DIT_PROGRESS", raising=False)
    said = []
    Progress("shard", 3, say=said.append)(3)
    assert len(said) == 1 and said[0].startswith("shard: 3/3 images, ") and not list(tmp_path.iterdir())
    monkeypatch.setenv("DIT_PROGRESS", str(tmp_path / "no folder" / "progress.json"))
    Progress("shard", 3, say=said.append)(3)
    assert len(said) == 2 and not list(tmp_path.iterdir())


def test_what_an_earlier_process_did_counts_but_not_for_the_rate():
    said = []
    progress = Progress("train", 100, every_seconds=0.0, say=said.append, before=90)
    progress.started -= 1.0
    progress(1)
    assert said[0].startswith("train: 91/100 images, 1.0 images/s, 9s left")
