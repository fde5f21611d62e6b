import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit import torchvision_cpu
from dit.metrics import (
    class_agreement,
    frechet_distance,
    frechet_to,
    inception_score,
    kernel_distance,
    lower_is_better,
    short_count,
)

torchvision_cpu.prepare()
FEW = settings(max_examples=10, deadline=None)


def drawn(n, width, seed=0, scale=1.0):
    """Features like a network's: not negative, correlated, of unequal size."""
    random = np.random.default_rng(seed)
    mix = np.random.default_rng(99).standard_normal((width, width)) / width**0.5
    return torch.from_numpy(np.maximum(random.standard_normal((n, width)) @ mix * scale + 0.2, 0).astype(np.float32))


def gaussian(features):
    x = features.double()
    return x.mean(dim=0), torch.from_numpy(np.cov(x.numpy(), rowvar=False))


def frechet_of_features(a, b):
    """By the features' singular values, which no covariance's rounding touches: tr (A'A B'B)^1/2 = |A B'|_*."""
    a, b = a.double(), b.double()
    A, B = ((x - x.mean(dim=0)) / (len(x) - 1) ** 0.5 for x in (a, b))
    rest = (a.mean(dim=0) - b.mean(dim=0)).square().sum() + A.square().sum() + B.square().sum()
    return float(rest - 2 * torch.linalg.svdvals(A @ B.T).sum())


def rotation(width, seed=0):
    return torch.linalg.qr(torch.randn(width, width, generator=torch.Generator().manual_seed(seed)).double()).Q


@pytest.mark.parametrize("scale", [1.3, 1.001])
@pytest.mark.parametrize("decades", [0, 3, 6, 9])
def test_frechet_of_gaussians_in_closed_form(scale, decades):
    """Of the same axes: |m - m'|^2 + sum (s - s')^2, also where the axes' variances differ by 1e18."""
    Q, s = rotation(40), torch.logspace(0, -decades, 40, dtype=torch.float64)
    a, b = (Q @ torch.diag(x.square()) @ Q.T for x in (s, s * scale))
    mean = torch.linspace(0, 0.1 * (scale - 1), 40, dtype=torch.float64)
    expected = float(mean.square().sum() + (s - s * scale).square().sum())
    told = frechet_distance(torch.zeros_like(mean), a, mean, b)
    assert told == pytest.approx(expected, rel=1e-6, abs=1e-9 * float(a.trace() + b.trace()))


def flat(features):
    """Some features constant, one there twice, one tiny."""
    features = features.clone()
    features[:, :5], features[:, 7], features[:, 8] = 0.3, features[:, 9], features[:, 8] * 1e-6
    return features


@pytest.mark.parametrize("counts", [(30, 30), (30, 400), (400, 30), (2, 400), (400, 400)])
@pytest.mark.parametrize("damage", [flat, torch.Tensor.clone], ids=["flat", "whole"])
def test_frechet_of_ill_conditioned_covariances(counts, damage):
    """Fewer samples than dimensions, constant features: an independent formula, to 1e-6."""
    a, b = damage(drawn(counts[0], 96, 1)), damage(drawn(counts[1], 96, 2, 1.1))
    told = frechet_distance(*gaussian(a), *gaussian(b))
    assert told == pytest.approx(frechet_of_features(a, b), rel=1e-6)


def test_frechet_of_what_never_varies_is_the_distance_of_means():
    nothing = torch.zeros(8, 8, dtype=torch.float64)
    mean, covariance = gaussian(drawn(50, 8))
    assert frechet_distance(mean, nothing, mean + 1, nothing) == pytest.approx(8)
    for a, b in ((nothing, covariance), (covariance, nothing)):
        assert frechet_distance(mean, a, mean, b) == pytest.approx(float(covariance.trace()))


def test_frechet_of_statistics_kept_in_float32_is_reckoned_in_float64():
    told = [[part.float() for part in gaussian(drawn(500, 64, seed))] for seed in (1, 2)]
    doubled = [[part.double() for part in parts] for parts in told]
    assert frechet_distance(*told[0], *told[1]) == frechet_distance(*doubled[0], *doubled[1])


def test_frechet_is_torch_fidelity_s():
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    a, b = drawn(500, 64, 1), drawn(400, 64, 2, 1.05)
    theirs = fid_statistics_to_metric(fid_features_to_statistics(a), fid_features_to_statistics(b), False)
    assert frechet_distance(*gaussian(a), *gaussian(b)) == pytest.approx(theirs["frechet_inception_distance"], rel=1e-5)


@FEW
@given(st.integers(0, 1000))
def test_frechet_is_symmetric_and_knows_no_order(seed):
    a, b = drawn(60, 24, seed), drawn(50, 24, seed + 1, 1.5)
    rows, columns = (torch.from_numpy(np.random.default_rng(seed).permutation(n)) for n in (60, 24))
    told = frechet_distance(*gaussian(a), *gaussian(b))
    assert told == pytest.approx(frechet_distance(*gaussian(b), *gaussian(a)), rel=1e-7)
    assert told == pytest.approx(frechet_distance(*gaussian(a[rows]), *gaussian(b)), rel=1e-7)
    assert told == pytest.approx(frechet_distance(*gaussian(a[:, columns]), *gaussian(b[:, columns])), rel=1e-7)
    assert 0 <= frechet_distance(*gaussian(a), *gaussian(a)) < 1e-9


def test_frechet_refuses_what_cannot_be_compared():
    a, b = gaussian(drawn(50, 8)), gaussian(drawn(50, 9))
    with pytest.raises(ValueError, match="features of 8 dimensions have no distance to features of 9"):
        frechet_distance(*a, *b)
    with pytest.raises(ValueError, match="not finite"):
        frechet_distance(a[0] * np.nan, a[1], *a)
    with pytest.raises(ValueError, match="these are no statistics"):
        frechet_to(a[0], b[1])


@pytest.mark.parametrize(("count", "splits"), [(97, 10), (1000, 10), (10, 10), (5, 1)])
@pytest.mark.parametrize("order", ["shuffled", "file"])
def test_inception_score_is_torch_fidelity_s(count, splits, order):
    from torch_fidelity.metric_isc import isc_features_to_metric

    logits = drawn(count, 30, 3) * 9
    theirs = isc_features_to_metric(logits, splits=splits, shuffle=order == "shuffled", rng_seed=7)
    mean, deviation = inception_score(logits, splits, order=order, seed=7)
    assert mean == pytest.approx(theirs["inception_score_mean"], rel=1e-6)
    assert deviation == pytest.approx(theirs["inception_score_std"], rel=1e-6, abs=1e-12)


def test_inception_score_as_adm_s_evaluator_takes_it(monkeypatch):
    """Parts of 5,000 images in the file's order, however many images there are; the last may be shorter."""
    logits = drawn(12, 6, 3) * 9
    monkeypatch.setattr("dit.metrics.ADM_SPLIT", 5)
    parts = [inception_score(part, 1)[0] for part in (logits[:5], logits[5:10], logits[10:])]
    assert inception_score(logits, order="adm") == pytest.approx((np.mean(parts), np.std(parts)), rel=1e-12)
    assert inception_score(logits[:10], 7, order="adm") == pytest.approx(inception_score(logits[:10], 2, order="file"))
    assert inception_score(logits[:3], order="adm")[0] == pytest.approx(inception_score(logits[:3], 1)[0], rel=1e-12)
    monkeypatch.undo()
    logits = torch.arange(10_000)[:, None] % torch.arange(1, 4) * 1.0
    assert inception_score(logits, order="adm") == inception_score(logits, 2, order="file")


def test_inception_score_of_sure_and_of_unsure_images():
    """As many as there are classes where each image is sure of its own; 1 where they all look alike; and in order of
    class, with as many splits, 1 again: the trap in which scores of 60 instead of 300 have been reported."""
    sure = torch.eye(10).repeat_interleave(20, dim=0) * 2000  # the other classes' probability is 0 in any float
    assert inception_score(sure, 1)[0] == pytest.approx(10)
    assert inception_score(sure, 10)[0] > 5
    assert inception_score(sure, 10, order="file") == pytest.approx((1, 0))
    assert inception_score(torch.ones(50, 10)) == pytest.approx((1, 0))


def test_inception_score_in_blocks_is_that_of_the_whole(monkeypatch):
    logits = drawn(300, 12) * 5
    whole = inception_score(logits, 3)
    monkeypatch.setattr("dit.metrics.BLOCK", 7)
    assert inception_score(logits, 3) == pytest.approx(whole, rel=1e-12)


def test_inception_score_refuses_what_it_cannot_score():
    with pytest.raises(ValueError, match="10 splits needs at least as many images, got 9"):
        inception_score(torch.zeros(9, 4))
    with pytest.raises(ValueError, match="order must be shuffled, file or adm, got 'sorted'"):
        inception_score(torch.zeros(20, 4), order="sorted")
    with pytest.raises(ValueError, match=r"features are not finite \(row 3\)"):
        inception_score(torch.zeros(20, 4).index_fill_(0, torch.tensor([3]), torch.nan))


def test_kernel_distance_is_torch_fidelity_s():
    from torch_fidelity.metric_kid import kid_features_to_metric

    a, b = drawn(200, 48, 4), drawn(150, 48, 5, 1.2)
    settings = {"kid_subsets": 8, "kid_subset_size": 100, "rng_seed": 11, "verbose": False}
    theirs = kid_features_to_metric(a.double(), b.double(), **settings)
    mean, deviation = kernel_distance(a, b, subsets=8, subset_size=100, seed=11)
    assert mean == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-5)
    assert deviation == pytest.approx(theirs["kernel_inception_distance_std"], rel=1e-5)


def test_kernel_distance_of_float32_features_is_summed_in_float64():
    a, b = drawn(60, 48, 4) + 30, drawn(60, 48, 5, 1.2) + 30
    terms = {"subsets": 2, "subset_size": 50, "seed": 3}
    assert kernel_distance(a, b, **terms) == pytest.approx(kernel_distance(a.double(), b.double(), **terms), rel=1e-12)


def test_kernel_distance_pair_by_pair():
    a, b = drawn(6, 3, 1).double(), drawn(6, 3, 2, 2.0).double()

    def k(x, y):
        return (float(x @ y) / 3 + 1) ** 3

    same = sum(k(x[i], x[j]) for x in (a, b) for i in range(6) for j in range(6) if i != j) / 30
    cross = sum(k(x, y) for x in a for y in b) / 36
    mean, deviation = kernel_distance(a, b, subsets=3, subset_size=6, seed=0)
    assert mean == pytest.approx(same - 2 * cross) and deviation == pytest.approx(0, abs=1e-12)


def test_kernel_distance_of_two_draws_of_one_kind_is_none_on_average():
    """Unbiased: as often below 0 as above, unlike the biased estimate, which never is below."""
    told = [
        kernel_distance(drawn(60, 8, i), drawn(60, 8, i + 500), subsets=1, subset_size=60, seed=0)[0] for i in range(60)
    ]
    assert min(told) < 0 < max(told) and abs(np.mean(told)) < 3 * np.std(told) / 60**0.5


def test_kernel_distance_refuses_what_it_cannot_draw():
    a = drawn(20, 4)
    for features, size, message in (
        (drawn(20, 5), 10, "have 4 dimensions and the real ones' 5"),
        (drawn(9, 4), 10, r"at most the images that there are \(20 generated, 9 real\), got 10"),
        (a * torch.nan, 10, "the real images' features are not finite"),
        (drawn(500, 4).index_fill_(0, torch.tensor([499]), torch.nan), 2, r"not finite \(row 499\)"),  # drawn or not
        (a, 1, "at least 2"),
    ):
        with pytest.raises(ValueError, match=message):
            kernel_distance(a, features, subsets=2, subset_size=size, seed=0)


def test_class_agreement():
    assert class_agreement(torch.tensor([0, 1, 2, 2]), np.array([0, 1, 2, 3])) == 0.75
    with pytest.raises(ValueError, match="3 images were read and 2 labels"):
        class_agreement(torch.zeros(3), torch.zeros(2))


def test_names():
    assert [short_count(n) for n in (360, 1000, 1500, 50_000)] == ["360", "1k", "1500", "50k"]
    assert all(map(lower_is_better, ("fid_x_1k", "sfid_x_1k", "kid_x_1k"))) and not lower_is_better("precision_x_1k")
