"""encode with features: from a folder of pictures to latents that carry them, and to a model that is asked with them."""

import hashlib
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_model import SIZE, write_model

from dit.checkpoint import Checkpoint, load_checkpoint
from dit.generation import SampleConfig, Setting, generate_blocks
from dit.latents import EncodeConfig, LatentDataset, conditions, pick_features, read_index
from dit.paths import Paths
from dit.runtime import RunConfig
from dit.sources import DataConfig, read_listing
from dit.stages.encode import encode
from dit.stages.scan import scan
from dit.stages.shard import shard
from dit.vae import Autoencoder

RUN = RunConfig("cpu")


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """24 pictures in two classes, sharded, and a random autoencoder."""
    root = tmp_path_factory.mktemp("project")
    rng = np.random.default_rng(0)
    for name in ("cats", "dogs"):
        (root / "pictures" / name).mkdir(parents=True)
        for i in range(12):
            Image.fromarray(rng.integers(0, 256, (SIZE, SIZE, 3), np.uint8)).save(root / "pictures" / name / f"{i}.png")
    data = DataConfig("pets", str(root / "pictures"), "folder", 2, SIZE, True, 0.25, 0, 10, 0.01)
    paths = Paths(root)
    scan(data, paths=paths)
    shard(data, paths=paths)
    write_model(paths.artifacts)
    return paths, data


def keys(paths):
    return [row.key for row in read_listing(paths.artifacts / "scan" / "listing.json").rows]


def write(path, names, shift=0.0):
    """Features (n, 2, 3) whose first number is a function of the key."""
    values = np.zeros((len(names), 2, 3), np.float32)
    values[:, 0, 0] = [of(name) + shift for name in names]
    np.savez(path, keys=np.array(names), features=values)
    return str(path)


def of(key):
    return int(key.split("/")[1].removesuffix(".png")) + 100 * key.startswith("dogs")


def run(project, features):
    paths, data = project
    encode(data, EncodeConfig(features=features), RUN, paths=paths)
    return paths.artifacts / "encode"


def test_latents_without_features_are_as_they_were(project):
    folder = run(project, None)
    index = read_index(folder)
    assert "features" not in index
    assert set(LatentDataset(folder, 0, 4).batch(0)) == {"mean", "std", "mean_mirror", "std_mirror", "label"}
    with pytest.raises(ValueError, match="holds no features: set encode.features"):
        conditions(folder)


def test_a_files_features_reach_their_images(project, tmp_path):
    paths, _ = project
    names = keys(paths)
    folder = run(project, write(tmp_path / "f.npz", [*names[::-1], "birds/7.png"]))
    assert read_index(folder)["features"]["shape"] == [2, 3]
    size = LatentDataset(folder, 0, 1).size
    batch = LatentDataset(folder, 0, size).batch(0)
    assert batch["features"].dtype == torch.float16 and "features_mirror" not in batch
    told = batch["features"][:, 0, 0]
    assert len(set(told.tolist())) == size and torch.equal((told >= 100).long(), batch["label"])
    assert torch.equal(pick_features(batch, torch.ones(size, dtype=torch.bool)), batch["features"].float())
    bank = conditions(folder)
    held = bank["features"][:, 0, 0].tolist()
    assert len(held) == 24 - size > 4 and not set(held) & set(told.tolist())
    assert [value >= 100 for value in held] == (bank["label"] == 1).tolist()
    first = conditions(folder, limit=4)
    assert torch.equal(first["features"], bank["features"][:4]) and len(first["label"]) == 4


def test_a_files_mirror_images_reach_theirs(project, tmp_path):
    names = keys(project[0])
    grid = np.random.default_rng(0).random((len(names), 4, 3), np.float32).astype(np.float16)
    grid[:, 0, 0] = [of(name) for name in names]
    mirror = grid.reshape(-1, 2, 2, 3)[:, :, ::-1].reshape(-1, 4, 3)
    np.savez(tmp_path / "f.npz", keys=np.array(names), features=grid, features_mirror=mirror)
    data = LatentDataset(run(project, str(tmp_path / "f.npz")), 0, 6)
    batch = data.batch(0)
    assert torch.equal(batch["features_mirror"].view(6, 2, 2, 3), batch["features"].view(6, 2, 2, 3).flip(2))
    picked = pick_features(batch, torch.tensor([True, False] * 3))
    assert torch.equal(picked[::2], batch["features_mirror"][::2].float())
    paths, config = project
    encode(replace(config, mirror=False), EncodeConfig(features=str(tmp_path / "f.npz")), RUN, paths=paths)
    assert "features_mirror" not in LatentDataset(paths.artifacts / "encode", 0, 6).batch(0)


def test_images_without_features_are_counted_before_any_work(project, tmp_path, monkeypatch):
    names = sorted(keys(project[0]))
    monkeypatch.setattr(Autoencoder, "moments", lambda *_: pytest.fail("work was done"))
    with pytest.raises(ValueError, match="nothing for 2 images, the first is 'cats/"):
        run(project, write(tmp_path / "f.npz", names[2:]))


def test_only_shards_whose_features_changed_are_encoded_again(project, tmp_path, capsys):
    paths, _ = project
    names, file = sorted(keys(paths)), tmp_path / "f.npz"
    run(project, write(file, names))
    whole = {s["file"]: s["sha256"] for s in read_index(paths.artifacts / "encode")["shards"]}
    # What DVC's cache would give back: here, the files of the run before.
    cache = paths.root / ".dvc" / "cache" / "files" / "md5"
    for path in (paths.artifacts / "encode").rglob("*.safetensors"):
        md5 = hashlib.md5(path.read_bytes()).hexdigest()
        (cache / md5[:2]).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, cache / md5[:2] / md5[2:])
    capsys.readouterr()
    run(project, write(file, [*names, "another/1.png"]))
    assert "0 encoded" in capsys.readouterr().out, "the other keys of the file are nobody's"
    with np.load(file) as arrays:
        changed = arrays["features"].copy()
    changed[0] += 1
    np.savez(file, keys=np.array([*names, "another/1.png"]), features=changed)
    run(project, str(file))
    assert "1 encoded" in capsys.readouterr().out
    now = {s["file"]: s["sha256"] for s in read_index(paths.artifacts / "encode")["shards"]}
    assert sum(now[name] != whole[name] for name in whole) == 1


def test_an_extractor_sees_the_mirror_image_too(project):
    folder = run(project, "pixels-2x2-tokens")
    data = LatentDataset(folder, 0, 6)
    batch = data.batch(0)
    assert batch["features"].shape == (6, 4, 3) == tuple(batch["features_mirror"].shape)
    grid, mirror = batch["features"].view(6, 2, 2, 3), batch["features_mirror"].view(6, 2, 2, 3)
    torch.testing.assert_close(mirror, grid.flip(2), atol=2e-3, rtol=0)
    pick = torch.tensor([True, False] * 3)
    picked = pick_features(batch, pick)
    assert picked.dtype == torch.float32 and torch.equal(picked[1::2], batch["features"][1::2].float())
    assert torch.equal(picked[::2], batch["features_mirror"][::2].float())
    assert torch.equal(pick_features(batch, None), batch["features"].float())


def test_a_model_is_asked_with_the_features_of_held_out_images(project, tmp_path):
    bank = conditions(run(project, "pixels-4x4"))
    write_model(tmp_path, classes=["cats", "dogs"], condition_shape=tuple(bank["features"].shape[1:]))
    checkpoint = load_checkpoint(tmp_path / "ema")
    asked = Checkpoint(checkpoint.model, checkpoint.config, bank)
    way = Setting("s", 1.5, "euler", 2)
    config = SampleConfig(9, 0, "balanced", 4, (way,))
    images, labels = generate_blocks(asked, Autoencoder.load(tmp_path / "vae"), way, config)
    assert (
        images.shape == (9, SIZE, SIZE, 3)
        and labels.tolist() == bank["label"][torch.arange(9) % len(bank["label"])].tolist()
    )
