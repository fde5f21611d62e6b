"""What decides between two models."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_model import EXTRACTOR, write_metrics, write_model

from dit import contest
from dit.contest import beats, find_metric, forbidden, read_candidate
from dit.evaluation import EvaluateConfig
from dit.generation import SampleConfig, Setting

SAMPLE = SampleConfig(12, 0, "balanced", 8, (Setting("plain", 1.5, "euler", 2),))
NAMES = ["fid_x_classifier_1k", "fid_x_classifier_pooled_1k", "kid_x_classifier_pooled_1k", "class_agreement_1k"]


@given(st.floats(), st.floats(), st.sampled_from(["fid_x_1k", "kid_x_1k", "recall_x_1k", "class_agreement_1k"]))
def test_one_of_two_wins_at_most_and_what_is_not_finite_never_does(ours, theirs, metric):
    assert not (beats(metric, ours, theirs) and beats(metric, theirs, ours))
    assert not beats(metric, ours, ours) or not math.isfinite(ours)
    assert math.isfinite(ours) or not beats(metric, ours, theirs)


def test_lower_wins_for_distances_and_higher_for_the_rest():
    assert beats("fid_x_1k", 1, 2) and beats("kid_x_1k", -0.1, 0) and not beats("fid_x_1k", 2, 1)
    assert beats("class_agreement_1k", 0.9, 0.8) and not beats("class_agreement_1k", 0.8, 0.8)
    assert beats("fid_x_1k", 1e9, float("nan"))


def test_a_metric_is_found_by_its_short_or_full_name():
    assert find_metric("fid", NAMES, "x_classifier") == NAMES[0]
    assert find_metric("fid_pooled", NAMES, "x_classifier") == NAMES[1]
    assert (
        find_metric("class_agreement", NAMES, "x_classifier")
        == NAMES[3]
        == find_metric(NAMES[3], NAMES, "x_classifier")
    )
    with pytest.raises(ValueError, match="'is' is not among the metrics: use one of fid, fid_pooled, kid_pooled"):
        find_metric("is", NAMES, "x_classifier")


def test_own_weights_are_always_allowed_and_others_by_their_licence():
    theirs = "CC-BY-NC-4.0"
    assert forbidden(None, ()) is None
    assert forbidden(theirs, None) is None and forbidden(theirs, ("MIT", "cc-by-nc-4.0")) is None
    assert "under CC-BY-NC-4.0, which is not" in forbidden(theirs, ("MIT",))
    assert "under unknown, which is not" in forbidden("unknown", ("MIT",))


def test_a_candidate_is_what_it_holds_and_how_it_was_scored(tmp_path):
    code = tmp_path / "served.py"
    code.write_text("draw()\n")

    def read(sample=SAMPLE, evaluate=EvaluateConfig()):  # noqa: B008
        return read_candidate(tmp_path, [code], "plain", "fid", sample, evaluate)

    write_model(tmp_path)
    write_metrics(tmp_path, 2.0)
    first = read()
    assert first.metric == f"fid_{EXTRACTOR}_12" and first.value == 2.0 and first == read()
    write_metrics(tmp_path, 3.0)
    other_figure = read()
    assert other_figure.digest != first.digest and other_figure.score_tag == first.score_tag
    write_metrics(tmp_path, 2.0)
    write_model(tmp_path, seed=1)
    assert read().digest != first.digest
    write_model(tmp_path, seed=0)
    assert read() == first
    code.write_text("draw()  # mended\n")
    mended = read()
    assert mended.digest != first.digest and mended.score_tag == first.score_tag
    renamed = SampleConfig(
        12, 0, "balanced", 99, (Setting("plain", 1.5, "euler", 2), Setting("other", 1.0, "euler", 2))
    )
    assert read(renamed).score_tag == first.score_tag
    for changed in (
        read(SampleConfig(12, 1, "balanced", 8, SAMPLE.settings)),
        read(SampleConfig(12, 0, "random", 8, SAMPLE.settings)),
        read(SampleConfig(12, 0, "balanced", 8, (Setting("plain", 1.6, "euler", 2),))),
        read(evaluate=EvaluateConfig(nearest_k=4)),
    ):
        assert changed.score_tag != first.score_tag


def test_a_champion_without_classes_has_no_agreement_to_compare(tmp_path, monkeypatch):
    write_model(tmp_path)
    write_metrics(tmp_path, 2.0)
    candidate = read_candidate(tmp_path, [], "plain", "class_agreement", SAMPLE, EvaluateConfig())
    monkeypatch.setattr(contest, "score", lambda *_, **__: {f"fid_{EXTRACTOR}_12": 1.0})
    with pytest.raises(contest.Incomparable, match="it has no class_agreement_12, since it knows no classes"):
        contest.rescore(
            *(tmp_path / p for p in ("ema", "vae")), None, candidate, SAMPLE, EvaluateConfig(), tmp_path, "cpu"
        )
