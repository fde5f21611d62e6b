"""Where a training step's time goes, by the loop that trains."""

import json

import pytest
import torch

from dit.checkpoint import save_tensors
from dit.dataset import LatentDataset
from dit.model import DiT, ModelConfig
from dit.objective import ObjectiveConfig
from dit.paths import write_json
from dit.profiling import PHASES, profile_training
from dit.runtime import RunConfig
from dit.training import TrainConfig


@pytest.fixture
def work(tmp_path):
    draws = torch.Generator().manual_seed(0)
    mean, label = torch.randn(40, 2, 4, 4, generator=draws), torch.arange(40) % 3
    tensors = {"mean": mean.half(), "std": torch.full_like(mean, 0.1).half(), "label": label}
    save_tensors(tmp_path / "a.safetensors", tensors)
    shards = [{"file": "a.safetensors", "split": "train", "samples": 40, "sha256": ""}]
    normalization = {"mean": [0.0, 0.0], "std": [1.0, 1.0]}
    write_json(tmp_path / "index.json", {"shards": shards, "classes": list("abc"), "normalization": normalization})
    network = DiT(ModelConfig("custom", 2, 16, 1, 2), input_size=4, in_channels=2, num_classes=3)
    settings = TrainConfig(max_steps=2, global_batch_size=8, lr=1e-2, snapshot_every_steps=1)

    def profiled(steps):
        data = LatentDataset(tmp_path, 0, 8)
        run = RunConfig(checkpoint_every_steps=1, preview_every_steps=1, score_every_steps=1, compile="off")
        return profile_training(network, data, ObjectiveConfig("transport"), settings, run, tmp_path / "profile", steps)

    return profiled, tmp_path / "profile"


def test_every_phase_has_its_time_and_all_together_are_the_step(work):
    profiled, folder = work
    found = profiled(3)
    assert tuple(found.phases) == (*PHASES, "other") and all(found.phases[name] > 0 for name in PHASES)
    assert sum(found.phases.values()) == pytest.approx(found.traced_seconds, rel=0.3)  # by two clocks
    assert found.phases["other"] < found.traced_seconds / 2 and found.step_seconds > 0
    operators = {name: (calls, seconds) for name, calls, seconds in found.operators}
    assert len(operators) == 12 and not any(name.startswith("train/") for name in operators)
    assert all(calls * 3 == round(calls * 3) and seconds > 0 for calls, seconds in operators.values())


def test_the_table_and_a_trace_for_the_browser_are_written(work):
    profiled, folder = work
    found = profiled(2)
    assert (folder / "table.txt").read_text() == found.table() + "\n"
    lines = found.table().splitlines()
    assert lines[0] == (
        f"a step takes {1e3 * found.step_seconds:.2f} ms, and {1e3 * found.traced_seconds:.2f} ms while it is traced"
    )
    assert [line.split()[0] for line in lines[3 : 4 + len(PHASES)]] == [*PHASES, "other"]
    shares = [float(line.split()[-1].rstrip("%")) for line in lines[3 : 4 + len(PHASES)]]
    assert sum(shares) == pytest.approx(100, rel=0.3)
    trace = json.loads((folder / "trace.json").read_text())["traceEvents"]
    names = [event.get("name") for event in trace]
    assert names.count("train/optimizer") == 2 and names.count("train/forward") == 2  # of the traced steps, no others
    assert {file.name for file in folder.iterdir()} == {"table.txt", "trace.json"}


def test_it_takes_one_step_at_least(work):
    profiled, folder = work
    with pytest.raises(ValueError, match="--steps must be at least 1, got 0"):
        profiled(0)
    assert not folder.exists()
