"""One training by one process and by two, which exchange gradients (DDP) or hold a part each (FSDP2)."""

import json
import multiprocessing
import os
import traceback

import pytest
import torch
import torch.distributed
from ports import free_port

from dit import parallel
from dit.alignment import AlignmentConfig
from dit.checkpoint import save_tensors
from dit.dataset import LatentDataset
from dit.model import DiT, ModelConfig
from dit.objective import ObjectiveConfig
from dit.parallel import World, world
from dit.runtime import RunConfig, memory_bytes
from dit.saving import Saver
from dit.states import latest_state
from dit.trainer import fit
from dit.training import TrainConfig
from dit.wrapping import Wrapped, kind

TRANSPORT = ObjectiveConfig("transport")
ALIGNED = ObjectiveConfig("transport", alignment=AlignmentConfig(weight=0.5, stop_step=5, projector_size=8))
SETTINGS = TrainConfig(10, 8, 1e-2, warmup_steps=2, grad_clip=1.0, power_ema=(0.1,))
RUN = {"log_every_steps": 1, "checkpoint_every_steps": 100}
CASES = {  # of two processes: how they are joined, how many images each takes at a time, what is kept
    "ddp": {"parallel": "ddp"},
    "ddp in parts": {"parallel": "ddp", "device_batch_size": 2},
    "fsdp": {"parallel": "fsdp"},
    "fsdp in parts": {"parallel": "fsdp", "device_batch_size": 3},
    "ddp again": {"parallel": "ddp", "activation_checkpointing": True, "device_batch_size": 2},
    "fsdp again": {"parallel": "fsdp", "activation_checkpointing": True},
}


def new_network():
    torch.manual_seed(0)
    return DiT(ModelConfig("custom", 2, 16, 2, 2), input_size=4, in_channels=2, num_classes=3)


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encode")
    draws = torch.Generator().manual_seed(0)
    label = torch.arange(40) % 3
    mean = label.view(-1, 1, 1, 1) - 1 + 0.1 * torch.randn(40, 2, 4, 4, generator=draws)
    tensors = {"mean": mean.half(), "std": torch.full_like(mean, 0.1).half(), "label": label}
    save_tensors(folder / "a.safetensors", tensors | {"features": torch.randn(40, 4, 6, generator=draws).half()})
    index = {"shards": [{"file": "a.safetensors", "split": "train", "sha256": "", "samples": 40}]}
    index |= {"classes": list("abc"), "normalization": {"mean": [0.0, 0.0], "std": [1.0, 1.0]}}
    (folder / "index.json").write_text(json.dumps(index))
    return folder


def whole(tensors):
    """Copies of a state's tensors, put together where processes have parts of them."""
    return {n: (t.full_tensor() if hasattr(t, "full_tensor") else t).detach().clone() for n, t in tensors.items()}


def trained(latents, config=SETTINGS, objective=ALIGNED, folder=None, last=None, **options):
    """(rows, tensors, looks) of a training, whose states are saved in `folder`, and which goes on from what is there.

    `last` is the step at which one process, the last, is told to stop.
    """
    run = {name: options.pop(name) for name in list(options) if name in RunConfig.__dataclass_fields__}
    looks, asked, us = [], [], world()
    saver = Saver(folder, 9, world=us) if folder else None
    state = fit(
        new_network(),
        LatentDataset(latents, 0, 8),
        objective,
        config,
        RunConfig(**{**RUN, **run}),
        resume=latest_state(folder, us) if folder else None,
        save=saver.save if saver else lambda state: None,
        observe=lambda step, average: looks.append((step, average().final_layer.linear.weight.clone())),
        should_stop=lambda: asked.append(1) or (us.rank == us.size - 1 and len(asked) == last),
        **options,
    )
    if saver:
        saver.close()
    return state.values["rows"], whole(state.tensors), looks


def poisoned(latents, folder):
    """The same latents, with an infinite number in one image."""
    folder.mkdir()
    data = LatentDataset(latents, 0, 8)
    tensors = {key: tensor.clone() for key, tensor in data.tensors.items()}
    tensors["mean"][int(data.indices(2)[6])] = torch.inf  # the second of two processes meets it first, in step 3
    save_tensors(folder / "a.safetensors", tensors)
    (folder / "index.json").write_text((latents / "index.json").read_text())
    return folder


def everything(latents, folder):
    """What the two processes do, one thing after the other, by name."""
    results = {name: trained(latents, **run, preview_every_steps=10) for name, run in CASES.items()}
    results["ddp bf16"] = trained(latents, TrainConfig(10, 8, 1e-2, precision="bf16"), parallel="ddp")
    results["fsdp bf16"] = trained(latents, TrainConfig(10, 8, 1e-2, precision="bf16"), parallel="fsdp")
    for how in ("ddp", "fsdp"):
        results[f"{how} stopped"] = trained(latents, folder=folder / how, parallel=how, last=4)
        results[f"{how} on two"] = trained(latents, folder=folder / f"one to {how}", parallel=how)
        results[f"{how} poisoned"] = trained(folder / "poisoned", objective=TRANSPORT, parallel=how)
    return results


def in_a_process(rank, port, latents, folder):
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    try:
        torch.save(everything(latents, folder), folder / f"{rank}.pt")
        parallel._end()
    except BaseException:
        (folder / f"{rank}.txt").write_text(traceback.format_exc())
    os._exit(0)


@pytest.fixture(scope="module")
def places(latents, tmp_path_factory):
    """What one process leaves to two: a training stopped half way, twice; and what is poisoned."""
    folder = tmp_path_factory.mktemp("states")
    for how in ("ddp", "fsdp"):
        trained(latents, folder=folder / f"one to {how}", last=5)
    poisoned(latents, folder / "poisoned")
    return folder


@pytest.fixture(scope="module")
def two(latents, places):
    """What each of the two processes has found."""
    import torch._dynamo  # noqa: F401 (DDP asks it something: once here, and not in each of them)
    from torch.distributed.fsdp import fully_shard  # noqa: F401

    port = free_port()
    forked = multiprocessing.get_context("fork")
    processes = [
        forked.Process(target=in_a_process, args=(rank, port, latents, places), daemon=True) for rank in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(250)
    assert not list(places.glob("*.txt")), [file.read_text() for file in places.glob("*.txt")]
    return [torch.load(places / f"{rank}.pt") for rank in range(2)]


@pytest.fixture(scope="module")
def one(latents):
    return trained(latents, preview_every_steps=10)


def assert_close(ours, theirs, rel=1e-5):
    """Rows, and the tensors; but not the keys' biases, whose gradients are nothing but rounding, which Adam blows up."""
    for a, b in zip(ours[0], theirs[0], strict=True):
        assert [x is None for x in a] == [x is None for x in b]  # times that no image had
        assert [x for x in a if x is not None] == pytest.approx([x for x in b if x is not None], rel=rel, abs=1e-7)
    assert ours[1].keys() == theirs[1].keys()
    for name, tensor in ours[1].items():
        assert tensor.shape == theirs[1][name].shape
        difference = (tensor - theirs[1][name]).abs()
        if name.endswith("qkv.bias"):
            query, _, value = difference.chunk(3)
            difference = torch.cat([query, value])
        assert difference.max() < 3e-5, name  # of weights that moved by up to 0.1


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_processes_learn_what_one_does(one, two, case):
    assert two[0][case][0] == two[1][case][0]  # each knows all the rows
    for name, tensor in two[0][case][1].items():
        assert torch.equal(tensor, two[1][case][1][name]), name
    assert_close(two[0][case], one)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_the_main_process_alone_looks_at_the_whole_average(two, case):
    (looked,) = two[0][case][2]
    assert two[1][case][2] == []
    assert looked[0] == 10 and torch.equal(looked[1], two[0][case][1]["ema.final_layer.linear.weight"])


@pytest.mark.slow
def test_bf16_is_the_same_with_sharded_weights(latents, two):
    alone = trained(latents, TrainConfig(10, 8, 1e-2, precision="bf16"))
    for how in ("ddp bf16", "fsdp bf16"):
        assert [row[1] for row in two[0][how][0]] == pytest.approx([row[1] for row in alone[0]], rel=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_all_stop_when_one_is_told_and_one_process_goes_on(latents, places, one, two, how):
    steps = [[row[0] for row in two[rank][f"{how} stopped"][0]] for rank in range(2)]
    assert steps[0] == steps[1] == [1, 2, 3, 4, 5]  # the others hear of it a step later
    state = latest_state(places / how)
    assert state.step == 5 and state.path.is_dir() == (how == "fsdp")
    assert_close(trained(latents, folder=places / how), one)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_two_processes_go_on_from_the_state_of_one(one, two, how):
    assert [row[0] for row in two[0][f"{how} on two"][0]] == list(range(1, 11))
    assert_close(two[0][f"{how} on two"], one)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_all_skip_the_step_that_is_not_finite_for_one(places, two, how):
    assert_close(two[0][f"{how} poisoned"], trained(places / "poisoned", objective=TRANSPORT))
    assert two[0][f"{how} poisoned"][1]["adam.count"] == 8


def test_computing_activations_again_changes_nothing(latents):
    assert_close(trained(latents, activation_checkpointing=True), trained(latents))


def test_computing_activations_again_keeps_less():
    def kept(again):
        """Bytes that the forward pass keeps for the backward pass."""
        network, tensors = new_network(), {}
        wrapped = Wrapped(network, None, TRANSPORT, SETTINGS, RunConfig(activation_checkpointing=again), World(0, 1))
        inputs = {"x": torch.randn(8, 2, 4, 4), "y": torch.zeros(8, dtype=torch.long), "t": torch.rand(8)}

        def pack(tensor):
            tensors[tensor.data_ptr()] = tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = wrapped.losses(inputs | {"noise": torch.randn(8, 2, 4, 4)}).sum()
        loss.backward()
        assert all(weight.grad is not None for weight in network.parameters())
        return sum(tensors.values())

    assert kept(True) < 0.7 * kept(False)


def test_who_holds_what():
    network, two = new_network(), World(1, 2)
    auto = RunConfig()
    assert kind(network, SETTINGS, RunConfig(parallel="fsdp"), World(0, 1), None) == "alone"
    assert kind(network, SETTINGS, auto, two, None) == "ddp" and memory_bytes(torch.device("cpu")) is None
    assert kind(network, SETTINGS, auto, two, 1e9) == "ddp" and kind(network, SETTINGS, auto, two, 1e5) == "fsdp"
    for told in ("ddp", "fsdp"):
        assert kind(network, SETTINGS, RunConfig(parallel=told), two, 1.0) == told
