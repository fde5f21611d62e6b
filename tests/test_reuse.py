"""Reuse: the right file or none, whatever became of index and cache."""

import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from dit import reuse
from dit.paths import Paths


@pytest.fixture
def paths(tmp_path) -> Paths:
    (tmp_path / ".dvc").mkdir()
    return Paths(tmp_path)


def into_cache(paths: Paths, file: Path) -> Path:
    md5 = hashlib.md5(file.read_bytes()).hexdigest()
    cached = reuse.cache_folder(paths.root) / md5[:2] / md5[2:]
    cached.parent.mkdir(parents=True)
    file.rename(cached)
    cached.chmod(0o444)
    return cached


@pytest.fixture
def cached(paths, tmp_path) -> Path:
    """A file that an earlier run remembered as made from "inputs", now in DVC's cache only."""
    file = tmp_path / "made"
    file.write_bytes(b"content")
    with reuse.opened(paths, "stage") as index:
        reuse.remember(index, "inputs", file, note=["anything"])
    return into_cache(paths, file)


def fetched(paths: Paths, digest: str = "inputs") -> tuple[dict | None, bytes | None]:
    destination = paths.root / "destination"
    with reuse.opened(paths, "stage") as index:
        entry = reuse.fetch(index, digest, destination)
    return entry, destination.read_bytes() if destination.exists() else None


def test_a_cached_file_is_linked_with_its_note(paths, cached):
    entry, content = fetched(paths)
    assert content == b"content" and entry["note"] == ["anything"]
    assert entry["sha256"] == hashlib.sha256(b"content").hexdigest() and entry["bytes"] == 7
    assert (paths.root / "destination").stat().st_ino == cached.stat().st_ino


def test_an_unknown_digest_gives_nothing(paths, cached):
    assert fetched(paths, "other inputs") == (None, None)


def test_a_damaged_file_is_not_used(paths, cached):
    cached.chmod(0o644)
    cached.write_bytes(b"CONTENT")
    assert fetched(paths) == (None, None)


@pytest.mark.parametrize("gone", [".dvc/cache", ".dvc", "scratch"])
def test_without_cache_or_index_there_is_nothing(paths, cached, gone):
    shutil.rmtree(paths.root / gone)
    assert fetched(paths) == (None, None)


def test_a_damaged_index_is_forgotten(paths, cached):
    (paths.scratch / "reuse" / "stage.json").write_text("{")
    assert fetched(paths) == (None, None)


def test_where_links_fail_the_file_is_copied_and_never_half(paths, cached, monkeypatch):
    def refuse(*args):
        raise OSError("another disk")

    monkeypatch.setattr(os, "link", refuse)
    assert fetched(paths)[1] == b"content"
    (paths.root / "destination").unlink()

    def stop(source, half):
        Path(half).write_bytes(b"con")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", stop)
    with pytest.raises(OSError, match="No space"):
        fetched(paths)
    assert not list(paths.root.glob("*destination*"))


def test_a_stopped_run_leaves_its_files_to_the_next(paths):
    file = paths.root / "made"
    with pytest.raises(RuntimeError), reuse.opened(paths, "stage") as index:
        file.write_bytes(b"content")
        reuse.remember(index, "inputs", file)
        file.unlink()
        raise RuntimeError("stopped")
    assert fetched(paths)[1] == b"content"
    (paths.root / "destination").unlink()
    assert fetched(paths) == (None, None)  # that run ended well: its file is DVC's now, and here it has no DVC


# Another process, which makes `digest`, waits for the file `go`, and ends well, or is killed.
OTHER = """
import sys, time
from pathlib import Path
from dit import reuse
from dit.paths import Paths

home, digest = Path(sys.argv[1]), sys.argv[2]
file = home / f"{digest}.made"
file.write_text(digest)
with reuse.opened(Paths(home), "stage") as index:
    reuse.remember(index, digest, file)
    print("made", flush=True)
    while not (home / "go").exists():
        time.sleep(0.02)
"""


@pytest.fixture
def other(paths):
    running = []

    def start(digest):
        words = [sys.executable, "-c", OTHER, str(paths.root), digest]
        running.append(subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1]))
        assert running[-1].stdout.readline() == "made\n"
        return running[-1]

    yield start
    for process in running:
        process.kill()
        process.communicate()


def remembered(paths: Paths) -> set[str]:
    return set(json.loads((paths.scratch / "reuse" / "stage.json").read_text()))


def test_what_several_processes_add_at_once_is_all_remembered(paths, other):
    processes = [other("a"), other("b")]
    file = paths.root / "made"
    file.write_text("c")
    with reuse.opened(paths, "stage") as index:
        reuse.remember(index, "c", file)
        (paths.root / "go").touch()
        assert [process.wait(timeout=60) for process in processes] == [0, 0] and remembered(paths) == {"a", "b"}
    assert remembered(paths) == {"a", "b", "c"} and not list((paths.scratch / "reuse" / "stage").iterdir())


def test_unfinished_files_of_a_living_process_are_its_own_and_those_of_a_killed_one_are_taken_over(paths, other):
    process = other("a")
    assert fetched(paths, "a") == (None, None)
    assert len(list((paths.scratch / "reuse" / "stage").glob("*/a"))) == 1  # it ended well, and left the other's alone
    process.kill()
    process.wait()
    assert fetched(paths, "a")[1] == b"a"
    assert not list((paths.scratch / "reuse" / "stage").iterdir())


def test_all_that_is_remembered_is_fetched_at_once(paths, cached):
    wanted = {"inputs": paths.root / "destination", "other inputs": paths.root / "nothing"}
    with reuse.opened(paths, "stage") as index:
        assert list(reuse.fetch_all(index, wanted)) == ["inputs"]
    assert wanted["inputs"].read_bytes() == b"content" and not wanted["other inputs"].exists()


def test_what_another_process_made_for_this_one_is_remembered_or_waits(paths):
    file = paths.root / "made"
    file.write_bytes(b"content")
    for ends_well in (False, True):
        with suppress(RuntimeError), reuse.opened(paths, "stage") as index:
            theirs = pickle.loads(pickle.dumps(reuse.part(index)))
            assert reuse.is_remembered(index, "other inputs") == ends_well
            made = {digest: reuse.remember(theirs, digest, file, note=digest) for digest in ("inputs", "other inputs")}
            assert reuse.is_remembered(index, "inputs")
            if not ends_well:
                raise RuntimeError("stopped")
            reuse.join(index, {"inputs": made["inputs"]})
    assert json.loads((paths.scratch / "reuse" / "stage.json").read_text()) == {"inputs": made["inputs"]}


def test_stages_do_not_mix(paths, cached):
    with reuse.opened(paths, "other") as index:
        assert reuse.fetch(index, "inputs", paths.root / "destination") is None


def test_the_index_keeps_the_entries_used_last(paths, monkeypatch):
    monkeypatch.setattr(reuse, "MOST_ENTRIES", 2)
    file = paths.root / "made"
    file.write_bytes(b"content")
    with reuse.opened(paths, "stage") as index:
        for digest in "abc":
            reuse.remember(index, digest, file)
    with reuse.opened(paths, "stage") as index:
        assert list(index.entries) == ["b", "c"]


@pytest.mark.parametrize(
    "local, shared, folder",
    [
        (None, None, ".dvc/cache"),
        (None, "[core]\n    remote = x\n[cache]\n    dir = ../elsewhere\n", "elsewhere"),
        ("[cache]\n    dir = /abs/cache\n", "[cache]\n    dir = ../elsewhere\n", "/abs/cache"),
        ("['remote \"x\"']\n    url = s3://a%b\n", "[cache]\n    type = hardlink\n    dir = sub\n", ".dvc/sub"),
        ("not a config", '[cache]\n    dir = "with space"\n', ".dvc/with space"),
    ],
)
def test_the_cache_is_where_dvc_has_it(paths, local, shared, folder):
    for name, text in (("config.local", local), ("config", shared)):
        if text:
            (paths.root / ".dvc" / name).write_text(text)
    expected = Path(os.path.normpath(paths.root / folder / "files" / "md5"))
    assert Path(os.path.normpath(reuse.cache_folder(paths.root))) == expected


STAGE = """
import sys
sys.path.insert(0, {code!r})
from pathlib import Path
from dit import reuse
from dit.paths import Paths, publish
paths = Paths(Path("."))
with reuse.opened(paths, "stage") as index, publish(Path("out"), paths.scratch) as folder:
    found = reuse.fetch(index, "inputs", folder / "big")
    if not found:
        (folder / "big").write_bytes(b"x" * 1000)
        reuse.remember(index, "inputs", folder / "big")
    (folder / "small").write_text(Path("input").read_text())
Path("scratch/found").write_text(str(bool(found)))
"""


@pytest.mark.parametrize("link", ["reflink,copy", "hardlink", "symlink"])
def test_with_dvc_itself_a_changed_stage_gets_its_old_file_back(tmp_path, link):
    def dvc(*words: str) -> None:
        subprocess.run([sys.executable, "-m", "dvc", *words, "--quiet"], cwd=tmp_path, check=True, capture_output=True)

    dvc("init", "--no-scm")
    dvc("config", "cache.type", link)
    (tmp_path / "stage.py").write_text(STAGE.format(code=str(Path(__file__).parents[1])))
    command = f"{sys.executable} stage.py"
    (tmp_path / "dvc.yaml").write_text(f"stages: {{s: {{cmd: {command}, deps: [input], outs: [out]}}}}")
    for text, found in (("one", "False"), ("two", "True"), ("three", "True")):
        (tmp_path / "input").write_text(text)
        dvc("repro")
        assert (tmp_path / "scratch/found").read_text() == found
        assert (tmp_path / "out/big").read_bytes() == b"x" * 1000
        assert (tmp_path / "out/small").read_text() == text
    cached = [file for file in (tmp_path / ".dvc/cache/files").rglob("*") if file.is_file()]
    assert all(file.stat().st_mode & 0o222 == 0 for file in cached)  # nobody got a writable handle on them
    if link.endswith("copy"):
        assert not os.path.samefile(tmp_path / "out/big", max(cached, key=lambda file: file.stat().st_size))


def test_what_dvc_recorded_comes_back(tmp_path):
    paths, file = Paths(tmp_path), tmp_path / "artifacts" / "scan" / "listing.json"
    md5 = hashlib.md5(b"history").hexdigest()
    kept = tmp_path / ".dvc" / "cache" / "files" / "md5" / md5[:2] / md5[2:]
    assert not reuse.recover(paths, "scan", file)
    (tmp_path / "dvc.lock").write_text(
        f"stages: {{scan: {{outs: [{{path: artifacts/scan/listing.json, md5: {md5}}}]}}}}\n"
    )
    assert not reuse.recover(paths, "scan", file)
    kept.parent.mkdir(parents=True)
    kept.write_bytes(b"harmed")
    assert not reuse.recover(paths, "scan", file) and not file.exists()
    kept.write_bytes(b"history")
    assert reuse.recover(paths, "scan", file) and file.read_bytes() == b"history"
