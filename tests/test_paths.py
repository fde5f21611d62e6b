import os
from pathlib import Path

import pytest

from dit.paths import Paths, publish, write_atomic, write_json


def test_a_result_replaces_the_old_one_whole(tmp_path):
    folder, scratch = tmp_path / "artifacts" / "x", tmp_path / "scratch"
    for content in ("old", "new"):
        with publish(folder, scratch) as unfinished:
            (unfinished / f"{content}.txt").write_text(content)
            assert not (folder / f"{content}.txt").exists()
    assert [file.name for file in folder.iterdir()] == ["new.txt"]
    assert not list((scratch / "publish").iterdir())


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, OSError])
def test_an_error_leaves_the_old_result_and_nothing_else(tmp_path, error):
    folder, scratch = tmp_path / "artifacts" / "x", tmp_path / "scratch"
    with publish(folder, scratch) as unfinished:
        (unfinished / "old.txt").write_text("old")
    with pytest.raises(error), publish(folder, scratch) as unfinished:
        (unfinished / "half.txt").write_text("half")
        raise error
    assert [file.name for file in folder.iterdir()] == ["old.txt"]
    assert not list((scratch / "publish").iterdir())


def test_what_a_killed_process_left_is_cleared(tmp_path):
    abandoned = tmp_path / "scratch" / "publish" / "x-abc"
    abandoned.mkdir(parents=True)
    with publish(tmp_path / "artifacts" / "x", tmp_path / "scratch"):
        assert not abandoned.exists()


def test_atomic_writing_keeps_the_old_content_when_it_fails(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_json(path, {"ä": 1})
    assert path.read_text() == '{\n "ä": 1\n}\n'

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError):
        write_atomic(path, b"half")
    assert path.read_text() == '{\n "ä": 1\n}\n' and [file.name for file in tmp_path.iterdir()] == ["a.json"]


def test_a_worktree_knows_its_home_where_memory_and_relative_paths_are(tmp_path):
    root, home = tmp_path / "home" / "scratch" / "worktrees" / "a", tmp_path / "home"
    (root / "scratch").mkdir(parents=True)
    (root / "scratch" / "home").write_text(f"{home}\n")
    paths = Paths(root)
    assert (paths.home, paths.memory, paths.scratch) == (home, home / "scratch", root / "scratch")
    assert paths.given("weights/x") == home / "weights" / "x" and paths.given("/data/x") == Path("/data/x")
    assert paths.given("../photos").resolve() == tmp_path / "photos"
    assert Paths(home).home == home and Paths(home).memory == Paths(home).scratch
    assert Paths().given("weights/x") == Path("weights/x") and Paths().home == Path(".")


def test_a_persons_own_folder_and_that_of_nobody(monkeypatch):
    monkeypatch.setenv("HOME", "/home/anna")
    assert Paths(Path("/work")).given("~/photos") == Path("/home/anna/photos")
    with pytest.raises(ValueError, match="~nobody-of-that-name/x") as caught:
        Paths().given("~nobody-of-that-name/x")
    assert "\n" not in str(caught.value)
