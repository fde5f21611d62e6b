import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit.metrics import frechet_to, inception_score, kernel_distance
from dit.neighbourhoods import neighbourhoods
from dit.uncertainty import (
    at_sizes,
    bootstrap,
    default_sizes,
    infinity,
    moments,
    share_interval,
    splits_interval,
    student,
    subsets_interval,
)

WIDTH = 8
SHIFT, SCALE = 0.3, 1.2
TRUE = WIDTH * (SHIFT**2 + (SCALE - 1) ** 2)  # between N(0, 1) and N(SHIFT, SCALE^2), in every dimension


def to_standard(mean, covariance):
    """The Frechet distance to the standard normal distribution, as the closed form has it."""
    values = torch.linalg.eigvalsh(covariance).clamp(min=0)
    return float(mean.square().sum() + (values.sqrt() - 1).square().sum())


def drawn(count, seed, width=WIDTH):
    draws = torch.Generator().manual_seed(seed)
    return torch.randn(count, width, generator=draws, dtype=torch.float64) * SCALE + SHIFT


def test_weighted_moments_are_those_of_repeated_rows(monkeypatch):
    monkeypatch.setattr("dit.uncertainty.BLOCK", 7)
    features = drawn(50, 0).float()
    weights = torch.randint(0, 4, (50,), generator=torch.Generator().manual_seed(1))
    repeated = features.double().repeat_interleave(weights, dim=0)
    mean, covariance = moments(features, weights)
    torch.testing.assert_close(mean, repeated.mean(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(covariance, repeated.T.cov(), rtol=1e-12, atol=1e-12)


def test_extrapolation_takes_the_bias_of_a_small_sample_away():
    whole, limits = [], []
    for seed in range(40):
        points = at_sizes(drawn(100, seed), to_standard, default_sizes(100, WIDTH), seed)
        whole.append(points[0][1])
        limits.append(infinity(points)[0])
    whole, limits = torch.tensor(whole), torch.tensor(limits)
    bias, left = float(whole.mean()) - TRUE, float(limits.mean()) - TRUE
    assert bias > 5 * float(whole.std()) / 40**0.5  # it is there,
    assert abs(left) < bias / 4 and abs(left) < 3 * float(limits.std()) / 40**0.5  # and gone
    assert limits.std() < 1.2 * whole.std()  # at no cost in spread


def test_points_on_a_line_are_extrapolated_exactly():
    limit, error = infinity([(n, 2.0 + 300 / n) for n in (1000, 500, 250)])
    assert limit == pytest.approx(2, abs=1e-12) and error == pytest.approx(0, abs=1e-6)
    assert infinity([(1000, 2.3), (500, 2.65), (250, 3.2)])[1] > 0.001


def test_fit_and_standard_error_are_numpys():
    import numpy as np

    points = [(1000, 2.31), (666, 2.44), (500, 2.62), (250, 3.25)]
    n, y = np.array(points).T
    coefficients, covariance = np.polyfit(1 / n, y, 1, w=np.sqrt(n), cov=True)
    assert infinity(points) == pytest.approx((coefficients[1], covariance[1, 1] ** 0.5), rel=1e-9)


def test_the_whole_sample_is_one_part_and_halves_use_every_feature_once():
    features, seen = drawn(60, 3), []

    def watch(mean, covariance):
        seen.append(mean)
        return 0.0

    at_sizes(features, watch, [60, 40, 30], 0)
    assert len(seen) == 1 + 3 + 2
    for part in (seen[:1], seen[1:4], seen[4:]):
        torch.testing.assert_close(torch.stack(part).mean(0), features.mean(0))


def test_default_sizes_refuse_to_extrapolate_from_too_few():
    assert default_sizes(50_000, 2048) == [50_000, 33_333, 25_000, 12_500]
    assert default_sizes(10_000, 2048) == [10_000, 6_666, 5_000]
    assert default_sizes(5_000, 2048) == [] and default_sizes(3, 1) == []


def test_the_interval_holds_what_other_draws_give():
    """Of 95% intervals around 60 draws, nearly all hold the mean distance of such draws."""
    count, repeats = 100, 60
    centre = sum(to_standard(*moments(drawn(count, seed), torch.ones(count))) for seed in range(1000, 1300)) / 300
    intervals = [bootstrap(drawn(count, seed), to_standard, 30, seed) for seed in range(repeats)]
    held = sum(low <= centre <= high for _, low, high in intervals) / repeats
    assert 0.86 <= held
    # and no wider than it need be
    spread = torch.tensor([to_standard(*moments(drawn(count, s), torch.ones(count))) for s in range(300)]).std()
    assert sum(error for error, _, _ in intervals) / repeats < 1.4 * float(spread)


def test_the_interval_is_centred_on_the_estimate_and_never_negative():
    features = drawn(100, 0)
    error, low, high = bootstrap(features, to_standard, 20, 0)
    assert (low + high) / 2 == pytest.approx(to_standard(*moments(features, torch.ones(100))))
    assert high - low == pytest.approx(2 * 1.96 * error, rel=1e-3)
    assert bootstrap(torch.randn(30, 2, generator=torch.Generator().manual_seed(0)), to_standard, 20, 0).low == 0


def test_it_is_the_metrics_own_distance_that_is_judged():
    reference = frechet_to(torch.zeros(WIDTH, dtype=torch.float64), torch.eye(WIDTH, dtype=torch.float64))
    features = drawn(100, 0).float()
    assert bootstrap(features, reference, 5, 0) == pytest.approx(bootstrap(features, to_standard, 5, 0), rel=1e-9)
    assert at_sizes(features, reference, [100], 0)[0][1] == pytest.approx(
        reference(features.double().mean(0), features.double().T.cov()), rel=1e-9
    )


def test_both_are_functions_of_the_seed():
    features = drawn(80, 0)
    a, b, c = (at_sizes(features, to_standard, [60, 40], seed) for seed in (1, 1, 2))
    assert a == b != c
    a, b, c = (bootstrap(features, to_standard, 5, seed) for seed in (1, 1, 2))
    assert a == b and a.standard_error != c.standard_error


def test_features_may_lie_in_a_file(tmp_path):
    features = drawn(90, 0).float()
    (tmp_path / "features").write_bytes(features.numpy().tobytes())
    mapped = torch.from_file(str(tmp_path / "features"), size=features.numel()).view(90, WIDTH)
    assert bootstrap(mapped, to_standard, 3, 0) == bootstrap(features, to_standard, 3, 0)


@settings(max_examples=25, deadline=None)
@given(share=st.floats(0, 1), count=st.integers(1, 5000))
def test_intervals_of_shares(share, count):
    error, low, high = share_interval(share, count)
    assert 0 <= low <= share + 1e-9 and share - 1e-9 <= high <= 1 and high > low
    assert error == pytest.approx((share * (1 - share) / count) ** 0.5)


def test_wilsons_interval_of_a_textbook():
    assert share_interval(0.1, 10)[1:] == pytest.approx((0.0179, 0.4042), abs=1e-4)


def share_held(intervals, values):
    centre = sum(values) / len(values)
    return sum(low <= centre <= high for _, low, high in intervals) / len(values)


@pytest.mark.parametrize(("size", "subsets"), [(100, 40), (20, 40)])
def test_the_interval_of_a_mean_of_subsets_that_share_images(size, subsets):
    """KID's: as if subsets were independent it would hold far too seldom, since all are of the same images."""
    told = [
        kernel_distance(drawn(120, s), drawn(120, s + 500) - 0.3, subsets=subsets, subset_size=size, seed=s)
        for s in range(60)
    ]
    values = [mean for mean, _ in told]
    intervals = [subsets_interval(*found, subsets, size, 120) for found in told]
    assert share_held(intervals, values) > 0.88
    spread = torch.tensor(values).std()
    assert sum(error for error, *_ in intervals) / 60 < 2 * spread
    naive = [(0, mean - 1.96 * sd / subsets**0.5, mean + 1.96 * sd / subsets**0.5) for mean, sd in told]
    assert share_held(naive, values) < 0.7


def test_the_interval_of_a_mean_of_splits_that_share_none():
    logits = [4 * drawn(300, seed).float() for seed in range(150)]
    told = [inception_score(x, 5, seed=1) for x in logits]
    assert share_held([splits_interval(*found, 5) for found in told], [mean for mean, _ in told]) > 0.9
    assert splits_interval(3.0, 2.0, 5) == pytest.approx((1, 3 - 2.7764, 3 + 2.7764), abs=2e-3)


def test_the_interval_of_precision_and_recall_knows_that_both_sets_are_draws():
    told = [neighbourhoods(drawn(300, s), drawn(100, s + 500) + 0.5) for s in range(60)]
    for values, counts in (([x.precision for x in told], (100, 300)), ([x.recall for x in told], (300, 100))):
        intervals = [share_interval(value, *counts) for value in values]
        assert share_held(intervals, values) > 0.88
        assert 0.6 < sum(error for error, *_ in intervals) / 60 / torch.tensor(values).std() < 1.6
    assert share_held([share_interval(x.recall, 300) for x in told], [x.recall for x in told]) < 0.85


def test_what_says_nothing_of_the_spread_has_no_interval():
    for told in (
        splits_interval(1.0, 0.0, 1),
        subsets_interval(1.0, 0.1, 50, 100, 100),
        subsets_interval(1.0, 0, 1, 9, 99),
    ):
        assert told == (float("inf"), -float("inf"), float("inf"))


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 5, 9, 49])
def test_students_quantile_is_scipys(freedom):
    from scipy import stats

    assert student(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=2e-3)


def test_what_cannot_be_is_refused():
    features = drawn(20, 0)
    features[3, 2] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        bootstrap(features, to_standard, 2, 0)
    with pytest.raises(ValueError, match="sizes must be 2 to the 20 images"):
        at_sizes(drawn(20, 0), to_standard, [21], 0)
    with pytest.raises(ValueError, match="three sizes or more"):
        infinity([(10, 1.0), (10, 1.1), (5, 2.0)])
    with pytest.raises(ValueError, match="needs 2 replicas and 2 images"):
        bootstrap(drawn(20, 0), to_standard, 1, 0)
    with pytest.raises(ValueError, match="0 to 1"):
        share_interval(1.5, 10)
    with pytest.raises(ValueError, match="of 10 against 0"):
        share_interval(0.5, 10, 0)
