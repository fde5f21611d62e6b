"""dit/speed.py against a clock that is told, and torch's own count of operations."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dit import speed as room
from dit.model import DiT, ModelConfig
from dit.speed import Speed, flops_per_image, peak_flops

CPU = torch.device("cpu")


def test_speed_is_that_since_the_last_row(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(room.time, "monotonic", lambda: now[0])
    speed = Speed(CPU, 8, step=10, flops_per_image=1e6, peak_flops=1e8)
    now[0] = 102.0
    first = speed.row(20, waited=0.5)
    assert first["images_per_second"] == 40 and first["mfu"] == pytest.approx(0.4) and first["data_wait"] == 0.25
    assert 0.05 < first["memory_gb"] < 100
    now[0] = 103.0
    assert speed.row(21, waited=0.5) | {"memory_gb": 0} == {
        "images_per_second": 8,
        "mfu": pytest.approx(0.08),
        "data_wait": 0,
        "memory_gb": 0,
    }
    assert "mfu" not in Speed(CPU, 8, flops_per_image=1e6).row(1)  # of a device that is not known


def test_training_costs_what_torch_counts():
    network = DiT(ModelConfig("custom", 2, 64, 2, 2), input_size=8, in_channels=4, num_classes=3)
    x, labels = torch.randn(2, 4, 8, 8), torch.tensor([0, 1])
    with FlopCounterMode(display=False) as counted:
        network(x, torch.rand(2), labels).sum().backward()
    assert 2 * flops_per_image(network) == pytest.approx(counted.get_total_flops(), rel=0.1)


def test_the_peak_of_a_cpu_is_timed_and_the_threads_stay():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert 1e8 < peak_flops(CPU) < 1e15 and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
