import numpy as np
import pytest
import torch

from dit import torchvision_cpu
from dit.features import (
    LAYERS,
    Classifier,
    ReferenceConfig,
    accuracy,
    extract,
    fit_classifier,
    load_classifier,
    registered_extractor,
    save_classifier,
    shifted,
    statistics,
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


def test_statistics_are_mean_and_unbiased_covariance():
    features = torch.randn(50, 4, dtype=torch.float64)
    told = statistics(features)
    np.testing.assert_allclose(told["mu"], features.mean(0).numpy())
    np.testing.assert_allclose(told["sigma"], torch.cov(features.T).numpy())


def test_torch_fidelity_finds_the_extractor_and_agrees(tmp_path, classifier):
    from dit.metrics import EvaluateConfig, score
    from dit.stages.reference import write_reference

    images, labels = bars(200)
    others, other_labels = bars(120, seed=2)
    others = np.clip(others.astype(int) + 15, 0, 255).astype(np.uint8)
    told = {"extractor": "bars_classifier", "num_classes": 2}
    write_reference(tmp_path, images, labels, *bars(100, seed=3), [images[:150], images[150:]], told, QUICK)
    settings = EvaluateConfig(kid_subset_size=50, kid_subsets=10)
    ours = score(others, other_labels, tmp_path, settings)
    registered_extractor("bars_classifier", tmp_path / "classifier.safetensors")
    torchvision_cpu.prepare()
    import torch_fidelity

    class Images(torch.utils.data.Dataset):
        def __init__(self, array):
            self.array = torch.from_numpy(array).permute(0, 3, 1, 2).contiguous()

        def __len__(self):
            return len(self.array)

        def __getitem__(self, index):
            return self.array[index]

    theirs = torch_fidelity.calculate_metrics(
        input1=Images(others), input2=Images(images), feature_extractor="bars_classifier", cuda=False, verbose=False,
        fid=True, isc=True, kid=True, prc=True, kid_subset_size=50, kid_subsets=10, isc_splits=10, rng_seed=2020, cache=False,
        save_cpu_ram=True,  # no worker processes: they die where the tests themselves run in several
    )  # fmt: skip
    for name, key in {
        "fid_bars_classifier_120": "frechet_inception_distance",
        "kid_bars_classifier_pooled_120": "kernel_inception_distance_mean",
        "precision_bars_classifier_120": "precision",
        "recall_bars_classifier_120": "recall",
        "inception_score_bars_classifier_120": "inception_score_mean",
    }.items():
        assert ours[name] == pytest.approx(theirs[key], rel=1e-4, abs=1e-6), name
