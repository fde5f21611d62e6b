"""encoding: the bits of a plain loop, whoever decodes; what is damaged is refused in one line; nothing is left running."""

import json
import threading

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_model import write_model

from dit import encoding
from dit.embeddings import open_features
from dit.encoding import Task, encode_shards, measure, read_samples, total
from dit.latents import Statistics
from dit.paths import Paths
from dit.shards import read_keys, read_manifest, read_shard
from dit.sources import DataConfig
from dit.stages.scan import scan
from dit.stages.shard import shard
from dit.vae import Autoencoder, batch_of


def make_shards(root, side, count, shard_images, held_out=0.2):
    """Tasks for the shards of random pictures in two classes, and a random autoencoder."""
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        (root / "pictures" / name).mkdir(parents=True)
        for i in range(count // 2):
            Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8)).save(root / "pictures" / name / f"{i}.png")
    data = DataConfig("noise", str(root / "pictures"), "folder", 2, side, True, held_out, 0, shard_images, 0.01)
    paths = Paths(root)
    scan(data, paths=paths)
    shard(data, paths=paths)
    write_model(paths.artifacts)
    shards = read_manifest(paths.artifacts / "shard")["shards"]
    files = [paths.artifacts / "shard" / entry["file"] for entry in shards]
    tasks = [
        Task(file, entry["samples"], root / f"{number}", str(number))
        for number, (file, entry) in enumerate(zip(files, shards, strict=True))
    ]
    return tasks, Autoencoder.load(paths.artifacts / "vae")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """230 images of 16 pixels: batches of 100, and the rest of each shard."""
    return make_shards(tmp_path_factory.mktemp("small"), 16, 230, 130)


def plainly(task, autoencoder, features=None):
    """A shard's tensors, one operation after the other."""
    _, labels, images = zip(*read_shard(task.source), strict=True)
    images, keys, size, parts = np.stack(images), read_keys(task.source), batch_of(images[0].shape[0]), []
    for start in range(0, len(images), size):
        some, theirs = images[start : start + size], keys[start : start + size]
        found = dict(zip(("mean", "std"), autoencoder.moments(some), strict=True))
        found |= dict(zip(("mean_mirror", "std_mirror"), autoencoder.moments(some[:, :, ::-1]), strict=True))
        if features:
            found |= {"features": features.of(theirs, some), "features_mirror": features.of_mirror(theirs, some)}
        parts.append({key: value.half() for key, value in found.items()})
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]} | {"label": torch.tensor(labels)}


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("threads", [1, 4])
def test_the_bits_are_those_of_a_plain_loop(small, monkeypatch, threads):
    tasks, autoencoder = small
    assert max(task.samples for task in tasks) > batch_of(16), "a shard of several batches"
    monkeypatch.setattr(encoding, "decoders", lambda: threads)
    features, counted = open_features("pixels-2x2"), []
    made = encode_shards(
        tasks, 16, autoencoder, lambda *made: made, mirror=True, features=features, progress=counted.append
    )
    assert [task for task, _ in made] == tasks and sum(counted) == 230
    assert all(equal(tensors, plainly(task, autoencoder, features)) for task, tensors in made)


def test_images_of_512_pixels_go_one_by_one(tmp_path):
    assert batch_of(512) == 1
    tasks, autoencoder = make_shards(tmp_path, 512, 2, 2, held_out=0.0)
    [made] = encode_shards(tasks, 512, autoencoder, lambda task, tensors: tensors, mirror=True)
    assert made["mean"].shape == (2, 4, 256, 256) and equal(made, plainly(tasks[0], autoencoder))


def test_statistics_of_parts_are_those_of_all(small):
    tasks, autoencoder = small
    whole, notes = Statistics(4), []
    for task in tasks:
        tensors = plainly(task, autoencoder)
        whole.add(tensors["mean"].float(), tensors["std"].float())
        notes.append(json.loads(json.dumps(measure(tensors, 4))))
    assert list(total(notes, 4)) == list(whole)


def test_samples_are_those_that_tarfile_reads(small):
    for task in small[0]:
        samples = list(read_samples(task.source))
        assert [json.loads(sample["json"])["key"] for sample in samples] == read_keys(task.source)
        assert [int(sample["cls"]) for sample in samples] == [label for _, label, _ in read_shard(task.source)]


def cut(content):
    return content[: len(content) // 2]


def cut_at_a_member(content):
    return content[: content.index(b".cls") // 512 * 512 + 512]


def without_a_picture(content):
    return content.replace(b".png\0", b".jpg\0", 1)


def torn_picture(content):
    start = content.index(b"IDAT")
    return content[: start + 8] + bytes(64) + content[start + 72 :]


def no_tar(content):
    return b"x" * 1024 + content


@pytest.mark.parametrize(
    "damage", [cut, cut_at_a_member, without_a_picture, torn_picture, no_tar, lambda content: None]
)
def test_a_damaged_shard_is_refused_and_nothing_is_left_running(small, tmp_path, damage):
    tasks, autoencoder = small
    content = damage(tasks[1].source.read_bytes())
    file = tmp_path / "damaged.tar"
    if content is not None:
        file.write_bytes(content)
    threads = threading.active_count()
    bad = [tasks[0], Task(file, tasks[1].samples, *(tmp_path, "")), *tasks[2:]]
    with pytest.raises(ValueError, match="damaged.tar is (missing or )?damaged .*: run the stage `shard`"):
        encode_shards(bad, 16, autoencoder, lambda *made: made)
    assert threading.active_count() == threads


@pytest.mark.parametrize("more", [-1, 1])
def test_a_shard_with_another_number_of_images_is_refused(small, more):
    tasks, autoencoder = small
    bad = Task(tasks[0].source, tasks[0].samples + more, tasks[0].path, "")
    with pytest.raises(ValueError, match="holds another number of images than manifest.json tells"):
        encode_shards([bad], 16, autoencoder, lambda *made: made)


def test_an_error_in_writing_ends_all(small):
    def full(task, tensors):
        raise OSError(28, "No space left on device")

    threads = threading.active_count()
    with pytest.raises(OSError, match="No space left"):
        encode_shards(small[0], 16, small[1], full)
    assert threading.active_count() == threads


def test_processes_of_one_machine_share_its_cores(monkeypatch):
    monkeypatch.setattr(encoding.os, "cpu_count", lambda: 64)
    assert encoding.decoders() == encoding.MOST_DECODERS
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "16")
    assert encoding.decoders() == 3
    monkeypatch.setattr(encoding.os, "cpu_count", lambda: 2)
    assert encoding.decoders() == 1
