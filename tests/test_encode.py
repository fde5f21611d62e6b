"""encode: from a folder of pictures to latents, with features and a model that is asked with them, and by two processes."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from ports import free_port
from tiny_model import SIZE, write_model

from dit.checkpoint import Checkpoint, load_checkpoint, load_tensors
from dit.dataset import LatentDataset, conditions
from dit.generation import SampleConfig, Setting, generate_blocks
from dit.latents import EncodeConfig, index_digest, pick_features, read_index
from dit.paths import Paths
from dit.runtime import RunConfig
from dit.sources import DataConfig, read_listing
from dit.stages import encode as stage
from dit.stages.encode import encode
from dit.stages.scan import scan
from dit.stages.shard import shard
from dit.vae import Autoencoder

RUN = RunConfig("cpu")
ROOT = Path(__file__).parents[1]


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


def into_cache(paths):
    """Have what DVC's cache would give back: here, the files of the run before."""
    cache = paths.root / ".dvc" / "cache" / "files" / "md5"
    for path in (paths.artifacts / "encode").rglob("*.safetensors"):
        md5 = hashlib.md5(path.read_bytes()).hexdigest()
        (cache / md5[:2]).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, cache / md5[:2] / md5[2:])


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_index_counts_each_shards_labels_and_its_digest_does_not_depend_on_them(project):
    folder = run(project, None)
    index = read_index(folder)
    for entry in index["shards"]:
        labels = load_tensors(folder / entry["file"])["label"].tolist()
        assert entry["counts"] == {str(label): labels.count(label) for label in sorted(set(labels))}
        assert sum(entry["counts"].values()) == entry["samples"]
    for entry in index["shards"]:
        del entry["counts"]
    assert index["digest"] == index_digest(index)


def test_what_is_used_again_is_not_read_and_gives_the_same_index(project, capsys, monkeypatch):
    paths, _ = project
    whole = contents(run(project, "pixels-2x2"))
    into_cache(paths)
    with monkeypatch.context() as patch:
        patch.setattr(stage, "load_tensors", lambda path: pytest.fail(f"{path} was read"))
        assert contents(run(project, "pixels-2x2")) == whole
    assert " 0 encoded" in capsys.readouterr().out
    file = paths.scratch / "reuse" / "encode.json"
    known = json.loads(file.read_text())
    assert all(entry["note"] for entry in known.values())
    file.write_text(json.dumps({digest: entry | {"note": None} for digest, entry in known.items()}))
    assert contents(run(project, "pixels-2x2")) == whole, "as an earlier version remembered them"
    again = {digest: entry for digest, entry in json.loads(file.read_text()).items() if entry["note"]}
    assert len(again) == len(read_index(paths.artifacts / "encode")["shards"]) and all(
        known[digest] == again[digest] for digest in again
    )


def test_a_run_that_was_stopped_goes_on_with_the_next_shard(project, tmp_path, capsys, monkeypatch):
    paths, data = project
    other = Paths(tmp_path)
    for name in ("shard", "vae"):
        shutil.copytree(paths.artifacts / name, other.artifacts / name)
    save, saved = stage.save_tensors, []

    def fill(path, tensors):
        if len(saved) == 2:
            raise OSError(28, "No space left on device")
        save(path, tensors)
        saved.append(path)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(stage, "save_tensors", fill)
        encode(data, EncodeConfig(), RUN, paths=other)
    assert not other.artifacts.joinpath("encode").exists() and not list(other.scratch.glob("publish/*"))
    encode(data, EncodeConfig(), RUN, paths=other)
    assert " 2 reused" in capsys.readouterr().out
    assert contents(other.artifacts / "encode") == contents(run(project, None))


# The stage, as one of two processes; GRIEF is the one that is killed when it has made a shard.
PROCESS = """
import os, signal, sys
from pathlib import Path
from dit import entry
from dit.latents import EncodeConfig
from dit.paths import Paths
from dit.runtime import RunConfig
from dit.sources import DataConfig
from dit.stages import encode as stage

remember = stage.reuse.remember
def then_die(*arguments):
    made = remember(*arguments)
    if os.environ["RANK"] == os.environ.get("GRIEF"):
        os.kill(os.getpid(), signal.SIGKILL)
    return made
stage.reuse.remember = then_die
entry.config.load = lambda *_: {"data": DataConfig(*DATA), "encode": EncodeConfig(), "run": RunConfig("cpu")}
entry.main(stage.encode, together=True)
"""


@pytest.mark.slow
def test_two_processes_write_the_bytes_of_one_and_go_on_where_one_of_them_died(project, tmp_path):
    paths, data = project
    for name in ("shard", "vae"):
        shutil.copytree(paths.artifacts / name, tmp_path / "artifacts" / name)
    told = [getattr(data, name) for name in data.__dataclass_fields__]
    script = tmp_path / "script.py"
    script.write_text(PROCESS.replace("*DATA", f"*{told!r}"))
    outcome, folder = tmp_path / "scratch" / "outcome" / "encode.json", tmp_path / "artifacts" / "encode"
    says = []
    for grief in ("1", ""):
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        spread = os.environ | where | {"WORLD_SIZE": "2", "GRIEF": grief, "PYTHONPATH": str(ROOT)}
        processes = [
            subprocess.Popen(
                [sys.executable, str(script)],
                env=spread | {"RANK": rank},
                cwd=tmp_path,
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in "01"
        ]
        says.append([process.communicate(timeout=200)[0] for process in processes])
        if grief:
            assert processes[1].returncode == -9 and not folder.exists()
            assert json.loads(outcome.read_text())["status"] == "interrupted", says
        else:
            assert [process.returncode for process in processes] == [0, 0]
    main, other = says[-1]
    shards = len(read_index(folder)["shards"])
    reused = shards // 2 + shards % 2 + 1  # all of the main process, and one of the other
    assert f"{shards} shards of latents: {shards - reused} encoded, {reused} reused" in main and not other
    assert "24/24 images" in main, "those of the other process are counted"
    assert contents(folder) == contents(run(project, None))
    assert not list((tmp_path / "scratch" / "reuse" / "encode").iterdir())


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
    monkeypatch.setattr(stage, "encode_shards", lambda *_, **__: pytest.fail("work was done"))
    with pytest.raises(ValueError, match="nothing for 2 images, the first is 'cats/"):
        run(project, write(tmp_path / "f.npz", names[2:]))


def test_only_shards_whose_features_changed_are_encoded_again(project, tmp_path, capsys):
    paths, _ = project
    names, file = sorted(keys(paths)), tmp_path / "f.npz"
    run(project, write(file, names))
    whole = {s["file"]: s["sha256"] for s in read_index(paths.artifacts / "encode")["shards"]}
    into_cache(paths)
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
