import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import load  # noqa: E402


def test_every_way_is_timed_and_the_table_tells(monkeypatch):
    monkeypatch.setattr(load, "SHARD_IMAGES", 8)
    rows = load.measure(40, 4, 3, 2, torch.device("cpu"))
    assert {row.way for row in rows} >= {"memory", "mapped", "memory, fed", "mapped, fed", "streamed"}
    assert all(len(row.wall) == len(row.core) == 2 and min(row.wall + row.core) > 0 for row in rows)
    header, _, *lines = load.table(rows).splitlines()
    assert all(line.count("|") == header.count("|") for line in lines)


def test_what_is_asked_for_is_reached_or_missed_by_the_median():
    table = load.table([load.Row("memory", [1.0], [100_000, 200_001, 300_000]), load.Row("mapped", [1.0], [19_999])])
    assert [line.split("|")[-2].strip() for line in table.splitlines()[2:]] == ["reached", "missed"]
