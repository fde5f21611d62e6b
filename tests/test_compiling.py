import copy
import os
from functools import partial

import pytest
import torch
from torch._dynamo.utils import counters

from dit import compiling
from dit.acceleration import for_training
from dit.compiling import compile_blocks, compiler, rate, worthwhile
from dit.model import DiT, ModelConfig

CUDA, CPU, LONG, SHORT = torch.device("cuda"), torch.device("cpu"), 1e20, 1e12


@pytest.fixture
def eager(monkeypatch):
    """torch.compile without a backend's code: what is traced, and how often, is what counts here."""
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    yield
    torch._dynamo.reset()


@pytest.fixture
def no_compiler(monkeypatch, tmp_path):
    for name in ("CXX", "CC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    compiling.say.cache_clear()


def network(depth=3):
    torch.manual_seed(0)
    config = ModelConfig("custom", patch_size=4, hidden_size=32, depth=depth, num_heads=2)
    model = DiT(config, input_size=8, in_channels=4, num_classes=3)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def learned(step, model):
    """The prediction and every gradient."""
    generator = torch.Generator().manual_seed(0)
    output = step(torch.randn(2, 4, 8, 8, generator=generator), torch.tensor([3.0, 700.0]), torch.tensor([0, 2]))
    model.zero_grad(set_to_none=True)
    output.square().mean().backward()
    return [output.detach(), *(parameter.grad for parameter in model.parameters())]


def test_one_graph_serves_all_blocks_and_learns_the_same(eager):
    model = network()
    names, expected = list(model.state_dict()), learned(model, model)
    step = for_training(model, precision="fp32", compile="on")
    assert step is model
    for one, other in zip(learned(step, model), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    assert counters["stats"]["unique_graphs"] == 1
    assert list(model.state_dict()) == names


def test_what_is_compiled_sees_tokens_in_their_order(monkeypatch):
    orders, model = [], network()

    def backend(graph, inputs):
        orders.append([given.is_contiguous() for given in inputs])
        return graph

    embedded = []
    model.blocks[0].register_forward_pre_hook(lambda block, inputs: embedded.append(inputs[0].is_contiguous()))
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    torch._dynamo.reset()
    learned(for_training(model, precision="fp32", compile="on"), model)
    assert embedded == [False] and len(orders) == 1 and all(orders[0])


@pytest.mark.slow  # 80 s where nothing of it was ever compiled, else 10
@pytest.mark.skipif(not compiler("cpu"), reason="no C++ compiler")
def test_the_processors_own_code_learns_the_same():
    torch._dynamo.reset()
    model = network(depth=2)
    expected = learned(model, model)
    for one, other in zip(learned(for_training(model, precision="fp32", compile="on"), model), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    torch._dynamo.reset()


def test_in_bf16_the_compiled_network_learns_the_same_within_its_rounding(eager):
    model = network()
    with torch.autocast("cpu", torch.bfloat16):
        expected = learned(model, model)
        found = learned(for_training(model, precision="bf16", compile="on"), model)
    for one, other in zip(found, expected, strict=True):
        assert (one - other).float().norm() <= 0.05 * other.float().norm() + 1e-6


def test_without_a_compiler_it_runs_uncompiled_and_says_so_once(no_compiler, capsys):
    model, other = network(), network()
    expected = learned(copy.deepcopy(model), model)
    assert not compile_blocks(model) and not compile_blocks(other)
    assert capsys.readouterr().err.splitlines() == [
        "run.compile: this machine has no compiler for cpu, the network runs uncompiled"
    ]
    assert all(torch.equal(one, wanted) for one, wanted in zip(learned(model, model)[:1], expected[:1], strict=True))
    assert "forward" not in vars(model.blocks[0])


def test_a_compiler_is_looked_for_where_torch_does(no_compiler, monkeypatch, tmp_path):
    assert not compiler("cpu")
    (tmp_path / "my-c++").write_text("#!/bin/sh\n")
    os.chmod(tmp_path / "my-c++", 0o755)
    monkeypatch.setenv("CXX", "my-c++")
    assert compiler("cpu") and not compiler("cuda")
    assert compiler("tpu")  # brings its own


def test_compiling_has_to_be_repaid_by_the_work_ahead(monkeypatch):
    monkeypatch.setattr(compiling, "compiler", lambda kind: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert worthwhile(CUDA, "bf16", LONG) and not worthwhile(CUDA, "bf16", SHORT)
    assert not worthwhile(CPU, "fp32", LONG)
    edge = compiling.SECONDS / compiling.GAIN * rate(CUDA, "bf16")
    assert worthwhile(CUDA, "bf16", 1.01 * edge) and not worthwhile(CUDA, "bf16", 0.99 * edge)
    monkeypatch.setattr(compiling, "compiler", lambda kind: False)
    assert not worthwhile(CUDA, "bf16", LONG)


def test_a_device_that_the_table_lacks_counts_as_an_h100(monkeypatch):
    names = iter(["NVIDIA H100 80GB HBM3", "Some other device"])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: next(names))
    assert rate(CUDA, "bf16") == rate(CUDA, "bf16")
