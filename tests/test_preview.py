import numpy as np
import pytest
import torch
from PIL import Image
from tiny_model import write_model

from dit.checkpoint import load_checkpoint
from dit.paths import Paths
from dit.preview import previews


@pytest.mark.parametrize(
    "objective,classes", [("transport", ["a", "b", "c"]), ("diffusion", ["a", "b"]), ("transport", [])]
)
def test_a_grid_is_kept_and_shown(tmp_path, capsys, objective, classes):
    paths = Paths(tmp_path)
    write_model(paths.artifacts, classes=classes, objective=objective)
    checkpoint = load_checkpoint(paths.artifacts / "ema")
    shown = []
    observe = previews(paths, tmp_path / "previews", checkpoint.config, lambda *told: shown.append(told))
    before = torch.random.get_rng_state()
    observe(7, lambda: checkpoint.model)
    observe(9, lambda: checkpoint.model)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert [(name, step) for name, _, step in shown] == [("preview", 7), ("preview", 9)]
    assert np.array_equal(shown[0][1], shown[1][1]), "the same noise at every step"
    sheet = np.asarray(Image.open(tmp_path / "previews" / "step-00000007.png"))
    assert np.array_equal(sheet, shown[0][1]) and sheet.shape[1] == 17 * (len(classes) or 10) - 1 and sheet.std() > 0
    assert "failed" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "objective",
    [
        {"name": "transport", "transport": {"path": "vp", "prediction": "noise"}},
        {"name": "diffusion", "diffusion": {"prediction": "v", "schedule": "cosine", "variance": "fixed_small"}},
    ],
)
def test_every_objective_is_shown(tmp_path, capsys, objective):
    write_model(tmp_path / "artifacts", objective=objective)
    checkpoint = load_checkpoint(tmp_path / "artifacts" / "ema")
    shown = []
    previews(Paths(tmp_path), tmp_path / "p", checkpoint.config, lambda *told: shown.append(told))(
        1, lambda: checkpoint.model
    )
    assert len(shown) == 1 and "failed" not in capsys.readouterr().out


def test_a_model_of_embeddings_is_shown_with_held_out_ones(tmp_path):
    paths = Paths(tmp_path)
    write_model(paths.artifacts, condition_shape=(2, 5))
    checkpoint = load_checkpoint(paths.artifacts / "ema")
    shown = []
    observe = previews(
        paths, tmp_path / "p", checkpoint.config, lambda *told: shown.append(told), checkpoint.conditions
    )
    observe(1, lambda: checkpoint.model)
    [(_, sheet, _)] = shown
    assert sheet.shape[:2] == (2 * 17 - 1, 7 * 17 - 1) and sheet.std() > 0


def test_its_failure_is_a_line_and_no_more(tmp_path, capsys):
    observe = previews(Paths(tmp_path), tmp_path / "previews", {}, lambda *told: None)

    def broken():
        raise RuntimeError("no network")

    observe(3, broken)
    assert capsys.readouterr().out == "preview at step 3 failed (RuntimeError: no network): training goes on\n"
