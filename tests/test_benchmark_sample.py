import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
import sample  # noqa: E402


def test_both_draw_the_same_latents_and_the_table_tells():
    row = sample.measure("tiny", 4, 5, 2, torch.device("cpu"))
    assert row.difference <= sample.TOLERANCE["fp32"]
    assert len(row.ours) == len(row.theirs) == len(row.matrix) == 2
    header, _, line = sample.table([row]).splitlines()
    assert line.count("|") == header.count("|") and "| tiny | 4 | 5 |" in line


def test_other_latents_are_found_out(monkeypatch):
    plain = sample.ours
    monkeypatch.setattr(sample, "ours", lambda *given: lambda: plain(*given)() * 1.001)
    with pytest.raises(RuntimeError, match="the latents differ by"):
        sample.measure("tiny", 2, 2, 1, torch.device("cpu"))


def test_the_work_is_counted_for_both_halves_of_guidance():
    tokens, D, depth, channels = 16, 32, 2, 4
    block = 12 * tokens * D * D + 2 * tokens * tokens * D + 6 * D * D
    ends = tokens * D * 4 * (channels + 2 * channels) + 2 * D * D + 256 * D + D * D
    row = sample.measure("tiny", 3, 5, 1, torch.device("cpu"))
    assert row.macs == 2 * 3 * 5 * (depth * block + ends)


def test_without_diffusers_ours_is_timed_alone():
    code = (
        "import sys; sys.path.insert(0, 'benchmarks'); sys.modules['diffusers'] = None; "
        "sys.argv = ['sample.py', '--case', 'tiny', '--repeats', '1', '--threads', '1', '--steps', '2', '--json']; "
        "import sample; sample.main()"
    )
    told = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    [row] = json.loads(told)["rows"]
    assert row["theirs"] == [] and row["difference"] is None and len(row["ours"]) == 1
    assert "| -" in sample.table([sample.Row(**row)])
