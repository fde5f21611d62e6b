import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dit import estimate
from dit.cost import macs
from dit.model import DiT, ModelConfig

ROOT = Path(__file__).parents[1]
SHAPE = {"input_size": 16, "in_channels": 4}


def kept_for_backward(config, batch_size, precision):
    """Bytes of the distinct storages that autograd keeps after a forward pass, the weights' own left out."""
    network = DiT(config, **SHAPE, num_classes=10)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    owned = {tensor.untyped_storage().data_ptr() for tensor in (*network.parameters(), *network.buffers())}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            kept[storage.data_ptr()] = storage
        return tensor

    x, t, y = torch.randn(batch_size, 4, 16, 16), torch.rand(batch_size), network.null(batch_size)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            network(x, t, y)
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize(
    "precision,options",
    [(precision, {"block": block}) for precision in ("fp32", "bf16") for block in ("adaln_zero", "in_context")]
    + [("fp32", {"block": "adaln"}), ("bf16", {"block": "cross_attention"})]
    + [("fp32", {"mlp": "swiglu"}), ("bf16", {"rotary": True}), ("fp32", {"qk_norm": True})],
    ids=str,
)
def test_activations_equal_what_autograd_keeps(precision, options):
    """A difference of two batch sizes: the weights' halved copies, which do not grow with it, drop out."""
    config = ModelConfig("custom", patch_size=1, hidden_size=64, depth=3, num_heads=2, **options)
    measured = kept_for_backward(config, 3, precision) - kept_for_backward(config, 1, precision)
    told = [
        estimate.training_memory_parts(config, **SHAPE, num_classes=10, batch_size=n, precision=precision)
        for n in (1, 3)
    ]
    # Beyond it, the formula holds the gradients inside one MLP.
    inner = 4 * 2 if options.get("mlp") != "swiglu" else 4 * 172 / 64
    transient = 2 * 256 * 64 * inner * (4 if precision == "fp32" else 2)
    assert told[1]["activations"] - told[0]["activations"] - transient == pytest.approx(measured, rel=0.04)
    P = sum(p.numel() for p in DiT(config, **SHAPE, num_classes=10).parameters())
    expected = {"weights": 4 * P, "gradients": 4 * P, "adam": 8 * P, "ema": 4 * P}
    expected["weights"] += 2 * P if precision == "bf16" else 0
    assert {name: told[0][name] for name in expected} == expected


TRAINING = """
import resource, torch
from dit.model import DiT, ModelConfig
torch.set_num_threads(1)
def step(network, average, optimizer, batch_size):
    optimizer.zero_grad(set_to_none=True)
    for part in range(2):
        x = torch.randn(batch_size, 4, network.input_size, network.input_size)
        with torch.autocast("cpu", torch.bfloat16, enabled={bf16}):
            loss = network(x, torch.rand(batch_size), network.null(batch_size)).float().square().mean()
        loss.backward()
    optimizer.step()
    torch._foreach_lerp_(average, [p.detach() for p in network.parameters()], 0.1)
def make(config, side):
    network = DiT(config, input_size=side, in_channels=4, num_classes=1000)
    average = [p.detach().clone() for p in network.parameters()]
    return network, average, torch.optim.AdamW(network.parameters(), fused=True)
step(*make(ModelConfig("custom", patch_size=2, hidden_size=32, depth=1, num_heads=2), 4), 1)  # loads the libraries
before = int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
made = make(ModelConfig("DiT-S/2"), 32)
for _ in range(2):  # Adam's moments are there from the second on
    step(*made, {batch_size})
# Not ru_maxrss: on Linux it begins with the size of the process that started this one.
[peak] = [line for line in open("/proc/self/status") if line.startswith("VmHWM:")]
print(int(peak.split()[1]) * 1024 - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the process's size from /proc")
def test_training_memory_equals_the_measured_peak():
    precision = "bf16"
    script = TRAINING.format(bf16=True, batch_size=4)
    # Every tensor in pages of its own: freed memory goes back at once and does not count.
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    told = estimate.training_memory(
        ModelConfig("DiT-S/2"), input_size=32, in_channels=4, num_classes=1000, batch_size=4, precision=precision
    )
    assert int(done.stdout) == pytest.approx(told, rel=0.06)


SHARED_TRAINING = """
import os, resource, torch
from dit.learner import Learner
from dit.model import DiT, ModelConfig
from dit.objective import ObjectiveConfig
from dit.parallel import world
from dit.runtime import RunConfig
from dit.training import TrainConfig
from dit.wrapping import Wrapped
torch.set_num_threads(1)
def make(config, side):
    network = DiT(config, input_size=side, in_channels=4, num_classes=1000)
    settings = TrainConfig(9, 2, 1e-4), RunConfig(parallel="fsdp", compile="off"), world()
    return Wrapped(network, None, ObjectiveConfig("transport"), *settings), network, Learner(network)
def step(wrapped, network, learner):
    learner.forget_gradients()
    x, noise = torch.randn(2, 1, 4, network.input_size, network.input_size)
    inputs = {"x": x, "noise": noise, "y": torch.zeros(1, dtype=torch.long), "t": torch.rand(1)}
    with wrapped.exchanging(True, False):
        wrapped.losses(inputs).sum().backward()
    learner.update(1e-4)
    learner.average(1, 0.99)
step(*make(ModelConfig("custom", patch_size=2, hidden_size=32, depth=1, num_heads=2), 4))  # loads the libraries
before = int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
made = make(ModelConfig("custom", patch_size=2, hidden_size=384, depth=12, num_heads=6), 16)
for _ in range(2):
    step(*made)
[peak] = [line for line in open("/proc/self/status") if line.startswith("VmHWM:")]
print(int(peak.split()[1]) * 1024 - before, flush=True)
torch.distributed.barrier()
os._exit(0)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the process's size from /proc")
def test_shared_training_memory_equals_the_measured_peak():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    environment |= {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    words = [sys.executable, "-c", SHARED_TRAINING]
    both = [
        subprocess.Popen(words, env=environment | {"RANK": rank}, stdout=subprocess.PIPE, text=True) for rank in "01"
    ]
    peaks = [int(process.communicate(timeout=120)[0]) for process in both]
    config = ModelConfig("custom", patch_size=2, hidden_size=384, depth=12, num_heads=6)
    told, whole = (
        estimate.training_memory(config, **SHAPE, num_classes=1000, batch_size=1, precision="fp32", shared_by=count)
        for count in (2, 1)
    )
    assert max(peaks) == pytest.approx(told, rel=0.08) and told < 0.65 * whole


def test_what_devices_share_is_all_but_activations_and_what_is_gathered():
    config, told = ModelConfig("DiT-XL/2"), {"input_size": 32, "in_channels": 4, "num_classes": 1000}
    for precision, qk_norm in (("fp32", False), ("bf16", False), ("bf16", True)):
        options = told | {"batch_size": 4, "precision": precision}
        sized = replace(config, qk_norm=qk_norm)
        one, eight = (estimate.training_memory_parts(sized, **options, shared_by=count) for count in (1, 8))
        for name in ("gradients", "adam", "ema"):
            assert eight[name] == pytest.approx(one[name] / 8, abs=1)
        assert eight["activations"] == one["activations"] and "gathered" not in one
        assert (
            0.05 < eight["gathered"] / one["gradients"] < 0.15
        )  # two of 28 blocks, and embedders and last layer twice
        copies = 2 * estimate.parameters(sized, **told) if qk_norm else 0  # which autocast makes, and keeps
        assert eight["weights"] == pytest.approx(one["gradients"] / 8 + copies, rel=0.05)
        assert estimate.largest_batch(estimate.DEVICES["L4"], sized, **told, precision=precision, shared_by=8) > 0


def test_auto_shares_where_a_device_has_no_room_for_all():
    def needs(size):
        return lambda: size

    assert estimate.parallel_kind("fsdp", 1, 10.0, needs(100)) == "alone"
    found = [estimate.parallel_kind("auto", 2, memory, needs(90)) for memory in (101.0, 100.0, None)]
    assert found == ["ddp", "fsdp", "ddp"]
    for told in ("ddp", "fsdp"):
        assert (
            estimate.parallel_kind(told, 2, 1.0, needs(90)) == estimate.parallel_kind(told, 2, None, needs(0)) == told
        )


def test_sampling_holds_weights_and_a_few_vectors_a_token():
    config = ModelConfig("DiT-S/2")
    told = {"input_size": 32, "in_channels": 4, "num_classes": 1000}
    guided, plain = (estimate.sampling_memory(config, batch_size=64, guided=guided, **told) for guided in (True, False))
    assert guided - plain == plain - 4 * 32_963_360
    # 288 MB beyond the weights were measured on a CPU for 64 images without guidance.
    assert plain - 4 * 32_963_360 == pytest.approx(288e6, rel=0.05)


def test_hours_by_hand():
    # DiT-XL/2: 6 x 118.6 G operations x 1.792 G images at a fifth of 989 T a second.
    forward = macs(ModelConfig("DiT-XL/2"), input_size=32, in_channels=4)
    hours = estimate.training_hours(forward, 7_000_000 * 256, estimate.DEVICES["H100"], 0.2)
    assert hours == pytest.approx(1791, rel=1e-3)
    # A published training: 5.7 steps of 256 a second on 128 TPU v3 chips, 7% of their peak.
    seconds = 3600 * estimate.training_hours(forward, 5.7 * 256, estimate.DEVICES["TPU v3"], 0.066)
    assert seconds / 128 == pytest.approx(1, rel=0.01)


def test_the_largest_batch_fits_and_the_next_does_not():
    config, told = ModelConfig("DiT-B/4"), {"input_size": 32, "in_channels": 4, "num_classes": 1000}
    for device in estimate.DEVICES.values():
        most = estimate.largest_batch(device, config, precision="bf16", **told)
        sizes = [estimate.training_memory(config, batch_size=n, precision="bf16", **told) for n in (most, most + 1)]
        assert sizes[0] <= 0.9 * device.memory_bytes < sizes[1]
    told["input_size"] = 64
    assert estimate.largest_batch(estimate.DEVICES["TPU v5e"], ModelConfig("DiT-XL/2"), precision="fp32", **told) == 0


@pytest.mark.parametrize(
    "name,found",
    [
        ("NVIDIA H200", "H200"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("tpu v5e", "TPU v5e"),
        ("NVIDIA L4", "L4"),
    ],
)
def test_devices_are_found_by_what_torch_calls_them(name, found):
    assert estimate.device_named(name) is estimate.DEVICES[found]


@pytest.mark.parametrize("name", ["NVIDIA L40S", "cpu", "RTX 3090", ""])
def test_other_devices_are_not_taken_for_one_of_the_table(name):
    with pytest.raises(ValueError, match="is not in the table: choose one of A100, H100, H200"):
        estimate.device_named(name)
