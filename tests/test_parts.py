"""Two processes that have a part of each tensor (gloo, on the CPU): all that they are asked is asked in one start."""

import multiprocessing
import os
import traceback

import pytest
import torch
from ports import free_port
from test_saving import files_of_at_most
from test_states import VALUES, same

from dit import parts
from dit.parallel import World
from dit.saving import Saver
from dit.states import TrainingState, forget, latest_state, steps

FORK = multiprocessing.get_context("fork")  # a child that has torch already


def two(work, *args):
    """What `work(world, *args)` returns in two processes that are a group, by rank; an error as its text."""
    import torch._dynamo  # noqa: F401 (distribute_tensor imports it: once here, and not in each)

    port = free_port()
    answers = FORK.Queue()

    def run(rank):
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": "2"}
        os.environ |= place
        torch.distributed.init_process_group("gloo")
        try:
            answers.put((rank, work(World(rank, 2), *args)))
        except BaseException:
            answers.put((rank, traceback.format_exc()))
            raise
        torch.distributed.destroy_process_group()

    children = [FORK.Process(target=run, args=(rank,), daemon=True) for rank in range(2)]
    for child in children:
        child.start()
    try:
        return [answer for _, answer in sorted((answers.get(timeout=200) for _ in children), key=lambda told: told[0])]
    finally:
        for child in children:
            child.join(30)
            child.kill()


def whole(step):
    """Of uneven sizes: one process has less than the other, or nothing."""
    torch.manual_seed(step)
    divided = {"w": torch.randn(5, 3), "one": torch.randn(1), "half": torch.randn(4, 2).to(torch.bfloat16)}
    return divided, {"plain": torch.randn(4), "count": torch.tensor(step), "none": torch.zeros(0, 6)}


def divided(step, mesh):
    from torch.distributed.tensor import Shard, distribute_tensor

    wholes, plain = whole(step)
    return {name: distribute_tensor(tensor, mesh, [Shard(0)]) for name, tensor in wholes.items()} | plain


def emptied(tensors):
    return {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}


def same_parts(a, b):
    local = [{k: t.to_local() if parts.sharded(t) else t for k, t in tensors.items()} for tensors in (a, b)]
    return same(*local)


def work(world, folder, of_one):
    from torch.distributed.device_mesh import init_device_mesh

    mesh, told = init_device_mesh("cpu", (2,)), {}
    saver = Saver(folder, 2, world=world)
    for step in (5, 10, 15):
        live = divided(step, mesh)
        saver.save(TrainingState(step, live, VALUES))
        for tensor in live.values():
            tensor.fill_(9)  # the loop goes on
    saver.wait()
    found = latest_state(folder, world)
    told["files"], told["found"], told["last"] = sorted(found.files), found, saver.last

    again = emptied(divided(15, mesh))
    found.load_into(again)
    told["two to two"] = same_parts(again, divided(15, mesh))
    again = emptied(divided(7, mesh))
    latest_state(of_one, world).load_into(again)
    told["one to two"] = same_parts(again, divided(7, mesh))
    again = emptied(whole(15)[0])
    found.load_into(again)
    told["two to plain at each"] = same(again, whole(15)[0])

    with files_of_at_most(200 if world.rank else 2**30):  # the disk of the second is full
        saver.save(TrainingState(20, divided(20, mesh), VALUES))
        try:
            saver.wait()
        except OSError as error:
            told["full"] = error.strerror
    told["after it"] = sorted(file.name for file in folder.iterdir())
    saver.save(TrainingState(20, divided(20, mesh), VALUES))
    saver.close()
    return told


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    folder, of_one = tmp_path_factory.mktemp("two") / "abc", tmp_path_factory.mktemp("one") / "abc"
    saver = Saver(of_one, 2)
    wholes, plain = whole(7)
    saver.save(TrainingState(7, wholes | plain, VALUES))
    saver.wait()
    return folder, two(work, folder, of_one)


def test_every_process_writes_its_part_and_all_know_the_state(told):
    folder, (first, second) = told
    assert isinstance(first, dict) and isinstance(second, dict), told
    assert first["files"] == [f"step-00000015/shard-0000{n}-model-00001-of-00001.safetensors" for n in (1, 2)]
    assert first["found"] == second["found"] == first["last"] == second["last"]
    assert first["found"].path == folder / "step-00000015" and first["found"].values == VALUES


@pytest.mark.parametrize("way", ["two to two", "one to two", "two to plain at each"])
def test_any_number_of_processes_reads_what_another_number_wrote(told, way):
    assert [answer[way] for answer in told[1]] == [True, True]


def test_one_process_reads_what_two_wrote(told):
    found, (wholes, plain) = latest_state(told[0]), whole(20)
    assert found.step == 20 and same(found.read(), wholes | plain) and same(found.read("w"), {"": wholes["w"]})
    again = emptied(wholes | plain)
    found.load_into(again)
    assert same(again, wholes | plain)
    with pytest.raises(ValueError, match=r"w should be \(6, 3\) float32 and is \(5, 3\) float32"):
        found.load_into(again | {"w": torch.zeros(6, 3)})


def test_a_full_disk_at_one_process_is_the_error_of_all(told):
    for answer in told[1]:
        assert answer["full"] == "File too large"
        assert answer["after it"] == [f"step-000000{step}{end}" for step in (10, 15) for end in ("", ".json")]


def test_a_part_that_is_torn_or_lost_makes_the_state_torn(told, capsys):
    folder = told[0]
    assert steps(folder) == [15, 20]
    part = next((folder / "step-00000020").glob("shard-00002*"))
    content = part.read_bytes()
    part.write_bytes(content[:-1])
    assert latest_state(folder).step == 15
    part.unlink()
    assert latest_state(folder).step == 15
    assert capsys.readouterr().out.count(f"{part} is torn (") == 2
    part.write_bytes(content)
    assert latest_state(folder).step == 20


def test_what_takes_its_place_leaves_nothing_of_it(told):
    folder = told[0]
    saver = Saver(folder, 1)
    saver.save(TrainingState(20, {"a": torch.ones(1)}, {}))  # the same step, and now by one process alone
    saver.wait()
    assert sorted(file.name for file in folder.iterdir()) == ["step-00000020.json", "step-00000020.safetensors"]
    forget(folder, 20)
    assert not list(folder.iterdir())
