"""A training cut into device batches, or shared out among processes: its weights differ by rounding, and by how much.

Adam divides a gradient by its own size, and so makes a step of `lr` out of what is nothing but rounding. One gradient is
that by construction: a softmax does not change when all keys move by the same amount, so the bias of the keys has none.
In float64 that rounding is far below Adam's epsilon of 1e-8, and all weights can be compared. In float32 it is not, and
those biases alone are left out.
"""

import contextlib

import pytest
import torch
from test_parts import two
from test_wrapping import CASES, TRANSPORT, latents, trained  # noqa: F401 (latents is a fixture)

from dit.objective import ObjectiveConfig

STATES = ("model.", "ema.", "power.", "exp_avg.", "exp_avg_sq.", "align.")
# Measured, of all the cases here: 7e-13 in float64, of the keys' biases, and 2e-15 of all else; 3e-6 in float32, where
# weights moved by up to 0.1.
FLOAT64, FLOAT64_BUT_KEYS, FLOAT32_BUT_KEYS = 1e-11, 1e-13, 3e-5
ROWS = 2e-6  # of float32: what a row of loss.csv is made of


@contextlib.contextmanager
def computed_in(dtype):
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def results(latents, cases, dtype):  # noqa: F811
    """By case: the rows, and the tensors at the end."""
    with computed_in(dtype):
        return {name: trained(latents, **case)[:2] for name, case in cases.items()}


def off_by(ours, theirs, *, but_keys=False):
    """The largest difference among the tensors of two states."""
    assert ours.keys() == theirs.keys() and all(any(n.startswith(s) for n in ours) for s in STATES)
    most = 0.0
    for name, tensor in ours.items():
        difference = (tensor - theirs[name]).abs()
        if but_keys and name.endswith("qkv.bias"):
            query, _, value = difference.chunk(3)
            difference = torch.cat([query, value])
        most = max(most, difference.max().item())
    return most


def assert_only_rounded(found, whole, dtype):
    """Each case against the one that is not cut."""
    for name, (rows, tensors) in found.items():
        assert {tensor.dtype for tensor in tensors.values()} == {dtype}, name
        assert len(rows) == len(whole[0]) == 10
        for ours, theirs in zip(rows, whole[0], strict=True):
            assert [x is None for x in ours] == [x is None for x in theirs]  # times that no image had
            assert [x or 0 for x in ours] == pytest.approx([x or 0 for x in theirs], rel=ROWS, abs=1e-7), name
        if dtype == torch.float64:
            assert off_by(tensors, whole[1]) < FLOAT64, name
        limit = FLOAT64_BUT_KEYS if dtype == torch.float64 else FLOAT32_BUT_KEYS
        assert off_by(tensors, whole[1], but_keys=True) < limit, name


DTYPES = [torch.float64, torch.float32]
PARTS = {"8x1": {"device_batch_size": 1}, "3+3+2": {"device_batch_size": 3}, "2x4": {"device_batch_size": 4}}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_device_batches_change_the_weights_by_rounding_alone(latents, dtype):  # noqa: F811
    found = results(latents, {"1x8": {}, **PARTS}, dtype)
    assert_only_rounded(found, found.pop("1x8"), dtype)


def test_of_the_other_objective_too(latents):  # noqa: F811
    with computed_in(torch.float64):
        whole, parts = (
            trained(latents, objective=ObjectiveConfig("diffusion"), device_batch_size=size)[1] for size in (0, 4)
        )
    assert max((whole[name] - parts[name]).abs().max().item() for name in whole) < FLOAT64


def test_a_part_that_weighs_a_millionth_too_much_is_far_beyond_rounding(latents, monkeypatch):  # noqa: F811
    whole = results(latents, {"3+3+2": PARTS["3+3+2"]}, torch.float64)["3+3+2"]
    calls, backward = [], torch.Tensor.backward

    def heavier(loss, *args):
        calls.append(1)
        return backward(loss * (1 + 1e-6 * (len(calls) % 3 == 0)), *args)

    monkeypatch.setattr(torch.Tensor, "backward", heavier)
    wrong = results(latents, {"3+3+2": PARTS["3+3+2"]}, torch.float64)["3+3+2"]
    assert len(calls) == 30 and off_by(wrong[1], whole[1], but_keys=True) > 1000 * FLOAT64_BUT_KEYS


def in_two(world, folder, cases, latents):  # noqa: F811
    for dtype in DTYPES:
        torch.save(results(latents, cases, dtype), folder / f"{world.rank}-{dtype}.pt")


@pytest.mark.slow
def test_two_processes_change_the_weights_by_rounding_alone(latents, tmp_path):  # noqa: F811
    cases = {name: case for name, case in CASES.items() if "again" not in name}
    told = two(in_two, tmp_path, cases, latents)
    assert told == [None, None], told
    for dtype in DTYPES:
        one = results(latents, {"one": {}}, dtype)["one"]
        found, other = (torch.load(tmp_path / f"{rank}-{dtype}.pt") for rank in range(2))
        assert_only_rounded(found, one, dtype)
        for name in found:  # and between the two nothing differs
            assert off_by(found[name][1], other[name][1]) == 0.0
