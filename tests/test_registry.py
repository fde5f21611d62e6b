"""Versions by what they hold, and aliases, in a real database."""

import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from dit import store, tracking
from dit.paths import Paths
from dit.registry import DIGEST, Registry, download


@pytest.fixture
def client(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return tracking.connect(Paths(tmp_path))


@pytest.fixture
def run_id(client, tmp_path):
    return client.create_run(client.create_experiment("x", (tmp_path / "files").as_uri())).info.run_id


def test_versions_are_found_by_what_they_hold(client, run_id, tmp_path):
    registry, other = (Registry(client, name, tmp_path / "work") for name in ("digits", "letters"))
    packed = []

    def pack(folder, entry):
        folder.mkdir()
        (folder / "MLmodel").write_text("flavors: {}\n")
        packed.append(entry["model_id"])

    assert registry.find("aa") is None and registry.aliases() == {}
    first = registry.add("aa", run_id, {"colour": "blue"}, pack)
    second = registry.add("bb", run_id, {}, pack)
    other.add("aa", run_id, {}, pack)
    assert (first.number, second.number) == (1, 2) and first.run_id == run_id
    assert len(packed) == 2  # the same content of the same run is kept once
    assert registry.find("aa") == first and first.tags == {"colour": "blue", DIGEST: "aa"}
    assert registry.find("bb").number == 2 and registry.find("cc") is None

    registry.tag(second, {"tested": True})
    registry.set_alias("champion", second)
    assert registry.get(2).tags["tested"] == "True" and registry.aliases() == {"champion": 2} and other.aliases() == {}
    registry.set_alias("champion", first)
    registry.set_alias("challenger", second)
    registry.drop_alias("challenger")
    assert registry.aliases() == {"champion": 1}


def test_of_two_versions_of_the_same_the_first_counts(client, tmp_path):
    registry = Registry(client, "digits", tmp_path)
    client.create_registered_model("digits")
    for _ in range(2):  # two machines at the same moment
        client.create_model_version("digits", "file:///nowhere", tags={DIGEST: "aa"})
    assert registry.find("aa").number == 1


def test_what_was_fetched_is_what_was_packed_and_a_checkpoint_is_fetched_once(client, run_id, tmp_path, monkeypatch):
    registry, paths = Registry(client, "digits", tmp_path / "work"), Paths(tmp_path)

    def pack(folder, entry):
        for part in ("ema", "vae"):
            (folder / "artifacts" / part).mkdir(parents=True)
            (folder / "artifacts" / part / "model.safetensors").write_bytes(part.encode())
        (folder / "MLmodel").write_text("flavors: {}\n")

    version = registry.add("aa", run_id, {}, pack)
    there = registry.fetch(version, tmp_path / "fetched")
    assert (there / "artifacts" / "vae" / "model.safetensors").read_bytes() == b"vae"
    assert not list((tmp_path / "work").iterdir())

    registry.set_alias("champion", version)
    folder = download(paths, "digits", "champion")
    assert folder.parent == tmp_path / "scratch" / "initial" and folder.name.startswith("digits-1-")
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == {"model.safetensors": b"ema"}
    for which, place in (("challenger", "digits@challenger"), (7, "digits/7")):
        with pytest.raises(ValueError, match=f"models:/{place} could not be fetched") as caught:
            download(paths, "digits", which)
        assert "\n" not in str(caught.value)
    assert [*folder.parent.iterdir()] == [folder] and download(paths, "digits", 1) == folder
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with pytest.raises(ValueError, match="models:/digits/1 could not be fetched .*refused"):
        download(paths, "digits", 1)  # another server's model of that name


def test_a_model_of_the_same_name_and_number_in_another_store_is_fetched_anew(tmp_path, monkeypatch):
    paths, fetched, content = Paths(tmp_path), [], {DIGEST: "first"}

    class Client:
        def get_model_version(self, name, number):
            return SimpleNamespace(version=number, tags=dict(content), run_id="r", source="s", creation_timestamp=1)

    def fetch(address, part, folder, paths):
        fetched.append(address)
        folder.mkdir(parents=True)

    def unreachable(paths, **_):
        raise store.Unreachable("refused")

    monkeypatch.setattr(tracking, "connect", lambda paths, **_: Client())
    monkeypatch.setattr("dit.registry._fetch_part", fetch)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://a")
    first = download(paths, "digits", 1)
    content[DIGEST] = "second"  # the same address, begun anew
    second = download(paths, "digits", 1)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://b")
    third = download(paths, "digits", 1)
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", "http://c")
    fourth = download(paths, "digits", 1)
    assert len({first, second, third, fourth}) == 4 and fetched == ["models:/digits/1"] * 4
    assert download(paths, "digits", 1) == fourth and len(fetched) == 4
    monkeypatch.setattr(tracking, "connect", unreachable)  # what was fetched of it last is taken
    assert download(paths, "digits", 1) == fourth
    monkeypatch.delenv("MLFLOW_REGISTRY_URI")
    assert download(paths, "digits", 1) == third
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://a")
    os.utime(first, (0, 0))
    assert download(paths, "digits", 1) == second
    with pytest.raises(ValueError, match="models:/digits/2 could not be fetched .refused"):
        download(paths, "digits", 2)


FETCH = """
import sys
from pathlib import Path
from dit import registry
from dit.paths import Paths
fetch = registry._fetch_part
registry._fetch_part = lambda *told: (print("fetches", flush=True), sys.stdin.readline(), fetch(*told))
print(registry.download(Paths(Path(sys.argv[1])), "digits", 1), flush=True)
"""


def test_two_worktrees_at_once_fetch_a_model_once(client, run_id, tmp_path):
    def pack(folder, entry):
        (folder / "artifacts" / "ema").mkdir(parents=True)
        (folder / "artifacts" / "ema" / "model.safetensors").write_bytes(b"ema")
        (folder / "MLmodel").write_text("flavors: {}\n")

    Registry(client, "digits", tmp_path / "work").add("aa", run_id, {}, pack)
    running = []
    try:
        for name in "ab":
            tree = tmp_path / "scratch" / "worktrees" / name
            (tree / "scratch").mkdir(parents=True)
            (tree / "scratch" / "home").write_text(str(tmp_path))
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            words = [sys.executable, "-c", FETCH, str(tree)]
            running.append(subprocess.Popen(words, cwd=Path(__file__).parents[1], **pipes))
            if name == "a":
                assert running[0].stdout.readline() == "fetches\n"
        time.sleep(0.2)
        answers = [process.communicate("\n", timeout=120)[0].strip() for process in running]
    finally:
        for process in running:
            process.kill()
    assert answers[0] == answers[1] and Path(answers[0]).parent == tmp_path / "scratch" / "initial"
    assert (Path(answers[0]) / "model.safetensors").read_bytes() == b"ema"
