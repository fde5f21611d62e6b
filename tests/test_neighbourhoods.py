import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit import neighbourhoods as page
from dit import torchvision_cpu
from dit.neighbourhoods import neighbourhoods, squared_distances, squared_radii

torchvision_cpu.prepare()
FEW = settings(max_examples=15, deadline=None)


def by_definition(real, generated, k):
    """Every distance, from differences in float64."""

    def distances(a, b):
        rows = torch.arange(len(a)).repeat_interleave(len(b))
        return squared_distances(a, b, rows, torch.arange(len(b)).repeat(len(a))).view(len(a), len(b))

    radii = [distances(x, x).sort(dim=1).values[:, k : k + 1] for x in (real, generated)]  # the 0th is itself
    across = distances(real, generated)
    in_real, in_generated = across <= radii[0], across <= radii[1].T
    return (
        in_real.any(dim=0).double().mean().item(),
        in_generated.any(dim=1).double().mean().item(),
        in_real.sum().item() / (k * len(generated)),
        in_real.any(dim=1).double().mean().item(),
    )


def normal(n, width=8, seed=0):
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed))


SETS = {
    "normal": (normal(90), normal(70, seed=1) * 0.8),
    "far from zero": (normal(90) + 1e4, normal(70, seed=1) * 0.8 + 1e4),
    "a set against itself": (normal(60), normal(60)),
    "copies with little noise": (normal(60), normal(60).repeat(2, 1) + 1e-6 * normal(120, seed=1)),
    "many at equal distances": ((normal(90, 3) * 1.5).round(), (normal(70, 3, seed=1) * 1.5).round()),
    "nothing varies": (torch.ones(20, 4), torch.ones(15, 4)),
    "one image with little noise": (normal(60), normal(1, seed=1).repeat(70, 1) + 1e-6 * normal(70, seed=2)),
    "tight clusters": tuple(
        normal(n, 1, n).round().double() * 1000 + 1e-5 * normal(n, 8, n + 1).double() for n in (90, 70)
    ),
    "tiny": (normal(60) * 1e-20, normal(50, seed=1) * 1e-20),
    "huge": (normal(60) * 1e25, normal(50, seed=1) * 1e25),
    "one outlier": (torch.cat([normal(60), normal(1) * 1e8]), normal(50, seed=1)),
    "one feature": (normal(40, 1), normal(30, 1, seed=1)),
}


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("block", [7, 64])
def test_the_answer_is_float64_s(name, block):
    """Exactly, although the products are float32's: also where all distances are within its rounding."""
    assert tuple(neighbourhoods(*SETS[name], 3, block=block)) == by_definition(*SETS[name], 3)


@FEW
@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(0, 6), st.sampled_from([3, 16, 1000]))
def test_any_numbers_any_block(seed, k, decimals, block):
    random = np.random.default_rng(seed)
    n, m, width = random.integers(k + 1, 40, 2).tolist() + [int(random.integers(1, 9))]
    real, generated = (
        torch.from_numpy((random.standard_normal((count, width)) + 100).round(decimals).astype(np.float32))
        for count in (n, m)
    )
    told = neighbourhoods(real, generated, k, block=block)
    assert tuple(told) == by_definition(real, generated, k)
    order, columns = torch.from_numpy(random.permutation(m)), torch.from_numpy(random.permutation(width))
    assert told == neighbourhoods(real, generated[order], k, block=block)
    assert told[:2] == neighbourhoods(generated, real, k)[1::-1]  # precision of the one is recall of the other
    if decimals < 2:  # sums in another order round otherwise, but not sums of few digits
        assert told == neighbourhoods(real[:, columns], generated[:, columns], k, block=block)


@pytest.mark.parametrize("width", [16, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_precision_and_recall_are_torch_fidelity_s(width, dtype):
    from torch_fidelity.metric_prc import prc_features_to_metric

    real, generated = normal(400, width).clamp(min=0), (normal(300, width, seed=1) * 0.98).clamp(min=0)
    settings = {"prc_neighborhood": 3, "prc_batch_size": 100, "save_cpu_ram": True, "verbose": False}
    theirs = prc_features_to_metric(generated.to(dtype), real.to(dtype), **settings)
    ours = neighbourhoods(real.to(dtype), generated.to(dtype), 3, block=128)
    assert 0.05 < ours.recall < 0.95 or 0.05 < ours.precision < 0.95
    assert (ours.precision, ours.recall) == pytest.approx((theirs["precision"], theirs["recall"]), rel=1e-6)


def test_closed_cases():
    real = normal(80)
    assert neighbourhoods(real, real)[:2] == (1, 1)
    away = neighbourhoods(real, real + 1000)
    assert away == (0, 0, 0, 0)
    one = neighbourhoods(real, real[:1].repeat(40, 1))  # one real image again and again: its own ball has no size
    assert one.precision == 1 and one.recall == 1 / 80
    # Balls on a line, k = 1: radius 1 about 0, 1, 2, and 8 about 10; 4 and 6 are in the last alone.
    line = neighbourhoods(torch.tensor([[0.0], [1], [2], [10]]), torch.tensor([[4.0], [6], [30]]), 1)
    assert line == (2 / 3, 2 / 4, 2 / 3, 1 / 4)  # about 4 and 6 balls of radius 2, of which 2 is at the first's edge


def test_radii_of_a_set_too_close_for_float32():
    features = normal(50, 16).double() * 1e-7 + torch.linspace(1, 2, 16)
    rows = torch.arange(50).repeat_interleave(50)
    distances = squared_distances(features, features, rows, torch.arange(50).repeat(50)).view(50, 50)
    assert torch.equal(squared_radii(features, 3, 16), distances.sort(dim=1).values[:, 3])
    assert torch.equal(distances, distances.T) and (distances.diagonal() == 0).all()


def test_each_product_is_made_once_and_only_in_float32(monkeypatch):
    """(n^2 + m^2) / 2 + nm pairs, blocks on the diagonals whole; float64 only pair by pair."""
    made, asked, bounds, pairs = [], [], page._bounds, page.squared_distances

    def counted(a, b):
        made.append((len(a.rows) * len(b.rows), a.rows.dtype))
        return bounds(a, b)

    def counted_pairs(a, b, rows, columns):
        asked.append(len(rows))
        return pairs(a, b, rows, columns)

    monkeypatch.setattr(page, "_bounds", counted)
    monkeypatch.setattr(page, "squared_distances", counted_pairs)
    n, m, block = 400, 200, 50
    neighbourhoods(normal(n, 32), normal(m, 32, seed=1), 3, block=block)
    assert sum(count for count, _ in made) == (n * n + n * block) / 2 + (m * m + m * block) / 2 + n * m
    assert {dtype for _, dtype in made} == {torch.float32}
    assert sum(asked) < 7 * (n + m)


def test_features_are_read_from_a_file_and_float32_products_keep_their_digits(tmp_path, monkeypatch):
    seen, bounds = set(), page._bounds
    monkeypatch.setattr(page, "_bounds", lambda a, b: seen.add(torch.get_float32_matmul_precision()) or bounds(a, b))
    real, generated = normal(60), normal(50, seed=1)
    real.numpy().tofile(tmp_path / "real")
    mapped = torch.from_file(str(tmp_path / "real"), size=real.numel(), dtype=torch.float32).view_as(real)
    torch.set_float32_matmul_precision("medium")
    try:
        assert neighbourhoods(mapped, generated, block=16) == neighbourhoods(real, generated)
        assert seen == {"highest"} and torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert neighbourhoods(real, generated, device="cpu") == neighbourhoods(real, generated)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_the_same():
    real, generated = normal(900, 300), normal(800, 300, seed=1)
    assert neighbourhoods(real, generated, device="cuda", block=256) == neighbourhoods(real, generated)


def test_what_cannot_be_compared_is_refused():
    a = normal(20)
    for real, generated, message in (
        (a, normal(20, 9), "have 8 dimensions and the generated ones' 9"),
        (a[:3], a, r"need at least 4 real images, got features of shape \(3, 8\)"),
        (a, a[:1], r"need at least 4 generated images, got features of shape \(1, 8\)"),
        (a, a[:, 0], r"features of shape \(20,\)"),
        (a.clone().index_fill_(0, torch.tensor([5]), torch.nan), a, r"real images' features are not finite \(row 5\)"),
        (a, a.clone().index_fill_(0, torch.tensor([0]), torch.inf), "generated images' features are not finite"),
    ):
        with pytest.raises(ValueError, match=message):
            neighbourhoods(real, generated)
