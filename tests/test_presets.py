import json
import re
from pathlib import Path

import pytest

from dit.config import read_params
from dit.presets import apply, headline, names, override, resolve

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


def test_nested_settings_are_overlaid_one_by_one_and_keep_their_comments(tmp_path):
    (tmp_path / "presets").mkdir()
    (tmp_path / "presets" / "a.yaml").write_text("one: {x: 1, deep: {p: 1, q: {r: 2, s: 3}}}\n")
    (tmp_path / "presets" / "b.yaml").write_text("base: a\none: {deep: {q: {s: 4}}}\n")
    assert resolve("b", tmp_path / "presets")["one"] == {"x": 1, "deep": {"p": 1, "q": {"r": 2, "s": 4}}}
    assert resolve("a", tmp_path / "presets")["one"]["deep"]["q"]["s"] == 3
    params = tmp_path / "params.yaml"
    text = "preset: a\none:\n  x: 1  # of x\n  deep:  # of deep\n    p: 1.0  # of p\n    gone: 1\n    q:\n"
    params.write_text(text + "      r: 2  # of r\n      s: 3  # of s\n")
    apply("b", params)
    after = params.read_text()
    assert read_params(params) == resolve("b", tmp_path / "presets")
    expected = text.replace("preset: a", "preset: b").replace("    gone: 1\n", "")
    assert after == expected + "      r: 2  # of r\n      s: 4  # of s\n"


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


HEADED = "preset: a\none:\n  x: 1  # of x\n\n# The second.\ntwo:\n  y: 2\n\n# The third.\nthree:\n  - 1\n  - 2\n\n# The end.\n"


@pytest.mark.parametrize(
    ("preset", "expected"),
    [
        (  # added keys stand before the next heading
            "one: {x: 1, new: {k: 5}}\ntwo: {y: 2, z: [{n: 1}]}\nthree: [1, 2, 3]\n",
            "one:\n  x: 1  # of x\n  new:\n    k: 5\n\n# The second.\ntwo:\n  y: 2\n  z:\n    - {n: 1}\n\n# The third.\n"
            "three:\n  - 1\n  - 2\n  - 3\n\n# The end.\n",
        ),
        (  # the last key of a section is gone, or another
            "one: {new: 5}\ntwo: {z: [1, 2]}\nthree: 3\n",
            "one:\n  new: 5\n\n# The second.\ntwo:\n  z: [1, 2]\n\n# The third.\nthree: 3\n\n# The end.\n",
        ),
        (  # a section is gone, another is added
            "one: {x: 1}\nthree: [1]\nfour: {x: 1}\n",
            "one:\n  x: 1  # of x\n\n# The second.\n\n# The third.\nthree:\n  - 1\nfour:\n  x: 1\n\n# The end.\n",
        ),
    ],
)
def test_a_sections_heading_stays_where_it_stood(tmp_path, preset, expected):
    (tmp_path / "presets").mkdir()
    (tmp_path / "presets" / "a.yaml").write_text(preset)
    (tmp_path / "params.yaml").write_text(HEADED)
    apply("a", tmp_path / "params.yaml")
    assert (tmp_path / "params.yaml").read_text() == "preset: a\n" + expected
    assert read_params(tmp_path / "params.yaml") == resolve("a", tmp_path / "presets")


def test_an_unknown_last_key_goes_and_the_next_heading_stays(params):
    before = params.read_text()
    params.write_text(before.replace("max_bad_fraction: 0.01 ", "wrong: 1 # of it\n  max_bad_fraction: 0.01 "))
    params.write_text(re.sub(r"(  max_bad_fraction: .*\n)", r"\1  unknown: 3  # of it\n", params.read_text()))
    change = apply("digits", params)
    assert params.read_text() == before and "-  unknown: 3" in change and "-  wrong: 1" in change


@pytest.mark.parametrize("text", ["", "\n", "# nothing yet\n", "---\n# nothing yet\n"])
def test_a_file_without_settings_is_as_none(params, text):
    params.write_text(text)
    assert "+preset: smoke" in apply("smoke", params) and read_params(params) == resolve("smoke", ROOT / "presets")


@pytest.mark.parametrize("name", names(ROOT / "presets"))
def test_any_preset_and_back_keeps_every_comment_in_its_place(params, name):
    def comments():
        return [line.partition("#")[2].strip() for line in params.read_text().splitlines() if "#" in line]

    before = comments()
    apply(name, params)
    assert comments() == before and read_params(params) == resolve(name, ROOT / "presets")
    apply("digits", params)
    assert comments() == before and read_params(params) == resolve("digits", ROOT / "presets")


def test_an_overlay_of_the_callers_goes_on_top(params):
    change = apply("smoke", params, overlay={"train": {"max_steps": 3, "betas": [0.9, 0.95]}, "data": {"name": "mine"}})
    assert "+  name: mine" in change and read_params(params)["train"]["max_steps"] == 3
    assert "betas: [0.9, 0.95] " in params.read_text(), "a list on one line stays on one line"
    assert read_params(params)["train"]["lr"] == resolve("digits", ROOT / "presets")["train"]["lr"]


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
    with pytest.raises(ValueError, match="preset 'smok' does not exist: choose one of .*digits, .*smoke, .*xl2"):
        apply("smok", params)


def test_a_name_that_no_file_can_have_is_unknown(params):
    with pytest.raises(ValueError, match="^preset 'aaa+' does not exist: choose one of"):
        resolve("a" * 300, params.parent)


def test_presets_that_rest_on_each_other_are_a_line(tmp_path):
    for name, base in {"one": "two", "two": "one"}.items():
        (tmp_path / f"{name}.yaml").write_text(f"base: {base}\n")
    with pytest.raises(ValueError, match="^preset 'two' has the base 'one', which rests on it$"):
        resolve("one", tmp_path)


def test_each_preset_says_what_it_is_where_it_comes_from_and_what_it_costs():
    for name in names(ROOT / "presets"):
        header = [line for line in (ROOT / "presets" / f"{name}.yaml").read_text().splitlines() if line.startswith("#")]
        assert 40 < len(headline(name, ROOT / "presets")) < 140, name
        told = "\n".join(header)
        assert "not run by us" in told.lower() or "measured" in told, f"{name}: measured, or not run by us?"
        assert "# Source: " in told and "# Cost: " in told, name


def test_every_setting_of_params_yaml_is_explained_where_it_stands():
    lines = [line for line in (ROOT / "params.yaml").read_text().splitlines() if re.match(r"\s+[a-z_]+:", line)]
    assert len(lines) > 90 and [line for line in lines if "#" not in line] == []


def test_settings_are_put_in_beside_their_comments(params):
    before = read_params(params)
    said = override(
        params,
        ["train.max_steps=1000", "train.lr = 1e-4", "train.init_from=models:/x/3", "train.betas=[0.9, 0.95]"]
        + ["sample.settings=[{name: one, cfg_scale: 1.0, sampler: heun, num_steps: 2}]", "data.mirror=true"]
        + ["objective.transport={path: gvp}", "vae.pretrained=null"],
    )
    after = read_params(params)
    assert after["train"] == before["train"] | {
        "max_steps": 1000,
        "lr": 1e-4,
        "init_from": "models:/x/3",
        "betas": [0.9, 0.95],
    }
    assert [setting["name"] for setting in after["sample"]["settings"]] == ["one"] and after["data"]["mirror"] is True
    assert after["objective"]["transport"] == before["objective"]["transport"] | {"path": "gvp"}
    assert "+  max_steps: 1000         # optimizer steps;" in said and said.count("\n+ ") == 7
    plain = (ROOT / "params.yaml").read_text()
    comments = re.compile(r"#.*")
    assert comments.findall(params.read_text()) == comments.findall(plain)
    assert override(params, ["train.max_steps=1000"]) == ""


def test_a_setting_or_section_that_an_older_file_lacks_is_known(params):
    settings = read_params(params)
    del settings["retrain"], settings["run"]["stage_retries"]
    params.write_text(json.dumps(settings))
    override(params, ["retrain.min_new_images=5", "run.stage_retries=0"])
    assert read_params(params)["retrain"] == {"min_new_images": 5} and read_params(params)["run"]["stage_retries"] == 0


@pytest.mark.parametrize(
    "setting, fault",
    [
        ("train.max_step=1", "train.max_step: no such setting (did you mean train.max_steps?)"),
        ("trian.lr=1", "trian: no such section (did you mean train?)"),
        (
            "objective.transport={pth: gvp}",
            "objective.transport.pth: no such setting (did you mean objective.transport.path?)",
        ),
        ("train.lr.x=1", "train.lr.x: no such setting, since train.lr is one itself"),
        ("train=1", "train: this is a section: name a setting in it, such as train.init_from"),
        ("train.lr=", "train.lr: no value after the =: to take one away, write null"),
        ("train.lr=[1", "train.lr: '[1' is not readable YAML (expected ',' or ']', but got '<stream end>')"),
        ("train.lr", "'train.lr' is no setting and its value: write it as train.max_steps=1000"),
        ("=1", "'=1' is no setting and its value: write it as train.max_steps=1000"),
        ("preset=xl2", "preset: a run's preset is asked for by its own name, not as a setting"),
    ],
)
def test_a_setting_that_is_none_is_a_line_and_nothing_is_written(params, setting, fault):
    before = params.read_text()
    with pytest.raises(ValueError) as caught:
        override(params, ["train.max_steps=7", setting])
    assert str(caught.value) == f"set: {fault}" and params.read_text() == before


def test_an_address_within_braces_is_written_as_dvc_reads_it(tmp_path):
    from yaml import safe_load

    params = tmp_path / "params.yaml"
    params.write_text("vae: {pretrained: null, seed: 0}  # in braces\n")
    override(params, ["vae.pretrained=models:/birds/3"])
    assert safe_load(params.read_text()) == {"vae": {"pretrained": "models:/birds/3", "seed": 0}}
