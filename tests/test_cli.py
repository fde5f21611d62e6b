"""The `dit` command, as a person types it."""

import subprocess
import sys
from pathlib import Path

import pytest

from dit.presets import names

ROOT = Path(__file__).parents[1]


@pytest.fixture
def dit(tmp_path):
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    (tmp_path / "presets").symlink_to(ROOT / "presets")

    def run(*arguments):
        command = [sys.executable, "-m", "dit.cli", *arguments]
        return subprocess.run(
            command,
            cwd=tmp_path,
            env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
            capture_output=True,
            text=True,
        )

    run.folder = tmp_path
    return run


def test_preset_lists_shows_and_puts(dit):
    listed = dit("preset").stdout.splitlines()
    assert [line.split()[0] for line in listed] == names(ROOT / "presets") and len(listed) >= 12
    before = (dit.folder / "params.yaml").read_text()
    shown = dit("preset", "smoke", "--dry-run")
    assert "+preset: smoke" in shown.stdout and (dit.folder / "params.yaml").read_text() == before
    assert dit("preset", "smoke").stdout == shown.stdout
    assert dit("preset", "smoke").stdout == "params.yaml holds the preset smoke already\n"


def test_check_tells_a_run_in_a_line_or_every_fault_in_one(dit):
    done = dit("check")
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.count("\n") == 1
    assert done.stdout.startswith("11 of 11 stages to run (DVC can't say what is stale, so all are counted): 1,797")
    text = (dit.folder / "params.yaml").read_text()
    (dit.folder / "params.yaml").write_text(
        text.replace("patch_size: 4 ", "patch_sise: 4 ").replace("lr: 4e-3", "lr: -1")
    )
    done = dit("check")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.splitlines() == [
        "dit: model.patch_sise: no such setting (did you mean model.patch_size?)",
        "dit: train.lr must be above 0 and below 10, got -1.0",
    ]


@pytest.mark.parametrize("arguments", [("preset", "nosuch"), ("check",)])
def test_a_mistake_is_a_line_and_exit_code_2(dit, arguments):
    (dit.folder / "params.yaml").unlink()
    done = dit(*arguments)
    assert done.returncode == 2 and done.stderr.startswith("dit: ") and done.stderr.count("\n") == 1


def test_clean_frees_what_trainings_left(dit):
    left = dit.folder / "scratch" / "train" / "abc"
    left.mkdir(parents=True)
    (left / "step-00000001.safetensors").write_bytes(bytes(2_000_000))
    assert dit("clean").stdout == "2.0 MB freed\n" and not left.exists()


def test_help_comes_without_the_heavy_libraries(dit):
    script = "import sys; from dit import cli\ntry: cli.main(['--help'])\nexcept SystemExit: pass\nassert not {'torch', 'mlflow', 'prefect'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "preset" in done.stdout
