"""The papers' rows, and what keeps a figure from standing beside them."""

import pytest

from dit.papers import METRICS, PUBLISHED, column_of, compared, obstacles, table

COMPARABLE = {
    "count": 50_000,
    "extractor": "inception",
    "image_size": 256,
    "reference_form": "adm",
    "reference_image_size": 256,
    "reference_count": 10_000,
}


def row(model, image_size):
    (found,) = [row for row in PUBLISHED if (row.model, row.image_size) == (model, image_size)]
    return tuple(getattr(found, metric) for metric in METRICS)


def test_the_rows_are_the_papers():
    assert len([row for row in PUBLISHED if row.image_size == 256]) == 16
    assert len([row for row in PUBLISHED if row.image_size == 512]) == 10
    assert row("DiT-XL/2 (cfg 1.50)", 256) == (2.27, 4.60, 278.24, 0.83, 0.57)
    assert row("DiT-XL/2", 512) == (12.03, 7.12, 105.25, 0.75, 0.64)
    assert row("ADM-G, ADM-U", 256) == (3.94, 6.14, 215.84, 0.83, 0.53)
    assert row("CDM", 256) == (4.88, None, 158.71, None, None)
    assert row("SiT-XL/2 (cfg 1.50, SDE)", 512) == (2.62, None, 252.21, None, None)
    for published in PUBLISHED:  # a figure in the wrong column would leave its range
        assert published.fid < 25 and published.inception_score > 50
        assert all(value is None or 0 < value < 1 for value in (published.precision, published.recall))
    assert [row.model for row in PUBLISHED if row.unsure] == ["SiT-XL/2 (cfg 1.50, SDE)"]


def test_adms_way_is_comparable():
    assert [obstacles(metric, COMPARABLE) for metric in METRICS] == [[]] * 5
    at_512 = COMPARABLE | {"image_size": 512, "reference_image_size": 512}
    assert [bool(obstacles(metric, at_512)) for metric in METRICS] == [False, False, False, True, True]
    assert obstacles("recall", at_512) == ["against 10,000 real images, the papers' against 1,000"]
    assert obstacles("recall", at_512 | {"reference_count": 1_000}) == []


@pytest.mark.parametrize(
    ("change", "metrics", "reason"),
    [
        ({"count": 10_000}, METRICS, "10,000 images, not 50,000"),
        ({"extractor": "inception_custom"}, METRICS, "of inception_custom, not of Inception"),
        ({"image_size": 32}, METRICS, "32 pixels, the papers' 256 or 512"),
        ({"reference_form": "images"}, ("fid", "sfid", "precision", "recall"), "not ADM's batch"),
        ({"reference_form": "statistics"}, ("fid", "sfid", "precision", "recall"), "not ADM's batch"),
        ({"reference_image_size": 512}, ("fid", "sfid", "precision", "recall"), "reference's images have 512"),
        ({"reference_count": 5_000}, ("precision", "recall"), "against 5,000 real images"),
        ({"splits": 5}, ("inception_score",), "5 splits, not 10"),
    ],
)
def test_one_difference_is_one_reason(change, metrics, reason):
    for metric in METRICS:
        reasons = obstacles(metric, COMPARABLE | change)
        assert any(reason in told for told in reasons) == (metric in metrics), (metric, reasons)


def test_what_a_record_does_not_tell_counts_against_it():
    for metric in METRICS:
        assert len(obstacles(metric, {})) >= 3
        for key in COMPARABLE:
            silent = {name: value for name, value in COMPARABLE.items() if name != key}
            needed = key in ("count", "extractor", "image_size")
            needed |= key.startswith("reference") and metric != "inception_score" and key != "reference_count"
            needed |= key == "reference_count" and metric in ("precision", "recall")
            assert bool(obstacles(metric, silent)) == needed, (metric, key)


def test_only_the_plain_metrics_have_a_column():
    def column(metric, extractor="inception"):
        return column_of({"metric": metric, "extractor": extractor})

    assert column("fid_inception_50k") == "fid" and column("sfid_inception_360") == "sfid"
    assert column("inception_score_file_order_inception_50k") == "inception_score"
    assert column("inception_score_inception_50k") is None  # ADM's is the one in file order
    assert column("fid_digits_classifier_pooled_1k", "digits_classifier") is None
    assert column("kid_inception_50k") is None and column("class_agreement_50k") is None


@pytest.mark.parametrize(("in_order", "reasons"), [(276.0, 0), (62.0, 1)])
def test_a_file_that_is_sorted_by_class_has_no_comparable_score(in_order, reasons):
    told = compared(
        [
            COMPARABLE | {"metric": "inception_score_inception_50k", "value": 278.2},
            COMPARABLE | {"metric": "inception_score_file_order_inception_50k", "value": in_order},
        ]
    )
    assert told["inception_score"]["value"] == in_order and len(told["inception_score"]["obstacles"]) == reasons


def test_the_table_shows_what_is_comparable_and_explains_the_rest():
    records = [
        COMPARABLE | {"metric": "fid_inception_50k", "value": 3.943},
        COMPARABLE | {"metric": "precision_inception_50k", "value": 0.8265, "reference_count": 5_000},
        COMPARABLE | {"metric": "kid_inception_50k", "value": 0.1},
    ]
    text = table(compared(records), 256, "mine").splitlines()
    (mine,) = [line for line in text if line.startswith("mine")]
    assert mine.split() == ["mine", "3.94", "-", "-", "n/c", "-"]
    assert text[-1] == "Prec. 0.83 is not comparable: against 5,000 real images, the papers' against 10,000."
    assert sum(line.endswith(("2212.09748", "2401.08740")) for line in text) == 4
    assert "none to stand beside" in table({}, 32)
