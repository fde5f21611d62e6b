import numpy as np
import pytest
import torch

from dit.classifier import (
    LAYERS,
    Classifier,
    ReferenceConfig,
    accuracy,
    extract,
    fit_classifier,
    load_classifier,
    save_classifier,
    shifted,
    shrunk,
)

QUICK = ReferenceConfig(max_steps=60, global_batch_size=32)


def bars(count, seed=0):
    """Images of a bright bar, upright (0) or lying (1)."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, count)
    images = rng.integers(0, 40, (count, 16, 16, 3)).astype(np.uint8)
    for image, label, place in zip(images, labels, rng.integers(3, 12, count), strict=True):
        image[(slice(None), place) if label == 0 else (place, slice(None))] = 220
    return images, labels.astype(np.int64)


@pytest.fixture(scope="module")
def classifier():
    return fit_classifier(*bars(200), 2, QUICK, "test")


def test_it_learns_and_generalises(classifier):
    assert accuracy(classifier, *bars(100, seed=1)) > 0.95


def test_without_labels_it_learns_rotations():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 30, (100, 16, 16, 3)).astype(np.uint8)
    images[:, :5] = 230  # every image has its bright side up
    rotations = fit_classifier(images, np.zeros(100, np.int64), 0, QUICK, "test")
    assert rotations.logits.out_features == 4
    turned = np.rot90(images, 1, axes=(1, 2)).copy()
    assert accuracy(rotations, turned, np.ones(100, np.int64)) > 0.9


def test_fitting_twice_gives_the_same_weights(classifier):
    torch.rand(5)
    again = fit_classifier(*bars(200), 2, QUICK, "test").state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in classifier.state_dict().items())


def test_features_do_not_depend_on_the_batch(classifier):
    images, _ = bars(300)
    whole = extract(classifier, images)
    parts = extract(classifier, iter([images[:7], images[7:100], images[100:]]))
    for layer, width in zip(LAYERS, (64, 64, 2), strict=True):
        assert whole[layer].shape == (300, width) and whole[layer].dtype == torch.float64
        torch.testing.assert_close(whole[layer], parts[layer], rtol=1e-5, atol=1e-5)


def test_large_images_are_averaged_down():
    images = np.random.default_rng(0).integers(0, 255, (2, 64, 64, 3)).astype(np.uint8)
    large = images.repeat(2, axis=1).repeat(2, axis=2)
    classifier = Classifier(3).eval()
    torch.testing.assert_close(
        extract(classifier, large)["hidden"], extract(classifier, images)["hidden"], rtol=1e-4, atol=1e-5
    )


def test_shrinking_is_what_the_classifier_does():
    images = np.random.default_rng(0).integers(0, 255, (2, 160, 160, 3)).astype(np.uint8)
    small, classifier = shrunk(images), Classifier(3).eval()
    assert small.shape == (2, 64, 64, 3) and small.dtype == np.uint8 and shrunk(small) is small
    assert abs(small[0, 0, 0] - images[0, :3, :3].mean(axis=(0, 1))).max() <= 0.5
    whole, less = (extract(classifier, x)["pooled"] for x in (images, small))
    torch.testing.assert_close(less, whole, rtol=0.05, atol=0.01)


def test_shifting_moves_by_whole_pixels():
    images = torch.arange(2 * 3 * 6 * 6).view(2, 3, 6, 6)
    moved = shifted(images, 1, -2)
    assert torch.equal(moved[:, :, 1:, :-2], images[:, :, :-1, 2:].float())
    assert torch.equal(shifted(images, 0, 0), images)


def test_weights_survive_the_disk(tmp_path, classifier):
    save_classifier(tmp_path / "c.safetensors", classifier)
    images, _ = bars(5)
    a, b = extract(classifier, images), extract(load_classifier(tmp_path / "c.safetensors"), images)
    assert all(torch.equal(a[layer], b[layer]) for layer in LAYERS)
