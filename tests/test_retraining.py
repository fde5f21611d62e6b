"""What is new between two listings, and the settings of `retrain`."""

from collections import Counter

import pytest

from dit.retraining import RetrainConfig, compare
from dit.sources import Listing, Row


def listing(images, classes=("cat", "dog"), source="photos", labels="folder"):
    rows = [Row(key, 1, sha256, label, 0, n) for n, (key, (sha256, label)) in enumerate(images.items())]
    return Listing(source, labels, list(classes), rows)


BEFORE = listing({"a": ("1", 0), "b": ("2", 0), "c": ("3", 1), "d": ("4", 1)})


def test_new_changed_and_gone_are_counted_by_class():
    now = listing({"a": ("1", 0), "b": ("9", 0), "c": ("3", 1), "e": ("5", 1), "f": ("6", 1), "g": ("7", 0)})
    found = compare(BEFORE, now)
    assert (found.new, found.changed, found.gone) == (
        Counter({"dog": 2, "cat": 1}),
        Counter({"cat": 1}),
        Counter({"dog": 1}),
    )
    assert found.total == 4 and found and not found.restarted


def test_nothing_changed_is_nothing_also_where_classes_are_numbered_anew():
    assert not compare(BEFORE, BEFORE) and compare(BEFORE, BEFORE).total == 0
    renumbered = listing({"a": ("1", 1), "b": ("2", 1), "c": ("3", 2), "d": ("4", 2)}, ("bird", "cat", "dog"))
    assert not compare(BEFORE, renumbered)


def test_an_image_of_another_class_has_changed():
    moved = listing({"a": ("1", 1), "b": ("2", 0), "c": ("3", 1), "d": ("4", 1)})
    assert compare(BEFORE, moved).changed == Counter({"dog": 1})


def test_what_only_went_is_a_change_and_nothing_to_learn_from():
    found = compare(BEFORE, listing({"a": ("1", 0)}))
    assert found and found.total == 0 and found.gone == Counter({"dog": 2, "cat": 1})


def test_without_a_listing_before_or_with_another_source_all_is_new():
    assert compare(None, BEFORE).total == 4 and not compare(None, BEFORE).restarted
    other = compare(BEFORE, listing({"a": ("1", 0)}, (), "elsewhere", "none"))
    assert other.restarted and other.new == Counter({"": 1}) and not other.gone


@pytest.mark.parametrize("wrong", [{"min_new_images": 0}, {"quiet_seconds": -1.0}, {"max_quiet_hours": -0.5}])
def test_settings_that_make_no_sense_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        RetrainConfig(**wrong)
