"""`dit train --profile`: some steps of params.yaml's training, and nothing of it kept."""

import argparse
import json

import pytest
import torch

from dit import cli, trial
from dit.checkpoint import save_tensors
from dit.paths import Paths, write_json

PARAMS = {
    "model": {
        "name": "custom",
        "patch_size": 2,
        "hidden_size": 16,
        "depth": 1,
        "num_heads": 2,
        "condition": "embeddings",
    },
    "objective": {"name": "transport"},
    "train": {"max_steps": 0, "global_batch_size": 8, "lr": 1e-2, "init_from": "weights/nowhere"},
    "run": {"device": "cpu", "compile": "off"},
}


@pytest.fixture
def paths(tmp_path):
    folder = tmp_path / "artifacts" / "encode"
    mean = torch.randn(24, 2, 4, 4)
    tensors = {"mean": mean.half(), "std": torch.full_like(mean, 0.1).half(), "label": torch.arange(24) % 3}
    folder.mkdir(parents=True)
    save_tensors(folder / "a.safetensors", tensors | {"features": torch.randn(24, 4, 6).half()})
    index = {"channels": 2, "size": 4, "classes": ["x", "y", "z"], "features": {"shape": [4, 6]}}
    index |= {"digest": "d" * 64, "normalization": {"mean": [0.0, 0.0], "std": [1.0, 1.0]}}
    index["shards"] = [{"file": "a.safetensors", "split": "train", "samples": 24, "sha256": "s"}]
    write_json(folder / "index.json", index)
    (tmp_path / "params.yaml").write_text(json.dumps(PARAMS))
    return Paths(tmp_path)


def content(paths):
    return {file.relative_to(paths.root).as_posix(): file.stat().st_mtime_ns for file in paths.root.rglob("*")}


def test_it_trains_what_params_yaml_asks_for_and_leaves_a_table_and_a_trace(paths):
    before = content(paths)
    said = trial.profile(paths, steps=1).splitlines()
    assert said[0].endswith("parameters, 8 images a step on cpu") and said[1].startswith("a step takes ")
    assert said[-1].startswith(f"{paths.root}/scratch/profile/table.txt, ")
    after = content(paths)
    added = {"scratch", "scratch/profile", "scratch/profile/table.txt", "scratch/profile/trace.json"}
    assert after.keys() == before.keys() | added
    assert {name: after[name] for name in before} == before


def test_the_command_trains_nothing_by_itself_and_tells_a_mistake_in_a_line(paths, monkeypatch, capsys):
    monkeypatch.chdir(paths.root)
    assert cli.main(["train"]) == 2
    assert capsys.readouterr().err == (
        "dit: `dvc repro train` trains; `dit train --profile` tells where a step's time goes\n"
    )
    (paths.artifacts / "encode" / "index.json").unlink()
    assert cli.main(["train", "--profile", "--steps", "1"]) == 2
    assert capsys.readouterr().err == (
        "dit: artifacts/encode holds no latents (index.json is missing or torn): run the stage `encode`\n"
    )


def test_twenty_steps_unless_told_otherwise():
    parser = argparse.ArgumentParser()
    trial.add_command(parser.add_subparsers())
    assert vars(parser.parse_args(["train", "--profile"])) == {"profile": True, "steps": 20, "run": trial.train}
