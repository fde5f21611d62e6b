"""The whole pipeline through `dvc repro`, on the `micro` settings."""

import json
import os
import shutil
import signal
import subprocess
import sys

import checkout
import psutil
import pytest
from checkout import ran, repro, stale
from safetensors.torch import load_file
from waiting import until

from dit.check import STAGES


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = checkout.make(tmp_path_factory.mktemp("micro"))
    printed = repro(folder)
    assert ran(printed) == list(STAGES), printed
    return folder


@pytest.fixture
def copy(finished, tmp_path):
    """The finished checkout, to be harmed."""
    return shutil.copytree(finished, tmp_path / "copy", symlinks=True)


def read(folder, name):
    return json.loads((folder / "artifacts" / name).read_text())


def test_everything_is_there_and_in_one_mlflow_run(finished):
    import mlflow

    model, run = read(finished, "register/model.json"), read(finished, "train/run.json")
    assert (model["registered"], model["alias"], model["version"]) == (True, "champion", 1)
    client = mlflow.MlflowClient(f"sqlite:///{finished}/mlflow.db")
    told = client.get_run(run["mlflow_run_id"])
    assert told.info.status == "FINISHED"
    fid = read(finished, "evaluate/metrics.json")["settings"]["cfg1.5"]["fid_digits_classifier_40"]
    assert told.data.metrics["cfg1.5/fid_digits_classifier_40"] == pytest.approx(fid)
    assert {"loss", "lr", "images_per_second"} <= set(told.data.metrics)
    assert told.data.params["train.max_steps"] == "12" and told.inputs.dataset_inputs
    assert client.get_model_version_by_alias("dit-digits", "champion").run_id == run["mlflow_run_id"]
    assert [file.name for file in (finished / "scratch" / "train").glob("*/previews/*.png")] == ["step-00000012.png"]
    page = (finished / "artifacts" / "report" / "index.html").read_text()
    assert (
        page.count("data:image/png;base64,") == 4
        and "<svg" in page
        and not [link for link in ("src='http", "href='http", "<script") if link in page]
    )


def test_a_second_run_only_scans_and_registers_and_changes_nothing(finished):
    before = (finished / "dvc.lock").read_bytes()
    printed = repro(finished)
    assert ran(printed) == ["scan", "register"], printed
    assert (finished / "dvc.lock").read_bytes() == before
    assert read(finished, "register/model.json")["version"] == 1


@pytest.mark.parametrize(
    "file,old,new,expected",
    [
        ("params.yaml", "num_steps: 2", "num_steps: 3", {"sample", "register"}),
        ("params.yaml", "log_every_steps: 4", "log_every_steps: 3", set()),
        ("params.yaml", "preset: micro", "preset: mine", set()),
        ("params.yaml", "ema_decay: 0.998", "ema_decay: 0.99", {"train"}),
        ("dit/metrics.py", '"""Metrics', '"""The metrics', {"evaluate", "register"}),
        ("dit/sampling.py", '"""Samplers', '"""The samplers', {"sample", "register"}),
        ("dit/preview.py", '"""Pictures', '"""The pictures', set()),
        ("dit/tracking.py", '"""The door', '"""A door', set()),
        (
            "dit/model.py",
            '"""The diffusion',
            '"""A diffusion',
            {"encode", "reference", "train", "ema", "sample", "evaluate", "register"},
        ),
    ],
)
def test_what_makes_which_stage_stale(finished, file, old, new, expected):
    path = finished / file
    text = path.read_text()
    assert old in text
    try:
        path.write_text(text.replace(old, new, 1))
        assert stale(finished) - {"scan"} == expected
    finally:
        path.write_text(text)


def test_deleted_results_come_back_from_the_cache_without_work(copy):
    shutil.rmtree(copy / "artifacts" / "train")
    shutil.rmtree(copy / "artifacts" / "ema")
    assert ran(repro(copy)) == ["scan", "register"]
    assert (copy / "artifacts" / "train" / "model.safetensors").exists()


STEPS = 600  # of a training that lasts long enough to be interrupted after its first 100


def lengthen(folder, steps=STEPS):
    params = folder / "params.yaml"
    params.write_text(params.read_text().replace("max_steps: 12 ", f"max_steps: {steps} "))
    params.write_text(params.read_text().replace("checkpoint_every_steps: 5 ", "checkpoint_every_steps: 100 "))


def start(folder):
    command = [sys.executable, "-m", "dvc", "repro", "train"]
    return subprocess.Popen(
        command,
        cwd=folder,
        env=checkout.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def stages_in(folder):
    """Processes that run a stage in this folder."""
    found = []
    for process in psutil.process_iter():
        try:
            command = process.cmdline()
            if (
                process.cwd() == str(folder)
                and len(command) > 2
                and command[1:2] == ["-m"]
                and command[2].startswith("dit.stages.")
            ):
                found.append(process)
        except psutil.Error:
            continue
    return found


def states(folder):
    return set((folder / "scratch" / "train").glob("*/step-*.json"))


def start_and_wait_for_a_state(folder):
    """`dvc repro`, and the first state that its training has saved."""
    before = states(folder)
    dvc = start(folder)
    until(lambda: states(folder) - before, seconds=120)
    return dvc


@pytest.mark.parametrize("victim", ["stage", pytest.param("dvc", marks=[pytest.mark.slow, pytest.mark.long])])
def test_killed_while_training_and_run_again_equals_uninterrupted(copy, victim, tmp_path):
    lengthen(copy)
    whole = shutil.copytree(copy, tmp_path / "whole", symlinks=True)
    dvc = start_and_wait_for_a_state(copy)
    [stage] = stages_in(copy)
    os.kill(stage.pid if victim == "stage" else dvc.pid, signal.SIGKILL)
    assert dvc.wait(90) != 0
    if victim == "stage":
        assert not (copy / "artifacts" / "train").exists()
    dvc.stdout.close()
    again = start(copy)
    counts = []

    def ended():
        counts.append(len(stages_in(copy)))
        return again.poll() is not None

    until(ended, 120)
    assert again.returncode == 0, again.stdout.read().decode()
    printed = again.stdout.read()
    # After DVC's death the old stage may still be saving while the new one starts: only its lock makes that one trainer
    # (test_entry.py), so processes are counted where the old one is gone.
    assert victim == "dvc" or max(counts) == 1, "two trainers at a time"
    assert b"going on at step" in printed
    repro(whole, "train")
    for name in ("model.safetensors", f"ema/step-{STEPS:08d}.safetensors", "loss.csv"):
        assert (copy / "artifacts" / "train" / name).read_bytes() == (
            whole / "artifacts" / "train" / name
        ).read_bytes(), name
    assert not stages_in(copy)


def test_interrupted_by_the_keyboard_it_saves_and_goes_on(copy):
    lengthen(copy)
    before = states(copy)
    dvc = start_and_wait_for_a_state(copy)
    os.killpg(dvc.pid, signal.SIGINT)
    printed = dvc.communicate(timeout=120)[0].decode()
    assert dvc.returncode != 0 and "Traceback" not in printed
    told = json.loads((copy / "scratch" / "outcome" / "train.json").read_text())
    assert told["status"] == "interrupted" and "saved" in told["message"]
    step = max(int(state.stem.removeprefix("step-")) for state in states(copy) - before)
    assert f"going on at step {step} of {STEPS}" in repro(copy, "train")


def forget(folder, stage):
    """Take a stage out of dvc.lock: as if DVC had been killed before it wrote it."""
    from ruamel.yaml import YAML

    yaml = YAML()
    lock = yaml.load(folder / "dvc.lock")
    del lock["stages"][stage]
    yaml.dump(lock, folder / "dvc.lock")


def test_killed_between_the_end_of_training_and_dvcs_record_exports_again(copy):
    tensors = load_file(copy / "artifacts" / "train" / "model.safetensors")
    forget(copy, "train")
    shutil.rmtree(copy / "artifacts" / "train")
    shutil.rmtree(copy / ".dvc" / "cache" / "runs", ignore_errors=True)
    printed = repro(copy, "train")
    assert "going on at step 12 of 12" in printed and "train: " not in printed.replace("dit.stages.train", "")
    again = load_file(copy / "artifacts" / "train" / "model.safetensors")
    assert all((again[name] == tensor).all() for name, tensor in tensors.items())


def test_forced_it_trains_afresh(copy):
    assert "starting afresh" in repro(copy, "-f", "-s", "train")


@pytest.mark.parametrize(
    "old,new,line",
    [
        ("lr: 4e-3 ", "learning_rate: 4e-3 ", "dit: train.learning_rate: no such setting"),
        ("lr: 4e-3 ", "lr: fast ", "dit: train.lr: input should be a valid number, got 'fast'"),
        ("patch_size: 2 ", "patch_size: 3 ", "dit: model.patch_size: 3 does not divide the latent side 8"),
        ("source: digits ", "source: nowhere/at/all ", "data.source: "),
        ("num_classes: 10 ", "num_classes: 9 ", "data.num_classes"),
        ("source: digits ", "source: EMPTY ", "data.source: "),
        ("source: digits ", "source: ONE ", "data.labels: "),
    ],
)
def test_bad_input_is_one_line_and_touches_no_artifact(finished, tmp_path, old, new, line):
    from PIL import Image

    (tmp_path / "empty").mkdir()
    (tmp_path / "one" / "cat").mkdir(parents=True)
    Image.new("L", (20, 20)).save(tmp_path / "one" / "cat" / "a.png")
    new = new.replace("EMPTY", str(tmp_path / "empty")).replace("ONE", str(tmp_path / "one"))
    params, before = finished / "params.yaml", (finished / "params.yaml").read_text()
    assert old in before
    files = {path: path.stat().st_mtime_ns for path in (finished / "artifacts").rglob("*")}
    lock = (finished / "dvc.lock").read_bytes()
    try:
        params.write_text(before.replace(old, new, 1))
        printed = repro(finished, code=255)
        assert line in printed and "Traceback" not in printed, printed
        said = [text for text in printed.splitlines() if text.startswith(("dit:", "scan:"))]
        assert said and all("  " not in text for text in said)
    finally:
        params.write_text(before)
    assert {path: path.stat().st_mtime_ns for path in (finished / "artifacts").rglob("*")} == files
    assert (finished / "dvc.lock").read_bytes() == lock


def test_a_full_disk_in_encode_is_one_line_and_leaves_nothing_half(finished, tmp_path):
    """On a small file system of its own."""
    place = tmp_path / "small"
    place.mkdir()
    kept = sum(file.stat().st_size for file in finished.rglob("*") if file.is_file() and not file.is_symlink())
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={kept // 1024 + 8000}k", "tmpfs", place], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("only root can mount a small disk")
    try:
        folder = shutil.copytree(finished, place / "copy", symlinks=True)
        params = (folder / "params.yaml").read_text()
        (folder / "params.yaml").write_text(params.replace("mirror: false", "mirror: true"))
        repro(folder, "shard")
        (folder / "filler").write_bytes(bytes(max(0, shutil.disk_usage(place).free - 300_000)))
        printed = repro(folder, "-s", "encode", code=255)
        said = [text for text in printed.splitlines() if text.startswith("encode: ")]
        assert [text for text in said if "the disk is full: free some space and run again" in text], printed
        assert "Traceback" not in printed and not (folder / "artifacts" / "encode").exists()
        assert not list((folder / "scratch" / "publish").iterdir())
        (folder / "filler").unlink()
        assert "encode" in ran(repro(folder, "-s", "encode"))
    finally:
        subprocess.run(["umount", place], check=True)


def test_without_git_nothing_is_begun(finished, tmp_path):
    folder = tmp_path / "nogit"
    folder.mkdir()
    for name in ("Makefile", "params.yaml", "dvc.yaml", "requirements.lock", "pyproject.toml"):
        shutil.copy(finished / name, folder / name)
    (folder / ".venv").mkdir()
    (folder / ".venv" / ".installed").touch()
    done = subprocess.run(
        ["make", "repro"],
        cwd=folder,
        env={**os.environ, "GIT_CEILING_DIRECTORIES": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and done.stderr.splitlines()[0].startswith(
        "make repro: this folder is in no git repository"
    )
    assert not (folder / "artifacts").exists()


@pytest.mark.slow
def test_diffusion_objective_and_a_flat_folder_without_labels(finished, tmp_path):
    """The other objective, unconditional, on somebody's own pictures."""
    from PIL import Image

    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i in range(60):
        Image.new("RGB", (40 + i % 3, 30), (4 * i, 255 - 4 * i, (40 * i) % 256)).save(
            pictures / f"p {i}.{('png', 'jpg', 'webp')[i % 3]}"
        )
    (pictures / "broken.png").write_bytes(b"no image")
    folder = checkout.make(tmp_path / "own")
    (folder / "presets" / "own.yaml").write_text(f"""base: ../tests/micro
data: {{name: own, source: {pictures}, labels: none, num_classes: 0, mirror: true, max_bad_fraction: 0.1}}
encode: {{normalization: channel}}
model: {{learn_sigma: true}}
objective: {{name: diffusion}}
sample: {{settings: [{{name: plain, cfg_scale: 1.0, sampler: ddim, num_steps: 3}}]}}
register: {{model_name: dit-own, setting: plain}}
""")
    checkout.run(folder, sys.executable, "-m", "dit.cli", "preset", "own")
    printed = repro(folder)
    assert ran(printed) == list(STAGES)
    assert [bad["key"] for bad in read(folder, "shard/quarantine.json")] == ["broken.png"]
    metrics = read(folder, "evaluate/metrics.json")
    assert (
        "fid_own_rotation_40" in metrics["settings"]["plain"]
        and "class_agreement_40" not in metrics["settings"]["plain"]
    )
    assert read(folder, "register/model.json")["name"] == "dit-own"
    assert ran(repro(folder)) == ["scan", "register"]
