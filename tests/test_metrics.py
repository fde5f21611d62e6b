import numpy as np
import pytest
from test_features import QUICK, bars

from dit.metrics import EvaluateConfig, Reference, lower_is_better, metric_names, score, short_count
from dit.stages.reference import write_reference

SETTINGS = EvaluateConfig(kid_subset_size=40, kid_subsets=5)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference")
    write_reference(
        folder,
        *bars(200),
        *bars(120, seed=1),
        [bars(200)[0]],
        {"extractor": "bars_classifier", "num_classes": 2},
        QUICK,
    )
    return folder


def test_real_images_beat_damaged_ones_and_noise(reference):
    images, labels = bars(150, seed=2)
    noise = np.random.default_rng(0).integers(0, 255, images.shape).astype(np.uint8)
    real, dim, nothing = (score(x, labels, reference, SETTINGS) for x in (images, images // 2, noise))
    for layer in ("", "_pooled"):
        name = f"fid_bars_classifier{layer}_150"
        assert real[name] < dim[name] < nothing[name]
    assert real["class_agreement_150"] > 0.95 > nothing["class_agreement_150"]
    assert real["precision_bars_classifier_150"] > 0.5 > nothing["precision_bars_classifier_150"]


def test_the_reference_against_itself_is_at_no_distance(reference):
    images, labels = bars(200)
    told = score(images, labels, reference, SETTINGS)
    assert told["fid_bars_classifier_200"] == pytest.approx(0, abs=1e-3)
    assert told["precision_bars_classifier_200"] == told["recall_bars_classifier_200"] == 1


def test_one_image_many_times_has_precision_without_recall(reference):
    images, labels = bars(200)
    told = score(images[:1].repeat(50, axis=0), labels[:1].repeat(50), reference, SETTINGS)
    assert told["precision_bars_classifier_50"] == 1 and told["recall_bars_classifier_50"] < 0.1
    assert told["inception_score_bars_classifier_50"] == pytest.approx(1, abs=1e-3)


def test_the_order_of_images_does_not_matter_to_distances(reference):
    images, labels = bars(80, seed=4)
    order = np.random.default_rng(1).permutation(80)
    a, b = score(images, labels, reference, SETTINGS), score(images[order], labels[order], reference, SETTINGS)
    for name in a:
        if not name.startswith(("kid", "inception")):  # those draw subsets by position
            assert a[name] == pytest.approx(b[name], rel=1e-6, abs=1e-6), name


def test_without_classes_there_is_no_class_metric(tmp_path):
    write_reference(
        tmp_path, *bars(60), *bars(40), [bars(60)[0]], {"extractor": "bars_rotation", "num_classes": 0}, QUICK
    )
    told = score(*bars(60, seed=1), tmp_path, SETTINGS)
    assert set(told) == {
        "fid_bars_rotation_60",
        "fid_bars_rotation_pooled_60",
        "kid_bars_rotation_pooled_60",
        "precision_bars_rotation_60",
        "recall_bars_rotation_60",
    }


def test_a_model_that_was_asked_for_no_class_agrees_with_none(reference):
    images, labels = bars(60, seed=1)
    asked, not_asked = (score(images, told, reference, SETTINGS) for told in (labels, np.full_like(labels, -1)))
    assert set(asked) - set(not_asked) == {"class_agreement_60"} and not_asked.items() <= asked.items()
    for told, conditional in ((asked, True), (not_asked, False)):
        short = {name.rpartition("_")[0].replace("_bars_classifier", "") for name in told}
        assert short == set(metric_names(True, conditional=conditional))


def test_too_few_images_and_no_reference_are_refused(reference, tmp_path):
    with pytest.raises(ValueError, match="sample.num_images must be at least 4 for these metrics, got 3"):
        score(*bars(3), reference, SETTINGS)
    with pytest.raises(ValueError, match="holds no reference"):
        Reference.load(tmp_path)
    with pytest.raises(ValueError, match="nearest_k must be at least 1"):
        EvaluateConfig(nearest_k=0)


def test_names():
    assert [short_count(n) for n in (360, 1000, 1500, 50_000)] == ["360", "1k", "1500", "50k"]
    assert lower_is_better("fid_x_1k") and lower_is_better("kid_x_1k") and not lower_is_better("precision_x_1k")
