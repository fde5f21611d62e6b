import hashlib
import json
import os
import threading
import time

import pytest
import torch
from test_storage import credentials, faulty  # noqa: F401 (fixtures)
from waiting import until

from dit import latentcache
from dit.checkpoint import load_tensors, save_tensors
from dit.dataset import LatentDataset, conditions
from dit.paths import file_sha256
from dit.places import File, Folder, OutOfReach
from dit.storage import Bucket

SIZE, COUNT = 4, 8  # images in a shard, shards


@pytest.fixture(scope="module")
def encoded(tmp_path_factory):
    """What `encode` left elsewhere: shards whose images carry their numbers."""
    folder = tmp_path_factory.mktemp("elsewhere")
    shards = []
    for number in range(COUNT):
        value = torch.arange(number * SIZE, (number + 1) * SIZE)
        mean = value.view(-1, 1, 1, 1).expand(SIZE, 1, 16, 16).half()
        file = folder / f"{number}.safetensors"
        save_tensors(file, {"mean": mean.clone(), "std": mean.clone(), "label": value})
        shards.append({"file": file.name, "split": "train", "samples": SIZE, "sha256": file_sha256(file)})
    index = {"shards": shards, "normalization": {"mean": [0.0], "std": [1.0]}, "classes": ["a"]}
    (folder / "index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture
def here(encoded, tmp_path):
    """artifacts/encode with index.json alone."""
    (tmp_path / "encode").mkdir()
    (tmp_path / "encode" / "index.json").write_bytes((encoded / "index.json").read_bytes())
    return tmp_path / "encode"


class Elsewhere(Folder):
    """A folder that counts what is brought from it, and goes wrong as told."""

    def __init__(self, folder):
        super().__init__(str(folder))
        self.brought, self.damage, self.gate = [], {}, threading.Event()
        self.gate.set()

    def read(self, file, start=0, size=None, *, version=""):
        content = super().read(file, start, size, version=version)
        if start == 0 and size != 8:  # a shard, and not its header alone
            self.brought.append(file)
            self.gate.wait()
            damage = self.damage.get(file, 0)
            if damage:
                self.damage[file] = damage - 1
                return content[:-1] + bytes([content[-1] ^ 1])
        return content


def streamed(here, source, size=4, cache_gb=1.0, seed=0, **options):
    cache = here.parent / "cache"
    return LatentDataset(here, seed, size, where="streamed", source=source, cache=cache, cache_gb=cache_gb, **options)


def kept(here):
    return {file.stem for file in (here.parent / "cache").glob("*.safetensors")}


def test_the_next_windows_shards_come_while_this_one_is_read(here, encoded, monkeypatch):
    monkeypatch.setattr(latentcache, "READERS", 1)  # several would overtake each other
    source = Elsewhere(encoded)
    data = streamed(here, source, window=2 * SIZE)
    assert not source.brought
    first, second = (data.batches.streams[0].ahead(place)[0] for place in (0, 2 * SIZE))
    files = [{f"{number}.safetensors" for number in window} for window in (first, second)]
    data.batch(0)
    assert until(lambda: set(source.brought) == files[0] | files[1])
    time.sleep(0.05)
    assert set(source.brought) == files[0] | files[1], "more than the next window was brought"
    assert set(source.brought[:2]) == files[0], "what is needed first did not come first"
    data.close()


def test_a_shard_is_brought_once_for_all_epochs_and_trainings_that_share_the_cache(here, encoded):
    source = Elsewhere(encoded)
    expected = LatentDataset(encoded, 0, 6, window=8)
    first, second = streamed(here, source, 6, window=8), streamed(here, source, 6, window=8)
    failed = []

    def walk(data):
        for step in range(12):
            if not torch.equal(data.batch(step)["label"], expected.batch(step)["label"]):
                failed.append(step)

    other = threading.Thread(target=walk, args=(first,))
    other.start()
    walk(second)
    other.join()
    assert not failed
    assert sorted(source.brought) == [f"{number}.safetensors" for number in range(COUNT)]
    first.close(), second.close()


def test_the_cache_stays_within_its_bound_and_lets_go_of_what_was_used_longest_ago(here, encoded):
    length = (encoded / "0.safetensors").stat().st_size
    source = Elsewhere(encoded)
    data = streamed(here, source, window=SIZE, cache_gb=4.5 * length / 1e9)
    shas = [entry["sha256"] for entry in json.loads((here / "index.json").read_text())["shards"]]
    window = [data.batches.streams[0].ahead(place * SIZE)[0][0] for place in range(5)]
    for step in range(5):
        data.batch(step)
        assert until(lambda: all(future.done() for future in list(data.shards._shards.values())))
        assert len(kept(here)) <= 4
        assert {shas[window[place]] for place in range(max(0, step - 1), step + 1)} <= kept(here)
    assert shas[window[0]] not in kept(here)
    data.close()


def test_what_is_unfinished_for_an_hour_is_removed(here, encoded):
    (here.parent / "cache").mkdir()
    old, new = (here.parent / "cache" / f".{name}.safetensors.x1" for name in ("old", "new"))
    for file in (old, new):
        file.write_bytes(b"half")
    os.utime(old, (time.time() - 4000,) * 2)
    data = streamed(here, Elsewhere(encoded), window=SIZE)
    data.batch(0)
    assert new.exists() and not old.exists()
    data.close()


def test_a_shard_that_came_damaged_comes_again_and_is_refused_at_last(here, encoded):
    source = Elsewhere(encoded)
    data = streamed(here, source, window=SIZE)
    (number,), _ = data.batches.streams[0].ahead(0)
    file = f"{number}.safetensors"
    source.damage[file] = 1
    assert torch.equal(data.batch(0)["label"], LatentDataset(encoded, 0, 4, window=SIZE).batch(0)["label"])
    assert source.brought.count(file) == 2
    data.close()
    for cached in (here.parent / "cache").glob("*.safetensors"):
        cached.unlink()
    data = streamed(here, source, window=SIZE)
    source.damage[file] = 2
    with pytest.raises(ValueError, match=rf"run\.latents_from: .*{number}\.safetensors is not what index\.json tells"):
        data.batch(0)
    assert data.batch(0)["label"].tolist() == [*data.indices(0)]  # asked again, it tries again
    data.close()
    assert until(lambda: not list((here.parent / "cache").glob(".*.safetensors.*")))


def test_conditions_are_streamed_too(here, encoded, tmp_path):
    index = json.loads((here / "index.json").read_text()) | {"features": {}}
    there = tmp_path / "there"
    there.mkdir()
    for shard in index["shards"]:
        tensors = load_tensors(encoded / shard["file"])
        save_tensors(there / shard["file"], tensors | {"features": tensors["std"].flatten(2).clone()})
        shard |= {"split": "heldout", "sha256": file_sha256(there / shard["file"])}
    for folder in (here, there):
        (folder / "index.json").write_text(json.dumps(index))
    whole = conditions(there, 10)
    assert whole["features"].shape == (10, 1, 256) and torch.equal(whole["features"][:, 0, 0].long(), whole["label"])
    streamed = conditions(here, 10, source=Folder(str(there)), cache=tmp_path / "cache")
    assert set(streamed) == set(whole) and all(torch.equal(streamed[key], whole[key]) for key in whole)
    with pytest.raises(ValueError, match=r"set run\.latents_from"):
        conditions(here, 10)


def test_a_torn_file_of_the_cache_is_brought_again(here, encoded):
    expected = LatentDataset(encoded, 0, 32).batch(0)["label"]
    for _ in range(2):
        data = streamed(here, Elsewhere(encoded), 32)
        assert torch.equal(data.batch(0)["label"], expected)
        data.close()
        for number, cached in enumerate(sorted((here.parent / "cache").glob("*.safetensors"))):
            if number % 2:
                os.truncate(cached, 700)


def test_what_the_place_lacks_is_named(here, encoded, tmp_path):
    some = tmp_path / "some"
    some.mkdir()
    data = LatentDataset(encoded, 0, 4, window=SIZE)
    (first,), (second,) = data.batches.streams[0].ahead(0)
    (some / f"{first}.safetensors").write_bytes((encoded / f"{first}.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"run\.latents_from: .*/0\.safetensors is not there"):
        streamed(here, Folder(str(tmp_path / "nowhere")))
    (some / "0.safetensors").write_bytes((encoded / "0.safetensors").read_bytes())
    data = streamed(here, Folder(str(some)), window=SIZE)
    (some / f"{second}.safetensors").unlink(missing_ok=True)
    data.batch(0)
    with pytest.raises(ValueError, match=rf"run\.latents_from: .*/{second}\.safetensors is not there"):
        data.batch(1)
    data.close()


def test_what_could_not_be_fetched_ahead_is_fetched_when_it_is_needed(here, encoded):
    class Shaky(Elsewhere):
        failing = ""

        def find(self, name):
            if name == self.failing:
                raise OutOfReach("data.source: not now")
            return super().find(name)

    source = Shaky(encoded)
    data = streamed(here, source, window=SIZE)
    _, (second,) = data.batches.streams[0].ahead(0)
    source.failing = f"{second}.safetensors"
    data.batch(0)
    assert until(lambda: data.shards._shards[second].done())
    source.failing = ""
    assert torch.equal(data.batch(1)["label"], LatentDataset(encoded, 0, 4, window=SIZE).batch(1)["label"])
    data.close()


def test_a_place_that_does_not_answer_is_said_with_its_settings_name(here, encoded):
    class Silent(Elsewhere):
        def find(self, name):
            raise OutOfReach("data.source: s3://b could not be read")

    data = streamed(here, Silent(encoded))
    with pytest.raises(OutOfReach, match=r"run\.latents_from: s3://b could not be read"):
        data.batch(0)
    data.close()


def test_a_cache_that_cannot_hold_what_is_read_at_a_time_is_refused(here, encoded):
    length = (encoded / "0.safetensors").stat().st_size
    with pytest.raises(ValueError, match=r"run\.cache_gb: .* raise it, or set train\.shuffle_window"):
        streamed(here, Folder(str(encoded)), cache_gb=0.9 * COUNT * length / 1e9)
    data = streamed(here, Folder(str(encoded)), cache_gb=COUNT * length / 1e9)
    assert sorted(torch.cat([data.batch(step)["label"] for step in range(8)]).tolist()) == list(range(32))
    data.close()
    with pytest.raises(ValueError, match=r"run\.latents_from: set it to where"):
        LatentDataset(here, 0, 4, where="streamed")


def test_closing_ends_what_is_under_way_and_the_next_batch_begins_anew(here, encoded):
    source = Elsewhere(encoded)
    data = streamed(here, source)
    source.gate.clear()
    raised = []

    def wait():
        try:
            data.batch(0)
        except BaseException as error:
            raised.append(error)

    waiting = threading.Thread(target=wait)
    waiting.start()
    assert until(lambda: source.brought)
    while waiting.is_alive():  # whatever it waits for next
        data.close()
        waiting.join(0.01)
    assert isinstance(raised[0], InterruptedError)
    source.gate.set()
    assert until(lambda: not [thread for thread in threading.enumerate() if thread.name == "latents"])
    assert not list((here.parent / "cache").glob(".*.safetensors.*"))
    assert torch.equal(data.batch(0)["label"], LatentDataset(encoded, 0, 4).batch(0)["label"])
    data.close()


@pytest.mark.parametrize("fault", ["503", "reset", "cut", "corrupt"])
def test_from_a_bucket_whatever_goes_wrong_on_the_way(here, encoded, faulty, monkeypatch, fault):  # noqa: F811
    monkeypatch.setattr("dit.places.PIECE_BYTES", 1500)
    monkeypatch.setattr(latentcache, "PIECE_BYTES", 1500)
    faulty.objects = {f"runs/7/{file.name}": file.read_bytes() for file in encoded.glob("*.safetensors")}
    faulty.fault = lambda path, count: fault if count % 5 == 1 else ""
    data, whole = streamed(here, Bucket("s3://b/runs/7"), 8, window=8), LatentDataset(encoded, 0, 8, window=8)
    for step in range(4):
        batch = data.batch(step)
        assert all(torch.equal(batch[key], tensor) for key, tensor in whole.batch(step).items())
    data.close()
    faulty.objects.clear()
    with pytest.raises(ValueError, match=r"run\.latents_from: s3://b/runs/7/0\.safetensors is not there"):
        streamed(here, Bucket("s3://b/runs/7"))


class Synthetic:
    """A place with shards of 1,000 images that are made when they are read; all labels are the shard's number."""

    name, unsettled_ns, readers = "synthetic", 0, 4

    def __init__(self, template, count):
        self.template, self.count = template, count
        self.at = template.index(b"\0" * 8000)  # where the labels lie

    def content(self, number):
        return self.template[: self.at] + number.to_bytes(8, "little") * 1000 + self.template[self.at + 8000 :]

    def find(self, name):
        return File(name, len(self.template), 0, 0)

    def read(self, file, start=0, size=None, *, version=""):
        content = self.content(int(file))
        return content[start:] if size is None else content[start : start + size]


def resident_bytes():
    with open("/proc/self/statm") as told:
        return int(told.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_memory_does_not_grow_with_the_dataset(tmp_path):
    """Two million images of 72 bytes each, 144 MB in all: neither they nor one order of them (16 MB) is ever held."""
    ones = torch.ones(1000, 1, 4, 4).half()
    save_tensors(tmp_path / "t", {"mean": ones, "std": ones.clone(), "label": torch.zeros(1000, dtype=torch.int64)})
    source = Synthetic((tmp_path / "t").read_bytes(), 2000)
    shards = [
        {"file": str(n), "split": "train", "samples": 1000, "sha256": hashlib.sha256(source.content(n)).hexdigest()}
        for n in range(2000)
    ]
    index = {"shards": shards, "normalization": {"mean": [0.0], "std": [1.0]}, "classes": ["a"]}
    (tmp_path / "index.json").write_text(json.dumps(index))
    bound = 20 * len(source.template)
    data = streamed(tmp_path, source, 512, cache_gb=bound / 1e9, window=5000)
    data.batch(0)
    before, largest = resident_bytes(), 0
    for step in range(1, 4000, 800):
        batch = data.batch(step)
        assert torch.equal(batch["label"], data.indices(step) // 1000)
        largest = max(largest, resident_bytes() - before)
        cached = (tmp_path.parent / "cache").glob("*.safetensors")
        assert sum(file.stat().st_size for file in cached) <= bound
    data.close()
    assert largest < 4e6
