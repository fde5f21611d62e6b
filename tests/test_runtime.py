import os

import pytest
import torch

from dit import expectations, runtime
from dit.estimate import device_named
from dit.progress import Progress, clock
from dit.randomness import generator, permutation
from dit.runtime import RunConfig, accelerators, autocast, main_memory, pick_device, start
from dit.schedule import warmup_cosine


def test_a_device_that_is_not_there_is_refused():
    assert pick_device("cpu").type == "cpu" and start(RunConfig(device="cpu")).type == "cpu"
    missing = "mps" if not torch.backends.mps.is_available() else "cuda"
    with pytest.raises(ValueError, match=f"run.device: this machine has no '{missing}': use auto or cpu"):
        pick_device(missing)


def test_threads_are_as_asked_for():
    before = torch.get_num_threads()
    try:
        start(RunConfig(device="cpu", num_threads=2))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_processes_on_one_machine_share_its_cores(monkeypatch):
    before, cores = torch.get_num_threads(), os.cpu_count() or 1
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(2 * cores))
    try:
        start(RunConfig(device="cpu", num_threads=0))
        assert torch.get_num_threads() == 1
        monkeypatch.delenv("LOCAL_WORLD_SIZE")
        start(RunConfig(device="cpu", num_threads=0))
        assert torch.get_num_threads() == cores
    finally:
        torch.set_num_threads(before)


def test_what_is_visible_is_counted_and_a_cpu_is_one():
    assert accelerators("cpu") == ("cpu", 1)
    if not torch.accelerator.is_available():
        assert accelerators("auto") == ("cpu", 1)


def test_determinism_is_an_accelerators_matter():
    start(RunConfig(device="cpu", deterministic=True))
    assert not torch.are_deterministic_algorithms_enabled() and "CUBLAS_WORKSPACE_CONFIG" not in os.environ


def test_a_cpu_has_no_name_no_memory_of_its_own_and_no_queues():
    cpu = torch.device("cpu")
    assert (
        runtime.device_name(cpu) is runtime.memory_bytes(cpu) is runtime.copy_stream(cpu) is runtime.mark(cpu)() is None
    )
    with runtime.queued_on(None):
        assert not runtime.pins(cpu)


@pytest.mark.parametrize(
    ("told", "name"), [("v6e-8", "TPU v6e"), ("v5litepod-16", "TPU v5e"), ("v9-4", None), ("", None)]
)
def test_a_tpu_is_known_by_what_its_host_says(monkeypatch, told, name):
    class Tpu:  # torch knows no such device without torch_tpu
        type = "tpu"

    monkeypatch.setenv("TPU_ACCELERATOR_TYPE", told)
    assert runtime.device_name(Tpu()) == name
    assert name is None or device_named(name).name == name


def test_a_cpu_multiplies_as_before():
    before = torch.get_float32_matmul_precision()
    start(RunConfig(device="cpu"))
    assert torch.get_float32_matmul_precision() == before == "highest"


def test_bf16_is_used_only_where_asked_for():
    layer, x = torch.nn.Linear(4, 4), torch.randn(2, 4)
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        with autocast(torch.device("cpu"), precision):
            assert layer(x).dtype == dtype


@pytest.mark.parametrize("change", [{"log_every_steps": 0}, {"num_threads": -1}, {"keep_checkpoints": 0}])
def test_bad_settings_are_refused(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        RunConfig(**change)


def test_randomness_is_named_and_has_no_history():
    def draw(*parts):
        return torch.rand(4, generator=generator(*parts)).tolist()

    first = draw(0, "step", 1)
    torch.rand(100)
    assert draw(0, "step", 1) == first
    others = [draw(0, "step", 2), draw(1, "step", 1), draw(0, "data order", 1), draw(0, "step", 11)]
    assert len({tuple(values) for values in [first, *others]}) == 5
    assert sorted(permutation(50, 0, "x").tolist()) == list(range(50))


def test_the_rate_goes_up_in_a_line_and_down_along_a_cosine():
    factors = [warmup_cosine(step, 100, 10) for step in range(101)]
    assert factors[:3] == pytest.approx([0.1, 0.2, 0.3]) and max(factors) == factors[10] == 1
    assert factors[55] == pytest.approx(0.5) and factors[100] == pytest.approx(0)


def test_progress_says_rate_and_what_is_left():
    said = []
    progress = Progress("work", 10, "steps", every_seconds=0, say=said.append)
    progress(4, " (more)")
    progress(6)
    assert said[0].startswith("work: 4/10 steps, ") and said[0].endswith("left (more)") and "steps/s" in said[0]
    assert said[1].startswith("work: 10/10 steps, ") and said[1].endswith("0s left")
    quiet = Progress("work", 10, every_seconds=1000, say=said.append)
    quiet(1)
    assert len(said) == 2


def test_clock():
    assert [clock(s) for s in (0, 42, 185, 7620, 273600)] == ["0s", "42s", "3m05s", "2h07m", "3d04h"]
    days = (99.9, 100, 364.9, 365, 3610, 3652, 153_058.6)
    told = ["99d21h", "100 days", "364 days", "1.0 years", "9.9 years", "10 years", "419 years"]
    assert [clock(86_400 * count) for count in days] == told


def test_a_containers_limit_is_the_memory_that_there_is(tmp_path, monkeypatch):
    monkeypatch.setattr(runtime, "CGROUP", tmp_path)
    there, older = main_memory(), tmp_path / "memory"
    assert 2**28 < there < 2**50
    older.mkdir()
    for name, text, told in (
        ("memory.max", "max\n", there),
        ("memory.max", f"{2**27}\n", 2**27),
        ("memory.max", f"{2**60}\n", there),
        ("memory/memory.limit_in_bytes", f"{2**26}\n", 2**26),
        ("memory/memory.limit_in_bytes", "9223372036854771712\n", there),
    ):
        (tmp_path / name).write_text(text)
        assert main_memory() == told, (name, text)
    (tmp_path / "memory.max").write_text("1000000")
    assert expectations.look("cpu").memory_bytes == 1_000_000
