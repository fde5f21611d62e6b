import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
import train  # noqa: E402

from dit import presets  # noqa: E402

CPU = torch.device("cpu")


def test_every_step_learns_the_same_and_the_tables_tell():
    row = train.measure("tiny", 2, CPU, "fp32", tricks=True)
    assert list(row.steps) == [*train.TRICKS, "ours"] and row.difference <= train.TOLERANCE["fp32"]
    assert all(len(turns) == 2 and min(turns) > 0 for turns in row.steps.values())
    header, rule, line = train.table([row]).splitlines()
    assert line.count("|") == header.count("|") == rule.count("|") and "| tiny | 4 |" in line
    told = train.tricks_table(row)
    assert all(f"| {kind} | " in told for kind in row.steps) and "| 1.00x |" in told


def test_a_step_that_learns_something_else_is_found_out(monkeypatch):
    plain = train.step_of
    monkeypatch.setattr(train, "step_of", lambda *given: lambda inputs: 1.001 * plain(*given)(inputs))
    with pytest.raises(RuntimeError, match="the losses differ by"):
        train.measure("tiny", 1, CPU, "fp32")


def test_the_work_is_three_forward_passes():
    tokens, D, depth, channels = 4, 32, 2, 4
    block = 12 * tokens * D * D + 2 * tokens * tokens * D + 6 * D * D
    ends = tokens * D * 16 * (channels + channels) + 2 * D * D + 256 * D + D * D
    row = train.measure("tiny", 1, CPU, "fp32")
    assert row.macs == 3 * 4 * (depth * block + ends)


def test_the_digits_model_is_the_presets():
    settings = presets.resolve("digits", ROOT / "presets")
    model, case = settings["model"], train.CASES["digits"]
    assert all(model[name] == value for name, value in case.model.items())
    assert case.batch_size == settings["train"]["global_batch_size"]
    assert case.objective == settings["objective"]["name"] and case.num_classes == settings["data"]["num_classes"]


def test_batch_sizes_are_doubled_until_memory_ends(monkeypatch):
    inputs_of = train.inputs_of

    def short_of_memory(case, size, device):
        if size > 32:
            raise torch.OutOfMemoryError("no more")
        return inputs_of(case, size, device)

    monkeypatch.setattr(train, "inputs_of", short_of_memory)
    found = train.best("tiny", CPU, "bf16", 1)
    assert list(found.tried) == [8, 16, 32] and found.images_per_second == max(found.tried.values())
    assert f"| tiny | {found.batch_size} |" in train.best_table([found])


def test_the_script_runs_on_its_own():
    command = [sys.executable, "benchmarks/train.py", "--case", "tiny", "--repeats", "1", "--json"]
    told = json.loads(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout)
    assert told["about"]["threads"] == 1 and set(told["rows"][0]["steps"]) == {"plain", "ours"}
