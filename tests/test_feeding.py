import json
import threading
import time

import pytest
import torch
from waiting import until

from dit.checkpoint import save_tensors
from dit.dataset import LatentDataset
from dit.feeding import AHEAD, Feed


@pytest.fixture
def folder(tmp_path):
    shards = []
    for number in range(4):
        mean = torch.arange(number * 6, number * 6 + 6).view(-1, 1, 1, 1).expand(6, 2, 4, 4).half()
        tensors = {
            "mean": mean.clone(),
            "std": mean / 8,
            "label": torch.arange(6),
            "features": torch.ones(6, 2, 3).half(),
        }
        save_tensors(tmp_path / f"{number}.safetensors", tensors)
        shards.append({"file": f"{number}.safetensors", "split": "train", "samples": 6, "sha256": ""})
    index = {"shards": shards, "normalization": {"mean": [0.0] * 2, "std": [1.0] * 2}, "classes": ["a"]}
    (tmp_path / "index.json").write_text(json.dumps(index))
    return tmp_path


class Watched(LatentDataset):
    """Notes which step's batch was gathered by which thread, each of which takes `seconds`."""

    seconds = 0.0

    def batch(self, step, *args, **options):
        self.__dict__.setdefault("gathered", []).append((step, threading.current_thread().name))
        time.sleep(self.seconds)
        return super().batch(step, *args, **options)


def feeding():
    return [thread for thread in threading.enumerate() if thread.name == "feed"]


@pytest.mark.parametrize("where", ["memory", "mapped"])
@pytest.mark.parametrize("part", [slice(None), slice(2, 5)])
def test_batches_come_in_the_order_of_the_steps(folder, where, part):
    data = Watched(folder, 0, 7, where=where)
    with Feed(data, range(3, 11), part) as feed:
        batches = list(feed)
        assert list(feed) == []
    assert len(batches) == 8 and not feeding()
    thread = "MainThread" if where == "memory" else "feed"
    assert data.gathered == [(step, thread) for step in range(3, 11)]
    for step, batch in zip(range(3, 11), batches, strict=True):
        expected = LatentDataset(folder, 0, 7).batch(step)
        assert set(batch) == set(expected)
        assert all(torch.equal(tensor, expected[key][part]) for key, tensor in batch.items())


def test_a_thread_gathers_ahead_but_not_further_than_it_should(folder):
    data = Watched(folder, 0, 4, where="mapped")
    with Feed(data, range(20)) as feed:
        for taken in range(1, 4):
            next(feed)
            assert until(lambda taken=taken: len(data.gathered) == taken + AHEAD + 1)
            time.sleep(0.02)
            assert len(data.gathered) == taken + AHEAD + 1
    assert not feeding()


def test_only_what_a_step_needs_is_gathered(folder):
    for where in ("memory", "mapped"):
        data = LatentDataset(folder, 0, 4, where=where)
        wanted = lambda step: {"mean", "label", *(["features"] if step < 2 else [])}  # noqa: E731
        with Feed(data, range(4), wanted=wanted) as feed:
            assert [("features" in batch, len(batch)) for batch in feed] == [
                (True, 3),
                (True, 3),
                (False, 2),
                (False, 2),
            ]


def test_what_goes_wrong_in_the_thread_is_raised_in_the_loop(folder):
    data = LatentDataset(folder, 0, 4, where="mapped")
    (folder / "2.safetensors").unlink()
    first = next(step for step in range(9) if (data.indices(step) // 6 == 2).any())
    with Feed(data, range(9)) as feed:
        for _ in range(first):
            next(feed)
        with pytest.raises(ValueError, match=r"2\.safetensors is missing or torn"):
            next(feed)
        assert list(feed) == [] and not feeding()


def test_a_feed_that_is_left_ends_its_thread(folder):
    data = Watched(folder, 0, 4, where="mapped")
    with pytest.raises(KeyboardInterrupt), Feed(data, range(1000)) as feed:
        next(feed)
        assert len(feeding()) == 1
        raise KeyboardInterrupt
    assert not feeding() and len(data.gathered) <= AHEAD + 2
    feed.close()
    with pytest.raises(StopIteration):
        next(feed)


@pytest.mark.parametrize("where", ["memory", "mapped"])
def test_the_time_that_the_loop_waits_is_told(folder, where):
    data = Watched(folder, 0, 4, where=where)
    data.seconds, began = 0.05, time.perf_counter()
    with Feed(data, range(4)) as feed:
        list(feed)
        assert 0.1 <= feed.waited <= time.perf_counter() - began  # 0.2 s, unless the thread was the first to begin
    waits = []
    with Feed(data, range(3)) as feed:
        for _ in range(3):
            time.sleep(0.2)
            before = feed.waited
            next(feed)
            waits.append(feed.waited - before)
    assert (min(waits) < 0.04) == (where == "mapped"), "it was there already, or should not have been"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("where", ["memory", "mapped"])
def test_batches_arrive_on_a_gpu_whole(folder, where):
    data = LatentDataset(folder, 0, 64, where=where)
    with Feed(data, range(200), device="cuda") as feed:
        for step, batch in enumerate(feed):
            expected = data.batch(step)
            assert all(tensor.is_cuda for tensor in batch.values())
            assert all(torch.equal(tensor.cpu(), expected[key]) for key, tensor in batch.items()), step
