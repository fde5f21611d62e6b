import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit import latentshards
from dit.checkpoint import save_tensors
from dit.dataset import LatentDataset
from dit.latents import read_index
from dit.paths import file_sha256
from dit.places import Folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encode")
    (folder / "train").mkdir()
    shards = []
    for number, size in enumerate((7, 4)):
        value = torch.arange(size).float() + 10 * number
        mean = value.view(-1, 1, 1, 1).expand(size, 2, 3, 3).half()
        tensors = {"mean": mean, "std": torch.zeros_like(mean), "label": value.long()}
        save_tensors(folder / "train" / f"{number}.safetensors", tensors)
        shards.append({"file": f"train/{number}.safetensors", "split": "train", "sha256": str(number)})
    index = {"shards": shards, "normalization": {"mean": [1.0, 2.0], "std": [2.0, 4.0]}, "classes": ["a"]}
    (folder / "index.json").write_text(json.dumps(index))
    return folder


@settings(max_examples=30, deadline=None)
@given(batch=st.integers(1, 30), seed=st.integers(0, 3))
def test_every_epoch_shows_every_image_once(folder, batch, seed):
    data = LatentDataset(folder, seed, batch)
    steps = -(-3 * data.size // batch)
    seen = torch.cat([data.indices(step) for step in range(steps)])[: 3 * data.size]
    for epoch in seen.view(3, data.size):
        assert sorted(epoch.tolist()) == list(range(data.size))


@settings(max_examples=30, deadline=None)
@given(step=st.integers(0, 500), batch=st.sampled_from([1, 4, 11, 25]))
def test_a_batch_is_a_function_of_seed_and_step_alone(folder, step, batch):
    walked, fresh = LatentDataset(folder, 3, batch), LatentDataset(folder, 3, batch)
    for earlier in (step + 7, 0, 2 * step):
        walked.batch(earlier)
    assert torch.equal(walked.batch(step)["label"], fresh.batch(step)["label"])


def test_the_global_order_does_not_depend_on_the_batch_size(folder):
    orders = [torch.cat([LatentDataset(folder, 1, b).indices(s) for s in range(44 // b)]) for b in (1, 4, 11, 22)]
    assert all(torch.equal(orders[0], order) for order in orders)


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    """Six shards of 3 to 8 images with mirror images and features; an image's mean is its number."""
    folder = tmp_path_factory.mktemp("several")
    shards, first = [], 0
    for number, size in enumerate((3, 8, 5, 4, 7, 6)):
        value = torch.arange(first, first + size).view(-1, 1, 1, 1)
        mean = value.expand(size, 2, 3, 3).half()
        tensors = {"mean": mean, "std": mean / 64, "mean_mirror": mean + 0.5, "std_mirror": mean / 32}
        tensors |= {"label": torch.arange(size) % 3, "features": mean.flatten(2).clone()}
        save_tensors(folder / f"{number}.safetensors", {key: tensor.clone() for key, tensor in tensors.items()})
        sha256 = file_sha256(folder / f"{number}.safetensors")
        shards.append({"file": f"{number}.safetensors", "split": "train", "samples": size, "sha256": sha256})
        shards[-1]["counts"] = {str(label): count for label, count in enumerate(tensors["label"].bincount().tolist())}
        first += size
    shards.append({"file": "none.safetensors", "split": "heldout", "samples": 2, "sha256": ""})
    index = {"shards": shards, "normalization": {"mean": [0.0] * 2, "std": [1.0] * 2}, "classes": ["a", "b", "c"]}
    (folder / "index.json").write_text(json.dumps(index))
    return folder


def without(folder, elsewhere, missing=(), **changes):
    """A copy of an encode folder that lacks some shards."""
    for file in folder.iterdir():
        if file.name not in missing:
            (elsewhere / file.name).write_bytes(file.read_bytes())
    index = json.loads((folder / "index.json").read_text()) | changes
    (elsewhere / "index.json").write_text(json.dumps(index))
    return elsewhere


MODES = [
    {},
    {"window": 9},
    {"parts": 2},
    {"parts": 3, "window": 5},
    {"classes": "balanced"},
    {"classes": {"a": 3.0, "c": 0.0}, "window": 9, "parts": 2},
]


@pytest.mark.parametrize("settings_", MODES, ids=str)
def test_batches_are_the_same_from_memory_from_files_and_from_elsewhere(several, tmp_path, settings_):
    memory = LatentDataset(several, 0, 7, where="memory", **settings_)
    mapped = LatentDataset(several, 0, 7, where="mapped", **settings_)
    alone = without(several, tmp_path, [f"{number}.safetensors" for number in range(6)])
    there = {"where": "streamed", "source": Folder(str(several)), "cache": tmp_path / "cache"}
    streamed = LatentDataset(alone, 0, 7, **there, **settings_)
    for step in (0, 1, 9, 4):
        whole = memory.batch(step)
        assert set(whole) == {"mean", "std", "mean_mirror", "std_mirror", "label", "features"}
        assert torch.equal(whole["mean"][:, 0, 0, 0].long(), memory.indices(step))
        for data in (mapped, streamed):
            for part in (slice(None), slice(2, 5), slice(5, None), slice(3, 3)):
                batch = data.batch(step, part)
                assert all(torch.equal(batch[key], tensor[part]) for key, tensor in whole.items())
                assert all(batch[key].dtype == tensor.dtype for key, tensor in whole.items())
    streamed.close()


def test_a_process_reads_the_shards_of_its_rows_only(several, tmp_path):
    whole = LatentDataset(several, 0, 8, parts=2)
    for part in (slice(0, 4), slice(4, 8)):
        rows = range(8)[part]
        others = set(range(6)) - set(whole.batches.shards(rows))
        assert len(others) == 3
        (tmp_path / str(rows)).mkdir()
        folder = without(several, tmp_path / str(rows), [f"{number}.safetensors" for number in others])
        for where in ("memory", "mapped", "auto"):
            data = LatentDataset(folder, 0, 8, parts=2, rows=part, where=where)
            for step in (0, 3, 7):
                assert torch.equal(data.batch(step, part)["mean"], whole.batch(step)["mean"][part])
        assert len(data.tensors["label"]) == whole.batches.streams[rows.start // 4].size
        with pytest.raises(AssertionError, match="not asked for"):
            data.batch(0)
        with pytest.raises(ValueError, match=r"is missing: run `dvc pull`, or set run\.latents_from"):
            LatentDataset(folder, 0, 8, parts=2)


def test_what_there_is_of_each_image_is_known_without_reading_any(several, folder):
    for where in ("memory", "mapped"):
        data = LatentDataset(several, 0, 4, where=where)
        assert set(data.keys) == {"mean", "std", "mean_mirror", "std_mirror", "label", "features"} and data.mirror
        assert data.has("features") and not data.has("features_mirror") and data.size == 33
        assert (data.shape("mean"), data.shape("label"), data.feature_shape) == ((2, 3, 3), (), (2, 9))
        assert set(data.batch(0, keys={"std", "features_mirror"})) == {"std"}
        assert data.in_memory == (where == "memory") and bool(data.tensors) == data.in_memory
    plain = LatentDataset(folder, 0, 4)
    assert plain.feature_shape is None and not plain.mirror and plain.in_memory


def test_latents_that_memory_has_no_room_for_are_mapped(several, monkeypatch):
    needed = sum(file.stat().st_size for file in several.glob("*.safetensors"))
    for room, processes, expected in ((2, "1", True), (2, "3", False), (6.1, "3", True), (1.9, "1", False)):
        monkeypatch.setattr(latentshards, "main_memory", lambda room=room: room * needed * 1.25)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
        assert LatentDataset(several, 0, 4).in_memory == expected, (room, processes)


def test_weights_by_name_change_how_often_a_class_is_seen(several, tmp_path):
    for missing in (False, True):  # what index.json does not count is counted
        if missing:
            index = read_index(several)
            shards = [{key: told for key, told in shard.items() if key != "counts"} for shard in index["shards"]]
            several = without(several, tmp_path, shards=shards)
        data = LatentDataset(several, 0, 33, classes={"a": 0.5, "b": 0.0}, where="mapped")
        labels = torch.cat([data.batch(step)["label"] for step in range(20)])
        assert labels.bincount(minlength=3).tolist() == [220, 0, 440]


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ({"d": 1.0}, r"train\.classes: there is no class 'd' \(a, b, c\)"),
        ({"a": -1.0}, r"train\.classes: weights must be 0 or more"),
        ({"a": 0.0, "b": 0.0, "c": 0.0}, r"train\.classes: weights must be 0 or more, and one above 0"),
    ],
)
def test_weights_that_mean_nothing_are_refused(several, classes, message):
    with pytest.raises(ValueError, match=message):
        LatentDataset(several, 0, 4, classes=classes)


def test_images_without_classes_cannot_be_balanced(several, tmp_path):
    with pytest.raises(ValueError, match=r"train\.classes: these images have no classes: set it to natural"):
        LatentDataset(without(several, tmp_path, classes=[]), 0, 4, classes="balanced")


def test_other_tensors_can_take_the_folders_place(several):
    data = LatentDataset(several, 0, 4)
    data.tensors = {key: tensor[:10] for key, tensor in data.tensors.items()}
    assert data.size == 10 and sorted(torch.cat([data.indices(s) for s in range(5)]).tolist()) == sorted(
        [*range(10)] * 2
    )
    data.tensors["features_mirror"] = torch.zeros(10, 2, 9)
    assert data.has("features_mirror") and data.batch(1)["features_mirror"].shape == (4, 2, 9)
