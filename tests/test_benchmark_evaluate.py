import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import evaluate


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "WIDTH", 40)
    monkeypatch.setattr(evaluate, "CLASSES", 12)
    evaluate.write_features(tmp_path, 120)
    return tmp_path


def test_both_find_the_same_and_the_table_tells_it(folder):
    runs = [evaluate.measure(what, folder, "cpu") for what in ("ours", "floor", *evaluate.THEIRS)]
    ours, floor, *theirs = (run["found"] for run in runs)
    assert set(ours) == {"FID", "IS", "precision", "recall"} and not floor
    for found in theirs:
        assert ours == pytest.approx(found, rel=1e-5)
    lines = evaluate.table(runs).splitlines()
    assert len(lines) == 1 + 4 + 3 and lines[1].split()[:1] == ["ours"] and " 1.00" in lines[1]
