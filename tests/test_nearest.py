import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit.nearest import fisher, mann_whitney, nearest, nearness, thumbnails


def rows(count, width, seed):
    return torch.randint(0, 256, (count, width), generator=torch.Generator().manual_seed(seed)).float()


def in_blocks(base, size):
    return [(start, base[start : start + size]) for start in range(0, len(base), size)]


@settings(max_examples=20, deadline=None)
@given(n=st.integers(1, 30), m=st.integers(1, 40), size=st.integers(1, 50), k=st.integers(1, 5), own=st.booleans())
def test_nearest_rows_are_those_of_all_distances(n, m, size, k, own):
    queries = rows(n, 12, 0)
    base = queries if own else rows(m, 12, 1)
    every = (queries[:, None].double() - base).norm(dim=2)
    if own:
        every.fill_diagonal_(float("inf"))
    expected, _ = torch.cat([every, torch.full((n, k), float("inf"))], dim=1).sort(dim=1)
    distance, index = nearest(queries, in_blocks(base, size), k, own=own)
    torch.testing.assert_close(distance.double(), expected[:, :k], rtol=1e-5, atol=1e-3)
    found = distance.isfinite()
    picked = every.gather(1, index.clamp(min=0))
    torch.testing.assert_close(distance.double()[found], picked[found], rtol=1e-5, atol=1e-3)


def test_a_copy_is_at_no_distance_at_all():
    base = rows(500, 3072, 0)
    distance, index = nearest(base[[7, 400]], in_blocks(base, 64), 3)
    assert distance[:, 0].tolist() == [0, 0] and index[:, 0].tolist() == [7, 400]


def test_copies_of_one_image_have_a_distance_each():
    """Rounding takes squares below 0 there."""
    base = rows(30, 3072, 0)[torch.arange(120) % 30]
    distance, _ = nearest(base, in_blocks(base, 50), 4)
    assert distance.isfinite().all() and (distance[:, 0] == 0).all() and distance.max() < 5


def test_images_that_are_nearly_alike_are_told_apart():
    """Far from zero, the distances of these are below what their squares are rounded by."""
    base = 200 + 1e-3 * rows(40, 3072, 0)
    queries = base[:20] + 1e-4 * rows(20, 3072, 1)
    assert nearest(queries, in_blocks(base, 16))[1].flatten().tolist() == list(range(20))


def test_only_a_block_is_needed_at_a_time():
    def blocks():
        for start in range(0, 100, 10):
            yield start, rows(10, 4, start)

    assert nearest(rows(3, 4, 50)[:2], blocks())[1].flatten().tolist() == [50, 51]


def test_thumbnails_average_areas():
    images = np.zeros((2, 64, 96, 3), np.uint8)
    images[1] = 200
    images[0, :2, :3] = 60  # one cell of 32 x 32
    small = thumbnails(images).view(2, 3, 32, 32)
    assert (small[1] == 200).all() and (small[0, :, 0, 0] == 60).all() and small[0].sum() == 180
    tiny = np.random.default_rng(0).integers(0, 256, (40, 8, 5, 3)).astype(np.uint8)
    assert torch.equal(thumbnails(tiny), torch.from_numpy(tiny).permute(0, 3, 1, 2).flatten(1).float())


def test_distances_are_in_grey_levels_and_relative_to_their_surroundings():
    queries, base = torch.full((1, 48), 100.0), torch.full((8, 48), 120.0)
    base[3] = 105
    found = nearness(queries, [(0, base)], 8)
    assert found.distance.tolist() == pytest.approx([5]) and found.index.tolist() == [3]
    assert float(found.relative) == pytest.approx(5 / ((5 + 20) / 2))  # of the nearest quarter of eight
    assert float(nearness(queries, [(0, queries.repeat(8, 1))], 8).relative) == 0


@settings(max_examples=20, deadline=None)
@given(
    ours=st.lists(st.integers(0, 9), min_size=1, max_size=30),
    others=st.lists(st.integers(0, 9), min_size=2, max_size=30),
)
def test_rank_test_is_scipys(ours, others):
    from scipy import stats

    z, share = mann_whitney(torch.tensor(ours).double(), torch.tensor(others).double())
    told = stats.mannwhitneyu(ours, others, use_continuity=False, method="asymptotic")
    assert share == pytest.approx(1 - told.statistic / (len(ours) * len(others)))
    if len(set(ours + others)) > 1:
        assert 2 * stats.norm.sf(abs(z)) == pytest.approx(told.pvalue, abs=1e-9)
    else:
        assert z == 0


@settings(max_examples=20, deadline=None)
@given(data=st.data(), n=st.integers(1, 300), m=st.integers(1, 300))
def test_exact_test_is_scipys(data, n, m):
    from scipy import stats

    ours, others = data.draw(st.integers(0, n)), data.draw(st.integers(0, m))
    told = stats.fisher_exact([[ours, n - ours], [others, m - others]], alternative="greater").pvalue
    assert fisher(ours, n, others, m) == pytest.approx(told, rel=1e-6, abs=1e-12)
