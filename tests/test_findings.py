"""flows/findings.py: figures found by the registry's name of a metric, and what the best one is."""

import pytest

from flows import findings
from flows.findings import Finding

FIGURES = {
    "fid_digits_classifier_1k": 7.5,
    "fid_digits_classifier_pooled_1k": 9.5,
    "kid_digits_classifier_pooled_1k": 0.1,
    "inception_score_digits_classifier_1k": 9.0,
    "class_agreement_1k": 0.9,
}


@pytest.mark.parametrize(
    ("metric", "name"),
    [
        ("fid", "fid_digits_classifier_1k"),
        ("fid_pooled", "fid_digits_classifier_pooled_1k"),
        ("kid_pooled", "kid_digits_classifier_pooled_1k"),
        ("inception_score", "inception_score_digits_classifier_1k"),
        ("class_agreement", "class_agreement_1k"),
        ("fid_digits_classifier_1k", "fid_digits_classifier_1k"),
    ],
)
def test_a_metric_is_found_under_its_full_name(metric, name):
    assert findings.figure_named(FIGURES, metric) == name


def test_a_metric_that_was_not_measured_is_not_found():
    with pytest.raises(KeyError):
        findings.figure_named(FIGURES, "sfid")


def test_the_best_is_the_lowest_fid_and_the_highest_precision():
    def two(metric, *values):
        return [Finding(f"v{value}", 1.0, 1, "", metric, "plain", figure=(metric, value)) for value in values]

    assert findings.best(two("fid", 3.0, 2.0)).startswith("best: v2.0, fid 2")
    assert findings.best(two("precision", 0.3, 0.2)).startswith("best: v0.3, precision 0.3")
    assert findings.best([]) == ""
