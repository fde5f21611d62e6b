import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.overrides import TorchFunctionMode

from dit.order import Batches, Mix, Order, deal
from dit.randomness import permutation

SIZES = st.lists(st.integers(1, 9), min_size=1, max_size=7)


def epochs(order, count, first=0):
    """(count, size) indices."""
    return order.at(torch.arange(first * order.size, (first + count) * order.size)).view(count, order.size)


def mix_of(sizes, num_classes, weights, seed=0):
    """Random classes for these shards' images, and how often each is wanted."""
    labels = torch.randint(num_classes, (sum(sizes),), generator=torch.Generator().manual_seed(seed))
    by_shard = labels.split(list(sizes))
    counts = torch.stack([shard.bincount(minlength=num_classes) for shard in by_shard])
    return Mix(weights, counts, lambda shard: by_shard[shard]), labels


@settings(max_examples=30, deadline=None)
@given(sizes=SIZES, seed=st.integers(0, 3))
def test_without_a_window_the_order_is_one_permutation_of_all_images_an_epoch(sizes, seed):
    seen = epochs(Order(sizes, seed), 2, first=4)
    for epoch, order in zip((4, 5), seen, strict=True):
        assert torch.equal(order, permutation(sum(sizes), seed, "data order", epoch))


@settings(max_examples=40, deadline=None)
@given(sizes=SIZES, window=st.integers(1, 30), seed=st.integers(0, 3))
def test_a_window_shuffles_whole_shards_and_an_epoch_shows_every_image_once(sizes, window, seed):
    order = Order(sizes, seed, window=window)
    shard_of = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    for number, epoch in enumerate(epochs(order, 3)):
        assert sorted(epoch.tolist()) == list(range(sum(sizes)))
        position = 0
        while position < order.size:
            shards, _ = order.ahead(number * order.size + position)
            length = sum(sizes[shard] for shard in shards)
            assert length <= window or len(shards) == 1
            assert set(shard_of[epoch[position : position + length]].tolist()) == set(shards)
            position += length
        assert position == order.size


def test_shards_come_in_another_order_each_epoch_and_images_in_another_each_time():
    order = Order([50] * 40, 0, window=100)
    first, second = epochs(order, 2)
    assert not torch.equal(first // 50, second // 50)
    runs = [epoch.view(20, 100) for epoch in (first, second)]
    assert all((run.diff(dim=1) < 0).any(dim=1).all() for run in runs), "a window's images lie as they were"
    assert len({tuple(row.argsort().tolist()) for run in runs for row in run}) == 40, "two windows of one order"


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("window", [0, 12])
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_a_position_has_its_image_whatever_was_asked_before(window, weighted, data):
    sizes = [5, 3, 8, 1, 6]
    mix = mix_of(sizes, 3, [1.0, 2.0, 0.5])[0] if weighted else None
    walked, whole = Order(sizes, 1, window=window, mix=mix), Order(sizes, 1, window=window, mix=mix)
    expected = epochs(whole, 4).flatten()
    for _ in range(4):
        positions = torch.tensor(data.draw(st.lists(st.integers(0, len(expected) - 1), min_size=1, max_size=9)))
        assert torch.equal(walked.at(positions), expected[positions])


@settings(max_examples=40, deadline=None)
@given(sizes=SIZES, window=st.sampled_from([0, 5]), weights=st.lists(st.floats(0, 4), min_size=3, max_size=3))
def test_each_class_has_its_share_of_every_epoch_and_its_images_take_equal_turns(sizes, window, weights):
    mix, labels = mix_of(sizes, 3, weights)
    images = labels.bincount(minlength=3)
    present = [weight * bool(count) for weight, count in zip(weights, images.tolist(), strict=True)]
    if not sum(present) > 0:
        with pytest.raises(ValueError, match=r"train\.classes: no image is of a class with a weight above 0"):
            Order(sizes, 2, window=window, mix=mix)
        return
    order = Order(sizes, 2, window=window, mix=mix)
    for epoch in epochs(order, 3):
        drawn = epoch.bincount(minlength=len(labels))
        for label in range(3):
            share, total = present[label] / sum(present) * len(labels), int(drawn[labels == label].sum())
            assert math.floor(share - 1e-9) <= total <= math.ceil(share + 1e-9)
            if images[label]:
                turns = total / int(images[label])
                assert all(math.floor(turns) <= turn <= math.ceil(turns) for turn in drawn[labels == label].tolist())


def test_in_the_long_run_shares_are_exact_where_an_epoch_must_round():
    sizes, weights = [4, 4, 2], [1.0, 1.0, 1.0]  # 10/3 images of each class
    mix, labels = mix_of(sizes, 3, weights)
    seen = labels[epochs(Order(sizes, 0, mix=mix), 100)].flatten().bincount(minlength=3) / 100
    assert seen.tolist() == pytest.approx([10 / 3] * 3, abs=0.2)  # the standard error is 0.047
    drawn = epochs(Order(sizes, 0, window=4, mix=mix), 100).flatten().bincount(minlength=10) / 100
    expected = (10 / 3 / labels.bincount(minlength=3))[labels]
    assert drawn.tolist() == pytest.approx(expected.tolist(), abs=0.2)  # and of each image


def test_labels_that_the_index_does_not_count_are_refused():
    mix, _ = mix_of([6, 6], 2, [1.0, 1.0])
    other = Mix(mix.weights, mix.counts + torch.tensor([[1, -1], [0, 0]]), mix.labels)
    with pytest.raises(ValueError, match="run `encode` again"):
        epochs(Order([6, 6], 0, mix=other), 1)


def test_classes_have_their_share_of_all_parts_together():
    classes, each, parts = 20, 12, 4  # shards sorted by class, as they are cut, the last classes having fewer
    sizes = [6 if shard < classes * each // 2 else 3 for shard in range(classes * each)]
    labels = [torch.full((size,), shard // each) for shard, size in enumerate(sizes)]
    counts = torch.stack([label.bincount(minlength=classes) for label in labels])
    mix = Mix([1.0] * classes, counts, lambda shard: labels[shard])
    orders = [
        Order(sizes, 0, mix=mix, shards=shards, stream=("part", part)) for part, shards in enumerate(deal(sizes, parts))
    ]
    seen = torch.cat([torch.cat(labels)[epochs(order, 20).flatten()] for order in orders]).bincount(minlength=classes)
    assert (seen / seen.sum() * classes - 1).abs().max() < 0.1


@settings(max_examples=40, deadline=None)
@given(sizes=st.lists(st.integers(1, 50), min_size=1, max_size=20), parts=st.integers(1, 6))
def test_shards_are_dealt_once_and_evenly(sizes, parts):
    if parts > len(sizes):
        with pytest.raises(ValueError, match=rf"train\.data_parts: {len(sizes)} shards cannot be dealt into {parts}"):
            deal(sizes, parts)
        return
    dealt = deal(sizes, parts)
    assert sorted(shard for part in dealt for shard in part) == list(range(len(sizes)))
    held = [sum(sizes[shard] for shard in part) for part in dealt]
    assert all(dealt) and max(held) - min(held) <= max(sizes)


@pytest.mark.parametrize("size", [7, 8, 30])
def test_each_part_fills_its_own_slots_of_the_global_batch(size):
    sizes, parts = [5, 4, 6, 3, 5], 3
    dealt = deal(sizes, parts)
    streams = [Order(sizes, 0, shards=shards, stream=("part", v, parts)) for v, shards in enumerate(dealt)]
    batches = Batches(streams, size)
    shard_of = torch.repeat_interleave(torch.arange(5), torch.tensor(sizes))
    steps = torch.stack([batches.at(step, range(size)) for step in range(12)])
    for part, shards in enumerate(dealt):
        slots = slice(part * size // parts, (part + 1) * size // parts)
        stream = steps[:, slots].flatten()
        assert set(shard_of[stream].tolist()) <= set(shards)
        images = sum(sizes[shard] for shard in shards)
        for epoch in stream.split(images)[:-1]:
            assert len(set(epoch.tolist())) == images, "an image came twice in an epoch of its part"
        own = range(size)[slots]
        assert batches.shards(own) == shards and batches.ahead(3, own)[0] == set(shards)


@pytest.mark.parametrize("cut", [1, 3, 8])
def test_rows_of_several_processes_are_together_the_global_batch(cut):
    sizes = [5, 4, 6, 3, 5]
    streams = [Order(sizes, 0, window=6, shards=s, stream=("part", v, 2)) for v, s in enumerate(deal(sizes, 2))]
    batches, fresh = Batches(streams, 9), Batches(streams, 9)
    for step in (0, 5, 6, 2):
        whole = batches.at(step, range(9))
        assert torch.equal(torch.cat([fresh.at(step, range(cut)), fresh.at(step, range(cut, 9))]), whole)
    assert len(fresh.at(0, range(4, 4))) == 0


def test_more_parts_than_slots_are_refused():
    with pytest.raises(ValueError, match=r"train\.data_parts must not be above train\.global_batch_size \(2\), got 3"):
        Batches([Order([3], 0)] * 3, 2)


class Largest(TorchFunctionMode):
    """Notes the largest tensor that is made."""

    numel = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return made


def test_what_a_window_takes_does_not_grow_with_the_dataset():
    """Two million images: neither what is kept nor anything on the way is as long as they are."""
    order = Order([1000] * 2000, 0, window=20_000)
    with Largest() as largest:
        assert torch.arange(5).numel() == largest.numel == 5, "it sees nothing"
        for step in (0, 1, 488, 5000):
            seen = order.at(torch.arange(step * 4096, (step + 1) * 4096))
            assert len(seen.unique()) == 4096 and int(seen.max()) < 2_000_000
    assert largest.numel <= 20_000
    kept = len(pickle.dumps(order))
    assert kept < 8 * (2 * 20_000) + 100 * 2000
