"""flows/summary.py: the page at a run's end shows what the files say, and needs none of them."""

import json

from flows.summary import markdown

METRICS = {
    "extractor": "digits_classifier",
    "reference": "ab12",
    "num_images": 1000,
    "floors": {"heldout": {"fid_digits_classifier_357": 0.51234}},
    "settings": {
        "plain": {"fid_digits_classifier_1k": 2.4, "class_agreement_1k": 0.999},
        "cfg1.5": {"class_agreement_1k": 1.0},
    },
}


def write(root, path, value):
    file = root / "artifacts" / path
    file.parent.mkdir(parents=True)
    file.write_text(value if isinstance(value, str) else json.dumps(value))


def test_metrics_decision_and_report_are_shown(tmp_path):
    write(tmp_path, "evaluate/metrics.json", METRICS)
    model = {
        "name": "dit-digits",
        "version": 4,
        "alias": "champion",
        "decision": "promoted",
        "reasons": ["1.7 beats 2.4"],
    }
    write(tmp_path, "register/model.json", model)
    write(tmp_path, "report/index.html", "<html>")
    page = markdown(tmp_path, "digits", {"scan": "Cached"})
    lines = page.splitlines()
    assert "|  | plain (1k images) | cfg1.5 (1k images) | floor: heldout (357 images) |" in lines
    assert "| fid_digits_classifier | 2.4 |  | 0.5123 |" in lines
    assert "| class_agreement | 0.999 | 1 |  |" in lines
    assert "dit-digits, version 4, **@champion**." in lines and "- 1.7 beats 2.4" in lines
    assert f"Report: `{tmp_path / 'artifacts/report/index.html'}`" in lines
    assert "| scan | Cached |" in lines


def test_an_unregistered_model_is_called_so(tmp_path):
    model = {"name": "dit-digits", "registered": False, "version": None, "reasons": ["offline"]}
    write(tmp_path, "register/model.json", model)
    page = markdown(tmp_path, "digits", {})
    assert "dit-digits is not registered." in page and "- offline" in page


def test_without_files_there_is_a_page_too(tmp_path):
    write(tmp_path, "evaluate/metrics.json", "{ torn")
    assert "preset smoke" in markdown(tmp_path, "smoke", {"scan": "Completed, a|b"})
    assert "a\\|b" in markdown(tmp_path, "smoke", {"scan": "Completed, a|b"})


def test_a_metric_without_a_count_keeps_its_name(tmp_path):
    write(tmp_path, "evaluate/metrics.json", {"settings": {"plain": {"fid_1k": 1.0, "seconds": 2.0}}})
    lines = markdown(tmp_path, "digits", {}).splitlines()
    assert "|  | plain |" in lines and "| fid_1k | 1 |" in lines and "| seconds | 2 |" in lines
