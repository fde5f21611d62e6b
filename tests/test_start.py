"""`dit init`: which preset for which images and machine, and what becomes of params.yaml."""

import json
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dit import start
from dit.check import OPTIONAL, conflicts, stage_functions
from dit.checkpoint import FORMAT
from dit.config import check_sections, read_params
from dit.expectations import GIB, Machine, expectations, look
from dit.model import ModelConfig
from dit.paths import Paths
from dit.presets import merged, names, resolve
from dit.start import choose, held_out_fraction, imported, init, name_of
from dit.survey import Survey

ROOT = Path(__file__).parents[1]
CPU = Machine("cpu", "2 CPU threads", 16 * GIB, 60e9)
H100 = Machine("cuda", "NVIDIA H100 80GB HBM3", 80 * GIB, None)
SMALL_GPU = Machine("cuda", "NVIDIA GeForce RTX 3060", 12 * GIB, None)
UNKNOWN_GPU = Machine("cuda", "Some GPU", 24 * GIB, None)


@pytest.fixture
def project(tmp_path, monkeypatch):
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    (tmp_path / "presets").symlink_to(ROOT / "presets")
    monkeypatch.setattr(start, "look", lambda: CPU)
    return Paths(tmp_path)


def images(folder, classes=("cats", "dogs"), count=12, side=40):
    for name in classes:
        (folder / name).mkdir(parents=True)
        for i in range(count):
            pixels = np.random.default_rng([i, len(name)]).integers(0, 256, (side, side, 3), np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return str(folder)


def found(count=3000, side=300, classes=3):
    counts = {f"c{i}": count // classes for i in range(classes)} if classes else {}
    return Survey("/pictures", count, 0, counts, count, (side, side, side), {"RGB": count}, [], 0)


def weights(root, **config):
    (root / "weights" / "x").mkdir(parents=True)
    (root / "weights" / "x" / "model.safetensors").touch()
    network = asdict(ModelConfig("DiT-XL/2").resolved()) | {"input_size": 32, "in_channels": 4, "num_classes": 1000}
    told = {
        "format": FORMAT,
        "image_size": 256,
        "license": "CC-BY-NC-4.0",
        "model": network,
        "objective": {"name": "diffusion"},
    }
    told |= config
    (root / "weights" / "x" / "config.json").write_text(json.dumps(told))
    return imported(root, 256)


@pytest.mark.parametrize(
    ("machine", "side", "count", "have_weights", "preset"),
    [
        (CPU, 300, 3000, True, "own-64"),
        (H100, 100, 3000, True, "own-64"),
        (H100, 300, 3000, True, "finetune-256"),
        (H100, 300, 3000, False, "own-256"),
        (H100, 300, 30_000, True, "own-256"),
        (SMALL_GPU, 300, 3000, True, "own-256"),
    ],
)
def test_the_preset_fits_images_and_machine(tmp_path, machine, side, count, have_weights, preset):
    chosen, why = choose(found(count, side), machine, weights(tmp_path) if have_weights else None)
    assert chosen == preset and why


@pytest.mark.parametrize("preset", names(ROOT / "presets"))
@pytest.mark.parametrize("classes", [3, 0])
@pytest.mark.parametrize("machine", [CPU, SMALL_GPU, H100, UNKNOWN_GPU])
def test_what_init_makes_of_any_preset_is_valid_and_explained(tmp_path, machine, preset, classes):
    pictures, base, there = found(classes=classes), resolve(preset, ROOT / "presets"), weights(tmp_path)
    settings = merged(base, start.overlay(pictures, machine, there, base, "mine", True))
    assert list(conflicts(check_sections(stage_functions(), settings, optional=OPTIONAL))) == []
    told = expectations(pictures, machine, there, settings)
    assert any(line.startswith("quality: ") for line in told) and any(line.startswith("time: ") for line in told)


def test_init_writes_valid_settings_and_keeps_comments(project, tmp_path):
    told = init(images(tmp_path / "My Pets!"), project)
    params = read_params(project.params)
    assert params["preset"] == "own-64" and params["register"]["model_name"] == "dit-my-pets"
    data = params["data"]
    assert (data["name"], data["labels"], data["num_classes"], data["image_size"]) == ("my_pets", "folder", 2, 32)
    assert data["source"] == str(tmp_path / "My Pets!") and data["mirror"] is True
    assert (
        "  # " in project.params.read_text() and "block_out_channels: [8, 16, 32]  # each" in project.params.read_text()
    )
    assert "params.yaml is written" in told and told[-1].startswith("Next: ") and "24 images" in told[0]
    assert list(conflicts(check_sections(stage_functions(), params, optional=OPTIONAL))) == []


def test_what_a_person_edited_is_kept_and_the_difference_shown(project, tmp_path):
    folder = images(tmp_path / "pets")
    edited = project.params.read_text().replace("max_steps: 2400", "max_steps: 77")
    project.params.write_text(edited)
    shown = init(folder, project, write=False)
    assert "-preset: digits" in shown and project.params.read_text() == edited and not project.scratch.exists()
    told = init(folder, project)
    (kept,) = project.scratch.glob("params-*.yaml")
    assert kept.read_text() == edited and any(kept.name in line for line in told) and "-preset: digits" in told
    again = init(folder, project)
    assert "params.yaml holds these settings already" in again and len(list(project.scratch.glob("*.yaml"))) == 1
    init(images(tmp_path / "others"), project)  # what init itself wrote is nobody's edit
    assert read_params(project.params)["data"]["name"] == "others" and len(list(project.scratch.glob("*.yaml"))) == 1
    project.params.write_text(project.params.read_text().replace("seed: 0", "seed: 5"))
    assert any("kept as" in line for line in init(folder, project))


@pytest.mark.parametrize("text", ["", "# nothing yet\n"])
def test_a_file_without_settings_is_as_none(project, tmp_path, text):
    project.params.write_text(text)
    assert "params.yaml is written" in init(images(tmp_path / "pets"), project)
    assert read_params(project.params)["data"]["name"] == "pets" and not list(project.scratch.glob("*.yaml"))


def test_a_folder_called_digits_is_a_folder_and_has_names_of_its_own(project, tmp_path, monkeypatch):
    images(tmp_path / "digits")
    monkeypatch.chdir(tmp_path)
    assert "24 images" in init("digits", project)[0]
    params = read_params(project.params)
    assert params["data"]["source"] == str(tmp_path / "digits") and params["data"]["num_classes"] == 2
    assert (params["data"]["name"], params["register"]["model_name"]) == ("digits_images", "dit-digits-images")
    with pytest.raises(ValueError, match="the embedded digits have it"):
        init("digits", project, name="digits")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with pytest.raises(ValueError, match="'./digits' is not there .*`dit preset digits`"):
        init("digits", project)


def test_too_many_unreadable_images_are_told_with_what_to_do(project, tmp_path):
    folder = images(tmp_path / "pets")
    (tmp_path / "pets" / "cats" / "3.png").write_bytes(b"torn")
    told = init(folder, project)
    (line,) = [line for line in told if "images cannot be read" in line]
    assert "1 of 24" in line and "refuses more than 1% ('cats/3.png'" in line and "raise data.max_bad_fraction" in line
    assert (
        told[-1].startswith("Next: repair or remove")
        and read_params(project.params)["data"]["max_bad_fraction"] == 0.01
    )


def test_a_class_that_nothing_is_left_of_is_refused(project, tmp_path):
    folder, before = (
        images(tmp_path / "pets", [f"c{i}" * (i + 1) for i in range(20)], count=1),
        project.params.read_text(),
    )
    with pytest.raises(ValueError, match="of 20 classes .* no readable image left to train on") as caught:
        init(folder, project)
    assert "\n" not in str(caught.value) and project.params.read_text() == before


def test_a_short_preset_takes_the_time_of_its_processes_too(tmp_path):
    pictures, settings = found(), resolve("smoke", ROOT / "presets")
    (line,) = [line for line in expectations(pictures, CPU, None, settings) if line.startswith("time: ")]
    seconds = re.search(r"(?:(\d+)m)?(\d+)s? for everything", line)
    assert 46 <= 60 * int(seconds[1] or 0) + int(seconds[2]) <= 90


def test_a_preset_without_training_says_so(tmp_path):
    told = expectations(found(), H100, weights(tmp_path), resolve("xl2-published", ROOT / "presets"))
    assert told[0].startswith("nothing is trained") and not any(
        "learn from" in line or "passes" in line for line in told
    )


def test_a_flat_folder_is_trained_without_classes(project, tmp_path):
    folder = images(tmp_path / "flat", classes=("x",), count=20) + "/x"
    init(folder, project, name="flat_ones", mirror=False)
    params = read_params(project.params)
    assert params["data"]["labels"] == "none" and params["data"]["num_classes"] == 0 and not params["data"]["mirror"]
    assert [s["cfg_scale"] for s in params["sample"]["settings"]] == [1.0] and params["register"]["setting"] == "plain"
    assert params["data"]["name"] == "flat_ones"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"name": "Bad Name"}, "data.name must be of a-z"), ({"preset": "own-65"}, "preset 'own-65' does not exist")],
)
def test_a_mistake_writes_nothing(project, tmp_path, arguments, message):
    before, folder = project.params.read_text(), images(tmp_path / "pets")
    with pytest.raises(ValueError, match=message):
        init(folder, project, **arguments)
    assert project.params.read_text() == before and not project.scratch.exists()


def test_imported_weights_are_found_and_their_licence_told(tmp_path):
    assert imported(tmp_path, 256) is None
    there = weights(tmp_path)
    assert there.folder == "weights/x" and imported(tmp_path, 512) is None
    base = resolve("finetune-256", ROOT / "presets")
    changed = start.overlay(found(), H100, there, base, "mine", True)
    assert changed["train"]["init_from"] == "weights/x"
    assert any("CC-BY-NC-4.0" in line for line in expectations(found(), H100, there, merged(base, changed)))


def test_weights_of_another_network_and_objective_decide_both(tmp_path):
    small = asdict(ModelConfig("DiT-S/4", learn_sigma=False).resolved()) | {"num_classes": 3}
    there, base = (
        weights(tmp_path, model=small, objective={"name": "transport"}),
        resolve("finetune-256", ROOT / "presets"),
    )
    settings = merged(base, start.overlay(found(), H100, there, base, "mine", True))
    assert settings["model"]["hidden_size"] == 384 and settings["objective"]["name"] == "transport"
    assert {s["sampler"] for s in settings["sample"]["settings"]} == {"heun"}
    assert list(conflicts(check_sections(stage_functions(), settings, optional=OPTIONAL))) == []


def test_held_out_images_are_some_and_not_too_many():
    counts = [20, 100, 1_999, 2_000, 50_000, 1_281_167]
    assert [held_out_fraction(count) for count in counts] == [0.2, 0.2, 0.2, 0.1, 0.05, 0.01]


def test_a_folders_name_becomes_a_name():
    assert name_of("/data/Café (2024)/") == "caf_2024" and name_of("/data/图片") == "images"


def test_this_machine_is_looked_at():
    machine = look()
    assert machine.memory_bytes > GIB / 4 and (machine.flops is None or 1e8 < machine.flops < 1e13)


def test_the_command_says_what_is_wrong_in_a_line(tmp_path):
    (tmp_path / "presets").symlink_to(ROOT / "presets")
    done = subprocess.run(
        [sys.executable, "-m", "dit.cli", "init", "nowhere"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and done.stderr.startswith("dit: ") and done.stderr.count("\n") == 1
    assert "'nowhere' is not there" in done.stderr
