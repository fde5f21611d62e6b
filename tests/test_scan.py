"""The stage scan in a worktree, and beside another process that looks at the same source."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_sources import config, put

from dit import locks
from dit.paths import Paths
from dit.sources import content_hash, read_listing
from dit.stages.scan import scan
from dit.stages.shard import shard


@pytest.fixture
def home(tmp_path):
    put(tmp_path / "photos", *(f"{name}/{number}.png" for name in ("cat", "dog") for number in range(3)))
    long_ago = 10**9
    for file in (tmp_path / "photos").rglob("*.png"):
        os.utime(file, (long_ago, long_ago))
    return Paths(tmp_path / "home")


def worktree(home, name):
    root = home.scratch / "worktrees" / name
    (root / "scratch").mkdir(parents=True)
    (root / "scratch" / "home").write_text(str(home.root))
    return Paths(root)


SOURCE = {"source": "../photos", "num_classes": 2, "held_out_fraction": 0.5, "shard_images": 4}


def test_a_relative_source_is_the_homes_and_what_is_known_of_it_too(home, capsys):
    trees = [worktree(home, name) for name in "ab"]
    for tree in trees:
        scan(config(**SOURCE), paths=tree)
        shard(config(**SOURCE), paths=tree)
        assert read_listing(tree.artifacts / "scan" / "listing.json").source == "../photos"
        assert not (tree.scratch / "scan").exists() and not (tree.scratch / "reuse").exists()
    said = capsys.readouterr().out
    assert said.count("6 images in 2 classes of '../photos': 6 new, 0 changed, 0 gone") == 2
    memory = [file.name for file in (home.memory / "scan").iterdir()]
    assert len([name for name in memory if name.endswith(".json")]) == 1
    made = [sorted(p.read_bytes() for p in (t.artifacts / "shard").rglob("*.tar")) for t in trees]
    assert made[0] == made[1] and made[0]


def test_hashes_that_another_worktree_knows_are_not_read_again(home, monkeypatch):
    scan(config(**SOURCE), paths=worktree(home, "a"))
    read = []
    monkeypatch.setattr("dit.stages.scan.content_hash", lambda content: read.append(1) or content_hash(content))
    scan(config(**SOURCE), paths=worktree(home, "b"))
    assert not read


def test_another_scan_of_the_same_source_is_waited_for(home):
    tree = worktree(home, "a")
    scan(config(**SOURCE), paths=tree)
    (known,) = (home.memory / "scan").glob("*.lock")
    code = """
import sys
from pathlib import Path
from test_scan import SOURCE
from test_sources import config
from dit.paths import Paths
from dit.stages.scan import scan
scan(config(**SOURCE), paths=Paths(Path(sys.argv[1])))"""
    folders = os.pathsep.join([str(Path(__file__).parents[1]), str(Path(__file__).parent)])
    with locks.held(known):
        child = subprocess.Popen(
            [sys.executable, "-u", "-c", code, str(worktree(home, "b").root)],
            env={**os.environ, "PYTHONPATH": folders},
            stdout=subprocess.PIPE,
            text=True,
        )
        assert child.stdout.readline().startswith(f"scan: waiting for process {os.getpid()} on ")
        other = SOURCE | {"source": "../photos/cat", "labels": "none", "num_classes": 0}
        scan(config(**other), paths=worktree(home, "c"))  # which nobody looks at
    assert child.stdout.readline().startswith("6 images") and child.wait(timeout=60) == 0
