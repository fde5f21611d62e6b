import json
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dit.copies import check_copies, num_looked_at, picture
from dit.imagesets import from_array


@cache
def digits():
    from sklearn.datasets import load_digits

    small = np.unique(load_digits().images, axis=0) * 255 / 16
    small = small[np.random.default_rng(0).permutation(len(small))]
    return np.repeat(small.repeat(2, axis=1).repeat(2, axis=2)[..., None], 3, axis=3).astype(np.uint8)


TRAINING, HELDOUT, OTHERS = slice(0, 1000), slice(1000, 1300), slice(1300, None)


def noisy(images, amount, seed=0):
    noise = np.random.default_rng(seed).normal(0, amount, images.shape)
    return np.clip(images + noise, 0, 255).astype(np.uint8)


def check(generated, **limits):
    return check_copies(*map(from_array, (generated, digits()[TRAINING], digits()[HELDOUT])), **limits)


@pytest.mark.parametrize("amount", [2, 8, 20])
def test_a_model_that_copies_is_found_out(amount):
    told = check(noisy(digits()[:400], amount))
    assert told.copies and told.warning and told.z < -10 and told.share_nearer > 0.8
    assert told.verdict.startswith("the model copies training images")
    assert not told.exact and not told.repeats


def test_exact_copies_are_named():
    told = check(np.concatenate([digits()[OTHERS], digits()[17:20]]))
    assert told.copies and (told.exact, told.exact_heldout) == (3, 0)
    assert [(pair.training, pair.distance, pair.exact) for pair in told.pairs[:3]] == [
        (17, 0, True),
        (18, 0, True),
        (19, 0, True),
    ]
    assert {pair.generated for pair in told.pairs[:3]} == {len(digits()[OTHERS]) + i for i in range(3)}


def test_few_close_copies_among_honest_images_are_found():
    honest, copied = digits()[OTHERS], noisy(digits()[:100], 4)
    told = check(np.concatenate([honest, copied]))
    assert told.copies and told.num_close >= 90 and told.num_close_heldout == 0
    few = check(np.concatenate([honest, copied[:5]]))  # by chance in one of ten
    assert not few.copies and few.num_close == 5 and "5 of them are so near that the closest pairs" in few.verdict


def test_mirror_images_of_training_images_are_copies_too():
    copied = np.concatenate([digits()[17:18, :, ::-1], noisy(digits()[:40, :, ::-1], 4)])
    told = check(np.concatenate([digits()[OTHERS][:300], copied]))
    assert told.copies and told.exact == 1 and told.num_close >= 35
    first, *rest = told.pairs
    assert first == (300, 17, 0, True, True)
    assert all(pair.mirrored and pair.training == pair.generated - 301 and pair.distance < 6 for pair in rest)
    shown = picture(told, from_array(np.concatenate([digits()[OTHERS][:300], copied])), from_array(digits()[TRAINING]))
    assert np.array_equal(shown[:16, :16], shown[17:33, :16])


def test_three_per_cent_of_copies_are_found():
    told = check(np.concatenate([digits()[OTHERS][:485], noisy(digits()[:15], 4)]))
    assert told.copies and told.num_close >= 14


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 2**20), num_heldout=st.integers(30, 300), num_generated=st.integers(20, 400))
def test_real_images_that_it_never_saw_raise_no_alarm(seed, num_heldout, num_generated):
    images = digits()[np.random.default_rng(seed).permutation(len(digits()))]
    held, ours = images[:num_heldout], images[num_heldout : num_heldout + num_generated]
    told = check_copies(*map(from_array, (ours, images[-800:], held)))
    assert not told.warning and told.exact == 0, told.verdict


def test_smoother_dimmer_and_noisier_images_are_no_copies():
    images = digits()[OTHERS]
    smooth = sum(np.roll(images.astype(int), shift, axis=2) for shift in (-1, 0, 1)) // 3
    for changed in (smooth.astype(np.uint8), (images * 0.8).astype(np.uint8), noisy(images, 20)):
        assert not check(changed).copies


def test_one_image_again_and_again_is_named():
    told = check(noisy(digits()[OTHERS][:1].repeat(300, axis=0), 3))
    assert told.repeats and told.warning and told.share_alike == 1 and "repeats itself" in told.verdict
    same = check(digits()[OTHERS][[0, 0, 0, 1]].repeat(50, axis=0))
    assert same.exact_alike == 198 and same.repeats


def test_it_says_how_many_it_looked_at():
    heard, sets = [], [from_array(digits()[part]) for part in (OTHERS, TRAINING, HELDOUT)]
    told = check_copies(*sets, most_generated=50, most_training=300, progress=heard.append)
    assert (told.num_generated, told.num_training, told.num_heldout) == (50, 300, 50)
    assert (told.of_generated, told.of_training, told.of_heldout) == tuple(images.count for images in sets)
    assert f"50 of {sets[0].count} generated, 300 of 1,000 training and 50 of 300 held-out" in told.verdict
    assert sum(heard) == 400 == num_looked_at(*sets, 50, 300)


def test_numbers_are_those_of_the_sets_however_few_are_looked_at():
    copied = noisy(digits()[:400], 3)
    told = check(copied, most_generated=100, most_training=500)
    assert told.copies
    close = [pair for pair in told.pairs if pair.distance < 6]
    assert close and all(pair.generated == pair.training for pair in close)


def test_the_record_is_json():
    told = check(digits()[OTHERS], most_pairs=3)
    record = json.loads(json.dumps(told.record()))
    assert record["warning"] is False and record["verdict"] == told.verdict and len(record["pairs"]) == 3
    assert set(record["pairs"][0]) == {"generated", "training", "distance", "exact", "mirrored"}


def test_the_picture_shows_each_above_its_nearest():
    ours, training = from_array(noisy(digits()[:30], 3)), from_array(digits()[TRAINING])
    told = check_copies(ours, training, from_array(digits()[HELDOUT]), most_pairs=5)
    shown = picture(told, ours, training, columns=3)
    assert shown.dtype == np.uint8 and shown.shape == (4 * 17 - 1, 3 * 17 - 1, 3)
    for place, pair in enumerate(told.pairs):
        top, left = place // 3 * 34, place % 3 * 17
        assert np.array_equal(shown[top : top + 16, left : left + 16], ours.read(pair.generated, pair.generated + 1)[0])
        below = shown[top + 17 : top + 33, left : left + 16]
        assert np.array_equal(below, training.read(pair.training, pair.training + 1)[0])
    assert (shown[34:50, 34:] == 255).all()  # no sixth pair


def test_training_images_may_be_larger():
    large = digits().repeat(4, axis=1).repeat(4, axis=2)
    small = large[:, ::2, ::2]  # 32 x 32
    ours = from_array(noisy(small[:50], 3))
    told = check_copies(ours, from_array(large[TRAINING]), from_array(large[HELDOUT]))
    assert told.copies and [pair.generated for pair in told.pairs] == [pair.training for pair in told.pairs]
    assert picture(told, ours, from_array(large[TRAINING]), columns=4).shape == (8 * 33 - 1, 4 * 33 - 1, 3)


def test_what_cannot_be_compared_is_refused():
    ours, training = from_array(digits()[:5], name="ours"), from_array(digits()[TRAINING])
    with pytest.raises(ValueError, match="few: 10 images or more are needed to look for copies, got 9"):
        check_copies(ours, training, from_array(digits()[:9], name="few"))
    with pytest.raises(
        ValueError, match="small holds images of 8 x 8 pixels, ours of 16 x 16: .* give images of one size"
    ):
        check_copies(ours, training, from_array(digits()[HELDOUT, ::2, ::2], name="small"))
