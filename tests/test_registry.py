"""Versions by what they hold, and aliases, in a real database."""

import pytest

from dit import tracking
from dit.paths import Paths
from dit.registry import DIGEST, Registry


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


def test_what_was_fetched_is_what_was_packed(client, run_id, tmp_path):
    registry = Registry(client, "digits", tmp_path / "work")

    def pack(folder, entry):
        (folder / "artifacts").mkdir(parents=True)
        (folder / "MLmodel").write_text("flavors: {}\n")
        (folder / "artifacts" / "weights").write_bytes(b"1234")

    version = registry.add("aa", run_id, {}, pack)
    there = registry.fetch(version, tmp_path / "fetched")
    assert (there / "artifacts" / "weights").read_bytes() == b"1234" and not list((tmp_path / "work").iterdir())
