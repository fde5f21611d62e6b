import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_classifier import QUICK, bars

from dit import uncertainty
from dit.evaluation import (
    EvaluateConfig,
    evaluate_images,
    extractor_of,
    full_names,
    judge_of,
    metric_names,
    score,
)
from dit.extractors import open_extractor
from dit.imagesets import from_array
from dit.references import build_reference, read_reference
from dit.stages.reference import write_reference

SETTINGS = EvaluateConfig(kid_subset_size=40, kid_subsets=5, bootstrap=4)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "reference"
    folder.mkdir()
    told = {"extractor": "bars_classifier", "num_classes": 2}
    write_reference(folder, from_array(*bars(200)), from_array(*bars(120, seed=1)), told, QUICK)
    return folder


def figures(images, labels, reference):
    return score(from_array(images, labels), reference, SETTINGS)


def whole(images, labels, reference, folder, **changed):
    known = read_reference(reference)
    terms = {"labels": labels, "judge": judge_of(known), **changed}
    return evaluate_images(from_array(images, labels), known, extractor_of(known), SETTINGS, folder=folder, **terms)


def test_real_images_beat_damaged_ones_and_noise(reference):
    images, labels = bars(150, seed=2)
    noise = np.random.default_rng(0).integers(0, 255, images.shape).astype(np.uint8)
    real, dim, nothing = (figures(x, labels, reference) for x in (images, images // 2, noise))
    for layer in ("", "_pooled"):
        name = f"fid_bars_classifier{layer}_150"
        assert real[name] < dim[name] < nothing[name]
    assert real["class_agreement_150"] > 0.95 > nothing["class_agreement_150"]
    for kind in ("precision", "density", "coverage"):
        assert real[f"{kind}_bars_classifier_150"] > 0.5 > nothing[f"{kind}_bars_classifier_150"]


def test_the_reference_against_itself_is_at_no_distance(reference):
    told = figures(*bars(200), reference)
    assert told["fid_bars_classifier_200"] == pytest.approx(0, abs=1e-6)
    assert told["precision_bars_classifier_200"] == told["recall_bars_classifier_200"] == 1


def test_one_image_many_times_has_precision_without_recall(reference):
    images, labels = bars(200)
    told = figures(images[:1].repeat(50, axis=0), labels[:1].repeat(50), reference)
    assert told["precision_bars_classifier_50"] == 1 and told["recall_bars_classifier_50"] < 0.1
    assert told["inception_score_bars_classifier_50"] == pytest.approx(1, abs=1e-3)


def test_the_order_of_images_does_not_matter_to_distances(reference):
    images, labels = bars(80, seed=4)
    order = np.random.default_rng(1).permutation(80)
    a, b = figures(images, labels, reference), figures(images[order], labels[order], reference)
    for name in a:
        if not name.startswith(("kid", "inception")):  # those draw subsets by position
            assert a[name] == pytest.approx(b[name], rel=1e-6, abs=1e-6), name


def test_without_classes_there_is_no_class_metric(tmp_path):
    folder = tmp_path / "reference"
    folder.mkdir()
    told = {"extractor": "bars_rotation", "num_classes": 0}
    write_reference(folder, from_array(bars(60)[0]), from_array(bars(40)[0]), told, QUICK)
    told = score(from_array(bars(60, seed=1)[0]), folder, SETTINGS)
    short = {name.rpartition("_")[0].replace("_bars_rotation", "") for name in told}
    assert short == set(metric_names(False)) and not short & {"inception_score", "class_agreement"}


def test_a_model_that_was_asked_for_no_class_agrees_with_none(reference):
    images, labels = bars(60, seed=1)
    asked, not_asked = (figures(images, told, reference) for told in (labels, None))
    assert set(asked) - set(not_asked) == {"class_agreement_60"} and not_asked.items() <= asked.items()
    for told, conditional in ((asked, True), (not_asked, False)):
        short = {name.rpartition("_")[0].replace("_bars_classifier", "") for name in told}
        assert short == set(metric_names(True, conditional=conditional))


def test_too_few_images_and_no_reference_are_refused(reference, tmp_path):
    with pytest.raises(ValueError, match="these metrics need at least 4 images, got 3"):
        figures(*bars(3), reference)
    with pytest.raises(ValueError, match="holds no reference"):
        figures(*bars(5), tmp_path)
    for wrong, said in {"nearest_k": "nearest_k must be at least 1", "bootstrap": "bootstrap must be 0"}.items():
        with pytest.raises(ValueError, match=said):
            EvaluateConfig(**{wrong: -1})


def test_every_figure_says_on_what_terms_it_was_come_by(reference, tmp_path):
    images, labels = bars(150, seed=2)
    known, found = read_reference(reference), whole(images, labels, reference, tmp_path)
    assert [record["metric"] for record in found.records] == list(found.values)
    for record in found.records:
        assert record["value"] == found.values[record["metric"]] and math.isfinite(record["value"])
        assert record["count"] == 150 and record["reference"] == known.digest and record["reference_count"] == 200
        assert record["extractor"] == "bars_classifier" and len(record["extractor_digest"]) == 64
        if "interval" in record:
            low, high = record["interval"]
            assert low <= record["value"] <= high and record["standard_error"] >= 0
    bare = {record["metric"] for record in found.records if "interval" not in record}
    assert bare == {"density_bars_classifier_150"}  # a mean of counts: nothing cheap tells its spread


def test_intervals_come_with_the_bias(reference, tmp_path):
    images, labels = bars(400, seed=2)
    found = whole(images, labels, reference, tmp_path)
    by_name = {record["metric"]: record for record in found.records}
    assert by_name["fid_bars_classifier_400"]["standard_error"] > 0
    sizes = [size for size, _ in found.infinity["points"]]
    assert sizes == uncertainty.default_sizes(400, 64) and len(sizes) >= 3
    assert found.infinity["limit"] < found.values["fid_bars_classifier_400"], "fewer images, more bias"
    light = whole(images, labels, reference, tmp_path, heavy=False)
    assert light.values == found.values and light.infinity is None and light.classes == {}


def test_the_class_that_fails_is_told(reference, tmp_path):
    images, labels = bars(200, seed=2)
    images[labels == 1] = images[labels == 1].transpose(0, 2, 1, 3)  # asked to lie, they stand
    found = whole(images, labels, reference, tmp_path)
    assert found.classes[1]["fid"] > 5 * found.classes[0]["fid"]
    assert found.classes[0]["agreement"] > 0.9 > 0.5 > found.classes[1]["agreement"]
    assert found.classes[0]["num_images"] + found.classes[1]["num_images"] == 200


def test_a_reference_of_images_in_a_space_without_weights(tmp_path):
    extractor = open_extractor("random")
    known = build_reference(from_array(bars(200)[0]), extractor, tmp_path / "real")
    noise = np.random.default_rng(0).integers(0, 255, (150, 16, 16, 3)).astype(np.uint8)
    near, far = (
        evaluate_images(from_array(images), known, extractor, SETTINGS, folder=tmp_path / "ours").values
        for images in (bars(150, seed=3)[0], noise)
    )
    assert near["fid_random_150"] < 0.2 * far["fid_random_150"]
    short = {name.rpartition("_")[0].replace("_random", "") for name in near}
    assert short == set(metric_names(True, extractor="random", conditional=False))


def test_metrics_have_the_names_that_the_settings_are_held_against(reference):
    named = SimpleNamespace(name="bars", num_classes=2)
    found = figures(*bars(60, seed=2), reference)
    assert set(found) == full_names(metric_names(True), "classifier", named, 60)
    inceptions = full_names(metric_names(True, extractor="inception"), "inception", named, 50_000)
    assert {"sfid_inception_50k", "inception_score_file_order_inception_custom_50k"} <= inceptions


def test_images_of_another_size_or_space_are_refused(reference, tmp_path):
    with pytest.raises(ValueError, match="8 x 8 pixels, the reference of 16 x 16"):
        figures(np.zeros((10, 8, 8, 3), np.uint8), None, reference)
    known, extractor = read_reference(reference), open_extractor("random")
    with pytest.raises(ValueError, match="holds features of bars_classifier, not of random"):
        evaluate_images(from_array(bars(10)[0]), known, extractor, SETTINGS, folder=tmp_path)


def test_weights_that_are_not_finite_are_told(reference, tmp_path):
    known = read_reference(reference)
    extractor = extractor_of(known)
    with torch.no_grad():
        extractor.network.hidden.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="not finite"):
        evaluate_images(from_array(bars(10)[0]), known, replace(extractor), SETTINGS, folder=tmp_path)
