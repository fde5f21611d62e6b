"""flows/workers.py: which GPUs each worker hands to its runs. The workers are processes that sleep."""

import os
import sys
from pathlib import Path

import psutil
import pytest

from flows import local, servers, services, workers


@pytest.fixture
def root(tmp_path, monkeypatch):
    """An empty checkout on a machine of eight GPUs; what was started there is ended."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3,4,5,6,7")
    idle = [sys.executable, "-c", "import time; time.sleep(1000)"]
    monkeypatch.setattr(workers, "_command", lambda name, limit: [*idle, str(limit)])
    yield tmp_path
    left = list(services.marked(servers.folder_of(tmp_path)))
    services.signal_each(left, 9)
    services.wait_gone(left, 5)


def started(root, per_run=None):
    """What `dit up` starts of workers: {name: its GPUs}."""
    folder = servers.folder_of(root)
    new = workers.start(root, os.environ, workers.wanted(folder, per_run), [])
    return {worker.name: ",".join(workers.share_of(worker)) for worker, _ in new if worker.name != "worker-local"}


def test_the_gpus_are_those_that_are_given_else_all_and_counted_from_0(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0, 2,GPU-8a1")
    assert workers.gpus() == ("0", "2", "GPU-8a1")
    for none in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", none)
        assert workers.gpus() == () and workers.shares(workers.gpus()) == []
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    files = [Path("/dev/nvidia3"), Path("/dev/nvidia5"), Path("/dev/nvidiactl"), Path("/dev/nvidia-uvm")]
    monkeypatch.setattr(Path, "glob", lambda folder, pattern: files)
    assert workers.gpus() == ("0", "1")


def test_one_run_has_all_gpus_unless_they_are_shared_out(root):
    assert started(root) == {"worker-gpu-0": "0,1,2,3,4,5,6,7"}
    assert started(root) == {} and len(workers.running(servers.folder_of(root))) == 2


def test_shares_have_a_worker_each_and_one_that_ended_is_started_again_with_its_own(root):
    assert started(root, 2) == {
        "worker-gpu-0": "0,1",
        "worker-gpu-2": "2,3",
        "worker-gpu-4": "4,5",
        "worker-gpu-6": "6,7",
    }
    folder = servers.folder_of(root)
    limits = {worker.name: psutil.Process(worker.pid).cmdline()[-1] for worker in workers.running(folder)}
    assert limits.pop("worker-local") == "8" and set(limits.values()) == {"1"}  # four may wait for those on GPUs
    services.end(folder, services.find(folder, "worker-gpu-4"))
    assert started(root) == {"worker-gpu-4": "4,5"}
    assert workers.told(workers.divided(folder)) == "2 GPUs for each of 4 runs at a time"
    said = []
    local.status(root, said.append)
    assert any(line.startswith("worker-gpu-4  process ") and line.endswith(", GPU 4,5") for line in said)
    assert "pool gpu      2 GPUs for each of 4 runs at a time" in said


def test_gpus_that_runs_hold_are_not_shared_out_anew(root, monkeypatch):
    started(root, 4)
    with pytest.raises(
        ValueError,
        match=r"^the workers that run have 4 GPUs for each of 2 runs at a time: `dit down` first, then --gpus-per-run 2$",
    ):
        workers.wanted(servers.folder_of(root), 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")  # another number than they were started with: they stay
    assert started(root) == {}


@pytest.mark.parametrize("count", [0, -1, 3, 9])
def test_a_number_that_does_not_share_them_out_is_a_line_and_nothing_is_started(root, monkeypatch, capsys, count):
    monkeypatch.chdir(root)
    line = f"dit: --gpus-per-run must divide the 8 GPU(s) here: 1, 2, 4, 8; got {count}\n"
    assert local.main(["up", "--gpus-per-run", str(count)]) == 1 and capsys.readouterr().err == line
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert local.main(["up", "--gpus-per-run", "1"]) == 1
    assert capsys.readouterr().err == "dit: --gpus-per-run: there is no GPU here, by CUDA_VISIBLE_DEVICES\n"
    assert not list(root.iterdir())
