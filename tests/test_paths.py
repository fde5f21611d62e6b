import os

import pytest

from dit.paths import publish, write_atomic, write_json


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
