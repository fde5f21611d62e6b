"""flows/summary.py: the page at a run's end shows what the files say, and needs none of them."""

import base64
import io
import json
import re
from types import SimpleNamespace

import pytest
from PIL import Image

from flows import summary
from flows.summary import keep, page

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
MODEL = {
    "name": "dit-digits",
    "version": 4,
    "alias": "champion",
    "decision": "champion",
    "reasons": ["1.7 beats 2.4"],
    "metric": "fid_digits_classifier_1k",
    "value": 2.4,
    "setting": "plain",
    "champion_version": 3,
    "champion_value": 3.0,
    "run_id": "f00d",
}


def states(**told):
    """Stages' states as Prefect's: scan="Cached: nothing to do"."""
    return {
        name: SimpleNamespace(name=text.partition(": ")[0], message=text.partition(": ")[2])
        for name, text in told.items()
    }


def write(root, path, value):
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(value if isinstance(value, str) else json.dumps(value))


def draw(root, setting, side):
    file = root / "artifacts" / "sample" / setting / "grid.png"
    file.parent.mkdir(parents=True)
    Image.new("RGB", (side, side), (200, 10, 10)).save(file)


def pictures(text):
    """(width, height, colour in the middle) of the page's pictures."""
    found = re.findall(r"data:image/webp;base64,([A-Za-z0-9+/=]+)\)", text)
    opened = [Image.open(io.BytesIO(base64.b64decode(one))).convert("RGB") for one in found]
    return [(*one.size, one.getpixel((one.width // 2, one.height // 2))) for one in opened]


@pytest.fixture(autouse=True)
def no_server(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def test_metrics_decision_and_report_are_shown(tmp_path):
    write(tmp_path, "artifacts/evaluate/metrics.json", METRICS)
    write(tmp_path, "artifacts/register/model.json", MODEL)
    report = tmp_path / "a report.html"
    lines = page(
        tmp_path, "train-dit, digits", states(scan="Cached"), report=report, branch="runs/digits/ab12"
    ).splitlines()
    assert lines[0] == "# train-dit, digits"
    assert "|  | plain (1k images) | cfg1.5 (1k images) | floor: heldout (357 images) |" in lines
    assert "| fid_digits_classifier | 2.4 |  | 0.5123 |" in lines
    assert "| class_agreement | 0.999 | 1 |  |" in lines
    assert "dit-digits, version 4, **@champion**." in lines and "- 1.7 beats 2.4" in lines
    assert f"- Report: open `file://{tmp_path}/a%20report.html`" in lines
    assert "- Into the checkout: `dit adopt ab12` (branch `runs/digits/ab12`)" in lines
    assert "| scan | Cached |  |" in lines


def test_the_grids_are_in_the_page_itself_the_deciding_setting_first(tmp_path):
    for setting, side in {"a": 40, "plain": 300, "z": 2000}.items():
        draw(tmp_path, setting, side)
    write(tmp_path, "artifacts/register/model.json", MODEL)
    text = page(tmp_path, "t", {})
    assert "| plain | a | z |" in text
    shown = pictures(text)
    assert [one[:2] for one in shown] == [(300, 300), (280, 280), (512, 512)]  # the small one is enlarged
    assert all(abs(red - 200) < 12 and green < 30 for *_, (red, green, _) in shown)


def test_no_more_than_four_pictures_travel(tmp_path):
    for number in range(6):
        draw(tmp_path, f"cfg{number}", 256)
    assert len(pictures(page(tmp_path, "t", {}))) == 4


def test_a_kept_champion_is_compared_figure_by_figure(tmp_path):
    memory = tmp_path / "reports"
    earlier = {**METRICS, "settings": {"plain": {"fid_digits_classifier_1k": 3.0, "class_agreement_1k": 0.5}}}
    write(tmp_path, "old/artifacts/evaluate/metrics.json", earlier)
    write(tmp_path, "old/artifacts/register/model.json", MODEL | {"version": 3})
    keep(tmp_path / "old", memory, "runs/digits/1")
    write(tmp_path, "artifacts/evaluate/metrics.json", METRICS)
    write(tmp_path, "artifacts/register/model.json", MODEL)
    text = page(tmp_path, "t", {}, memory=memory)
    assert "| plain | this run | champion, version 3 | change |" in text
    assert "| **fid_digits_classifier_1k** | 2.4 | 3 | -20.0% |" in text
    assert "| class_agreement_1k | 0.999 | 0.5 | +99.8% |" in text

    # Scored again on other terms, it has another figure now: its other ones are of other terms.
    write(tmp_path, "artifacts/register/model.json", MODEL | {"champion_value": 2.5})
    text = page(tmp_path, "t", {}, memory=memory)
    assert "| **fid_digits_classifier_1k** | 2.4 | 2.5 | -4.0% |" in text
    assert "0.5 |" not in text and "Only the figure that decides" in text


@pytest.mark.parametrize("change", [{"champion_value": None}, {"champion_version": 4}])
def test_without_another_champion_there_is_no_comparison(tmp_path, change):
    write(tmp_path, "artifacts/evaluate/metrics.json", METRICS)
    write(tmp_path, "artifacts/register/model.json", MODEL | change)
    assert "Beside the champion" not in page(tmp_path, "t", {})


def test_the_cost_is_of_the_stages_that_ran_here(tmp_path):
    for stage, seconds in {"scan": 5.0, "train": 7000.0, "sample": 200.0}.items():
        write(tmp_path, f"scratch/outcome/{stage}.json", {"seconds": seconds})
    told = states(scan="Cached", train="Completed", sample="Completed", report="Completed")
    assert "Stages worked for 2h00m.\n" in page(tmp_path, "t", told)
    device = {"device": "H100", "price_usd_per_hour": 3.0, "devices": 8, "hours": 1.5}
    write(tmp_path, "scratch/preflight.json", device)
    assert "2h00m on 8 x H100: about **$48.00** at $3.00 an hour each (foreseen: 1h30m)." in page(tmp_path, "t", told)
    write(tmp_path, "scratch/preflight.json", {"device": "cpu", "price_usd_per_hour": None, "devices": 1})
    assert "Stages worked for 2h00m on cpu." in page(tmp_path, "t", told)
    assert "## Cost" not in page(tmp_path, "t", states(scan="Cached", train="Cached"))


def test_mlflow_is_linked_without_the_password_or_named_where_no_server_is(tmp_path, monkeypatch):
    write(tmp_path, "artifacts/register/model.json", MODEL)
    assert f"MLflow run `f00d` in `sqlite:///{tmp_path}/mlflow.db`" in page(tmp_path, "t", {})
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:secret@example.org:5000/")
    text = page(tmp_path, "t", {})
    assert "(https://example.org:5000/#/runs/f00d)" in text and "secret" not in text
    assert "(https://example.org:5000/#/models/dit-digits/versions/4)" in text


def test_a_run_that_stopped_shows_why_and_nothing_of_an_earlier_model(tmp_path):
    write(tmp_path, "artifacts/evaluate/metrics.json", METRICS)
    write(tmp_path, "artifacts/register/model.json", MODEL)
    draw(tmp_path, "plain", 300)
    told = states(scan="Completed: 1 s", sample="Completed: 2 s", evaluate="Failed: no\nTraceback ```")
    text = page(tmp_path, "t", told, failure="stage evaluate: no\nTraceback ```")
    assert "````\nstage evaluate: no\nTraceback ```\n````" in text
    assert "champion" not in text and "Metrics" not in text and len(pictures(text)) == 1
    assert "| evaluate | Failed | no |" in text
    assert pictures(page(tmp_path, "t", states(train="Failed: no"), failure="no")) == []


def test_an_unregistered_model_is_called_so(tmp_path):
    model = {"name": "dit-digits", "registered": False, "version": None, "reasons": ["offline"]}
    write(tmp_path, "artifacts/register/model.json", model)
    text = page(tmp_path, "t", {})
    assert "dit-digits is not registered." in text and "- offline" in text


def test_without_files_there_is_a_page_too(tmp_path):
    write(tmp_path, "artifacts/evaluate/metrics.json", "{ torn")
    assert "| scan | Completed | a\\|b |" in page(tmp_path, "smoke", states(scan="Completed: a|b"))


def test_a_metric_without_a_count_keeps_its_name(tmp_path):
    write(tmp_path, "artifacts/evaluate/metrics.json", {"settings": {"plain": {"fid_1k": 1.0, "seconds": 2.0}}})
    lines = page(tmp_path, "t", {}).splitlines()
    assert "|  | plain |" in lines and "| fid_1k | 1 |" in lines and "| seconds | 2 |" in lines


def test_the_report_outlives_the_worktree_and_the_oldest_go(tmp_path, monkeypatch):
    monkeypatch.setattr(summary, "REPORTS_KEPT", 2)
    memory = tmp_path / "reports"
    assert keep(tmp_path, memory, "runs/a/1") is None
    for number in range(4):
        write(tmp_path, "artifacts/report/index.html", f"<html>{number}")
        kept = keep(tmp_path, memory, f"runs/a/{number}")
        assert kept == memory / f"a-{number}.html" and kept.read_text() == f"<html>{number}"
    assert sorted(file.name for file in memory.iterdir()) == ["a-2.html", "a-3.html"]
