"""What a training tells of itself: exact whatever it was cut into, and nothing waits for it."""

import json
import math
import multiprocessing
import os

import pytest
import torch
from ports import free_port

from dit.monitor import COLUMNS, Monitor, scaled_time
from dit.objective import ObjectiveConfig
from dit.parallel import World, world

CPU, ALONE = torch.device("cpu"), World(0, 1)
YES, NO = torch.tensor(True), torch.tensor(False)


def steps(count, images=8):
    """Losses, times and a norm of each step: numbers whose sums depend on the order."""
    draws = torch.Generator().manual_seed(0)
    for _ in range(count):
        losses, t, norm = (torch.rand(n, generator=draws) for n in (images, images, 1))
        yield 10 ** (4 * losses - 2), t, norm[0]


def feed(told, some, parts=1, applied=YES):
    for losses, t, norm in some:
        for part, at in zip(losses.chunk(parts), t.chunk(parts), strict=True):
            told.record(part, at)
        told.end_step(norm, applied)
    return told


def test_a_row_is_the_mean_of_all_images_and_of_each_quarter_of_times():
    told = Monitor(CPU, 4, ALONE)
    told.record(torch.tensor([1.0, 2.0, 3.0, 6.0]), torch.tensor([0.0, 0.24, 0.25, 1.0]))
    told.end_step(torch.tensor(5.0), YES)
    told.record(torch.tensor([4.0, 4.0, 4.0, 4.0]), torch.tensor([0.3, 0.3, 0.3, 0.8]))
    told.end_step(torch.tensor(7.0), YES)
    row = told.row(10, 0.1)
    assert tuple(row) == COLUMNS
    assert row == {"step": 10, "loss": 3.5, "lr": 0.1, "grad_norm": 6.0, "skipped": 0} | {
        "loss_t1": 1.5,
        "loss_t2": 15 / 4,
        "loss_t3": None,
        "loss_t4": 5.0,
    }
    assert told.row(11, 0.1) == dict.fromkeys(COLUMNS) | {"step": 11, "lr": 0.1, "skipped": 0}  # begun anew


@pytest.mark.parametrize("stop", range(7))
def test_gone_on_from_its_values_the_row_is_the_same_bit_for_bit(stop):
    whole = feed(Monitor(CPU, 8, ALONE), steps(6)).row(6, 0.1)
    some = list(steps(6))
    half = feed(Monitor(CPU, 8, ALONE), some[:stop])
    again = Monitor(CPU, 8, ALONE)
    again.load(json.loads(json.dumps(half.values())))
    assert feed(again, some[stop:]).row(6, 0.1) == whole
    assert feed(half, some[stop:]).row(6, 0.1) == whole  # being asked for them changes nothing


def test_parts_of_a_step_make_the_step():
    whole, parts = (feed(Monitor(CPU, 8, ALONE), steps(5), n).row(5, 0.1) for n in (1, 4))
    assert whole == pytest.approx(parts, rel=1e-6)


def test_a_skipped_step_has_no_part_in_any_mean():
    told = feed(Monitor(CPU, 8, ALONE), steps(2))
    told.record(torch.full((8,), math.nan), torch.rand(8))
    told.end_step(torch.tensor(math.inf), NO)
    row = told.row(3, 0.1)
    assert row == feed(Monitor(CPU, 8, ALONE), steps(2)).row(3, 0.1) | {"skipped": 1}
    assert told.row(4, 0.1)["skipped"] == 0


def test_it_gives_up_after_so_many_skipped_in_a_row_and_names_the_state_to_go_back_to():
    def told():
        return Monitor(CPU, 8, ALONE, max_bad_steps=3, last_good=lambda: "step-00000004")

    steady = feed(told(), steps(4))
    for applied in (NO, NO, YES, NO, NO):  # never three in a row
        feed(steady, steps(1), applied=applied)
    assert steady.row(9, 0.1)["skipped"] == 4
    again = told()
    again.load(json.loads(json.dumps(steady.values())))  # two in a row, and they are not forgotten
    feed(again, steps(1), applied=NO)
    with pytest.raises(
        ValueError, match=r"not finite at steps 8 to 10 .*the last good state is step-00000004"
    ) as error:
        again.values()
    assert "\n" not in str(error.value) and "lower train.lr" in str(error.value)
    with pytest.raises(ValueError, match="not finite at step 1 .*nothing of it was saved"):
        feed(Monitor(CPU, 8, ALONE, max_bad_steps=1), steps(1), applied=NO).row(1, 0.1)


def test_a_step_asks_nothing_of_the_device():
    nowhere = torch.device("meta")  # where no number is known: to ask for one is an error
    told = Monitor(nowhere, 8, ALONE)
    for _ in range(3):
        told.record(torch.empty(8, device=nowhere), torch.empty(8, device=nowhere))
        told.end_step(torch.empty((), device=nowhere), torch.empty((), device=nowhere, dtype=torch.bool))
    with pytest.raises(NotImplementedError):
        told.row(3, 0.1)


def test_times_run_from_noise_to_data_whatever_the_objective():
    t = torch.tensor([0.0, 0.3, 1.0])
    assert torch.equal(scaled_time(t, ObjectiveConfig("transport")), t)
    chain = scaled_time(torch.tensor([999, 500, 0]), ObjectiveConfig("diffusion"))
    torch.testing.assert_close(chain, torch.tensor([0.001, 0.5, 1.0]))


def in_a_process(rank, port, results):
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    some = [(losses[rank::2], t[rank::2], norm) for losses, t, norm in steps(6)]
    whole = feed(Monitor(CPU, 8, world()), some)
    half = feed(Monitor(CPU, 8, world()), some[:4])
    values = half.values()
    again = feed(Monitor(CPU, 8, world()), [])
    again.load(values)
    rows = whole.row(6, 0.1), feed(again, some[4:]).row(6, 0.1)
    bad = feed(Monitor(CPU, 8, world(), max_bad_steps=2), some[:2], applied=NO)
    try:
        bad.row(2, 0.1)
    except ValueError as error:
        results.put((*rows, values, str(error)))
    results.close()
    results.join_thread()
    torch.distributed.destroy_process_group()
    os._exit(0)


def test_two_processes_tell_the_same_as_one():
    port = free_port()
    forked = multiprocessing.get_context("fork")  # torch is imported already
    results = forked.Queue()
    processes = [forked.Process(target=in_a_process, args=(rank, port, results), daemon=True) for rank in range(2)]
    for process in processes:
        process.start()
    one, other = (results.get(timeout=200) for _ in processes)
    for process in processes:
        process.join(60)
    assert one == other  # the same numbers and the same end at both
    whole, resumed, values, error = one
    assert whole == resumed
    alone = feed(Monitor(CPU, 8, ALONE), steps(6))
    assert alone.row(6, 0.1) == pytest.approx(whole, rel=1e-6)
    theirs = feed(Monitor(CPU, 8, ALONE), list(steps(6))[:4]).values()
    assert theirs.pop("sums") == pytest.approx(values.pop("sums"), rel=1e-6) and theirs == values
    assert "steps 1 to 2" in error
