from pathlib import Path

import pytest

from dit.config import read_params
from dit.presets import apply, headline, names, resolve

ROOT = Path(__file__).parents[1]


@pytest.fixture
def params(tmp_path):
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    (tmp_path / "presets").symlink_to(ROOT / "presets")
    return tmp_path / "params.yaml"


def test_an_overlay_keeps_what_its_base_says():
    digits, smoke = resolve("digits", ROOT / "presets"), resolve("smoke", ROOT / "presets")
    assert smoke["train"]["max_steps"] < digits["train"]["max_steps"]
    assert smoke["train"]["lr"] == digits["train"]["lr"] and smoke["preset"] == "smoke"


def test_applying_shows_the_difference_and_keeps_comments(params):
    before = params.read_text()
    change = apply("smoke", params)
    after = params.read_text()
    assert "-preset: digits" in change and "+preset: smoke" in change
    assert read_params(params) == resolve("smoke", ROOT / "presets")
    for line in before.splitlines():
        comment = line.partition("#")[2].strip()
        assert comment in after, "a comment was lost"
    assert apply("smoke", params) == "" and params.read_text() == after


def test_there_and_back_again_changes_no_value_and_no_comment(params):
    before = params.read_text()
    apply("xl2", params)
    assert read_params(params)["model"]["name"] == "DiT-XL/2" and read_params(params)["model"]["patch_size"] is None
    apply("digits", params)
    assert read_params(params) == resolve("digits", ROOT / "presets")
    assert params.read_text().count("#") == before.count("#")


def test_a_dry_run_changes_nothing(params):
    before = params.read_text()
    assert "+preset: smoke" in apply("smoke", params, write=False) and params.read_text() == before


@pytest.mark.parametrize("text", ["a:\n\tb: 1", "train: {}\ntrain: {}", "[1]"])
def test_a_broken_file_is_a_line_and_stays_as_it_is(params, text):
    params.write_text(text)
    with pytest.raises(ValueError, match="params.yaml") as caught:
        apply("smoke", params)
    assert "\n" not in str(caught.value) and params.read_text() == text


def test_an_unknown_name_lists_the_known_ones(params):
    with pytest.raises(ValueError, match="preset 'smok' does not exist: choose one of digits, smoke, xl2"):
        apply("smok", params)


def test_each_preset_says_what_it_is():
    for name in names(ROOT / "presets"):
        assert len(headline(name, ROOT / "presets")) > 20, name
