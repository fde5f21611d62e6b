import pytest
import torch

from dit.metrics import frechet_distance
from dit.perclass import distance_of, per_class, worst


def normal(count, width, seed, shift=0.0, scale=1.0):
    draws = torch.Generator().manual_seed(seed)
    return torch.randn(count, width, generator=draws, dtype=torch.float64) * scale + shift


def by_covariances(a, b):
    """The textbook formula: tr (S_a S_b)^(1/2) by the eigenvalues of the product."""
    A, B = a.double().T.cov(), b.double().T.cov()
    cross = torch.linalg.eigvals(A @ B).real.clamp(min=0).sqrt().sum()
    return float((a.double().mean(0) - b.double().mean(0)).square().sum() + A.trace() + B.trace() - 2 * cross)


@pytest.mark.parametrize(("n", "m"), [(200, 300), (200, 6), (5, 200)])
def test_distance_is_the_textbooks(n, m):
    a, b = normal(n, 10, 0), normal(m, 10, 1, shift=0.5, scale=2)
    assert distance_of(a, b) == pytest.approx(by_covariances(a, b), rel=1e-6)
    assert distance_of(a, b) == pytest.approx(distance_of(b, a), rel=1e-12)
    assert distance_of(a, b) == pytest.approx(frechet_distance(a.mean(0), a.T.cov(), b.mean(0), b.T.cov()), rel=1e-6)


def test_distance_of_points_on_two_lines_is_known():
    """Along orthogonal lines nothing is shared: the distance is the two variances, plus that of the means."""
    a, b = torch.zeros(3, 50), torch.zeros(4, 50)
    a[:, 0], b[:, 1] = torch.tensor([-1.0, 0, 1]), torch.tensor([0.0, 2, 4, 6])
    assert distance_of(a, b) == pytest.approx(1 + 20 / 3 + 9, rel=1e-12)
    assert distance_of(a, a) == pytest.approx(0, abs=1e-12)


def test_the_broken_class_is_found():
    labels = torch.arange(4).repeat_interleave(30)
    real, features = normal(120, 6, 0), normal(120, 6, 1)
    real += labels[:, None]
    features += torch.where(labels == 2, 0, labels)[:, None]  # the model draws class 0 where 2 is asked for
    read = torch.where(labels == 2, 0, labels)
    table = per_class(features.float(), labels, real.float(), labels, read)
    assert list(table) == [0, 1, 2, 3] and [label for label, _ in worst(table, 1)] == [2]
    assert table[2]["fid"] > 10 * max(table[label]["fid"] for label in (0, 1, 3))
    assert [row["agreement"] for row in table.values()] == [1, 1, 0, 1]
    assert table[1] == {
        "fid": pytest.approx(by_covariances(features[30:60], real[30:60]), rel=1e-5),
        "num_images": 30,
        "num_real": 30,
        "agreement": 1.0,
    }


def test_classes_of_few_images_tell_their_count_and_no_distance():
    labels = torch.tensor([0] * 25 + [1] * 5 + [3] * 2 + [-1] * 8)
    real_labels = torch.tensor([0] * 40 + [1] * 40 + [2] * 20)
    features, real = normal(40, 3, 0), normal(100, 3, 1)
    table = per_class(features, labels, real, real_labels, torch.zeros(40, dtype=torch.int64))
    assert {label: (row["num_images"], row["num_real"]) for label, row in table.items()} == {
        0: (25, 40),
        1: (5, 40),
        2: (0, 20),
        3: (2, 0),
    }
    assert [label for label, row in table.items() if row["fid"] is not None] == [0]
    assert [label for label, _ in worst(table, 10)] == [0, 1, 3]  # after the distances, the least agreement
    assert per_class(features, labels, real, real_labels, least=5)[1]["fid"] is not None
    assert per_class(features, labels, real, real_labels)[0]["agreement"] is None


def test_the_order_of_images_does_not_matter():
    labels, order = torch.arange(3).repeat(30), torch.randperm(90, generator=torch.Generator().manual_seed(0))
    features, real = normal(90, 5, 0), normal(90, 5, 1)
    told, shuffled = per_class(features, labels, real, labels), per_class(features[order], labels[order], real, labels)
    for label in told:
        assert told[label]["fid"] == pytest.approx(shuffled[label]["fid"], rel=1e-9)


def test_what_cannot_be_compared_is_refused():
    labels = torch.zeros(30, dtype=torch.int64)
    with pytest.raises(ValueError, match="of 4 and of 5 dimensions"):
        per_class(normal(30, 4, 0), labels, normal(30, 5, 0), labels)
    with pytest.raises(ValueError, match="one label for each image"):
        per_class(normal(30, 4, 0), labels[:29], normal(30, 4, 0), labels)
    broken = normal(30, 4, 0)
    broken[2, 2] = float("inf")
    with pytest.raises(ValueError, match="not finite"):
        per_class(broken, labels, normal(30, 4, 1), labels)
