"""The packed model: what is in it, and that it needs nothing of this checkout."""

import subprocess
import sys

import pytest
import torch
from tiny_model import write_model

from dit import packing
from dit.generation import Setting

PLAIN = Setting("plain", 1.0, "euler", 2)


def packed(home, settings, **model):
    write_model(home, **model)
    parts = {name: home / name for name in ("ema", "vae")}
    packing.pack(home / "packed", **parts, settings=settings, seed=5, block_images=4, entry={})
    return home / "packed"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model whose own setting would take hours."""
    return packed(tmp_path_factory.mktemp("packed"), [Setting("endless", 1.5, "heun", 10_000_000), PLAIN])


def test_what_is_shipped_is_found_without_heavy_imports():
    code = "import sys; from dit import packing; print(*[file.name for file in packing.shipped_files()]); "
    code += "print([name for name in ('mlflow', 'torch', 'pandas') if name in sys.modules])"
    root = packing.PACKAGE.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    files, heavy = done.stdout.splitlines()
    assert files.startswith("served.py __init__.py ") and heavy == "[]"
    assert {"generation.py", "model.py", "vae.py", "checkpoint.py", "runtime.py"} <= set(files.split())
    assert {"setting.py", "objective.py", "transport.py", "stochastic.py", "denoising.py", "solvers.py"} <= set(
        files.split()
    )


def test_what_is_packed_is_what_predict_needs(folder):
    code = {file.relative_to(folder / "code").as_posix() for file in (folder / "code").rglob("*") if file.is_file()}
    assert code >= {"dit/__init__.py", "dit/generation.py", "dit/model.py", "dit/vae.py", "dit/checkpoint.py"}
    assert not code & {
        f"dit/{name}.py" for name in ("trainer", "tracking", "served", "packing", "sources", "shards", "metrics", "cli")
    }
    assert not [file for file in folder.rglob("*") if file.suffix in (".pkl", ".pyc", ".pt", ".pth")]
    pins = (folder / "requirements.txt").read_text().split()
    assert f"torch=={torch.__version__.split('+')[0]}" in pins and not [
        pin for pin in pins if "+" in pin or "==" not in pin
    ]
    assert {pin.split("==")[0] for pin in pins} >= {
        *("mlflow", "diffusers", "safetensors", "pandas", "pillow", "numpy"),
        "torchdiffeq",
    }


def test_it_works_where_this_checkout_is_not_seen(folder):
    packing.try_out(str(folder), "sqlite:///unused.db")
    with pytest.raises(ValueError, match="was registered but cannot draw"):
        packing.try_out(str(folder / "nothing"), "sqlite:///unused.db")


def test_a_model_that_takes_too_long_is_told_so(folder, monkeypatch):
    monkeypatch.setattr(packing, "TRY_SECONDS", 0.2)
    with pytest.raises(ValueError, match="was registered but drew no image within 0.2 seconds: run register again"):
        packing.try_out(str(folder), "sqlite:///unused.db")
