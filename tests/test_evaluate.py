"""The stage evaluate on a few images, from artifacts that are real and tiny."""

import json

import numpy as np
import pytest
from test_classifier import QUICK, bars
from test_shards import Project
from test_sources import put
from tiny_model import write_model, write_training

from dit import tracking
from dit.evaluation import EvaluateConfig
from dit.imagesets import from_array
from dit.paths import write_json
from dit.recording import Run
from dit.runtime import RunConfig
from dit.samples import write_npz
from dit.stages import report
from dit.stages.evaluate import evaluate, through
from dit.stages.reference import write_reference
from dit.vae import Autoencoder

SETTINGS = EvaluateConfig(kid_subsets=2, bootstrap=2)


@pytest.fixture
def paths(tmp_path, monkeypatch):
    """Everything that the stage reads, of two classes with a held-out image each."""
    monkeypatch.setattr(tracking, "continue_run", lambda *_, **__: Run())
    project = Project(tmp_path, image_size=16, held_out_fraction=1 / 12)
    put(project.source, *[f"{name}/{n:02d}.png" for name in ("cat", "dog") for n in range(12)])
    at = project.run().paths.artifacts
    write_model(at, classes=["cat", "dog"])
    write_training(project.paths)
    told = {"extractor": "bars_classifier", "num_classes": 2}
    (at / "reference").mkdir()
    write_reference(at / "reference", from_array(*bars(30)), from_array(*bars(10, seed=1)), told, QUICK)
    images, labels = bars(12, seed=2)
    (at / "sample" / "plain").mkdir(parents=True)
    write_npz(at / "sample" / "plain" / "samples.npz", 12, (16, 16), iter([images]), labels)
    return project.paths


def test_too_few_held_out_images_cost_the_floors_and_nothing_else(paths, capsys):
    left = paths.scratch / "evaluate" / "hidden.float32"  # by a stage that was killed
    left.parent.mkdir(parents=True)
    left.touch()
    evaluate(SETTINGS, RunConfig(device="cpu"), paths=paths)
    assert "no floors: 2 held-out images are too few" in capsys.readouterr().out
    assert not left.parent.exists()
    at = paths.artifacts / "evaluate"
    metrics, details = (json.loads((at / f"{name}.json").read_text()) for name in ("metrics", "details"))
    assert metrics["floors"] == {} and metrics["settings"]["plain"]["class_agreement_12"] >= 0
    assert details["settings"]["plain"]["copies"] is None
    assert (at / "real.png").is_file() and (at / "reconstructed.png").is_file()
    assert "There are no floors" in report.metrics_table(metrics, details)
    shown = report.trust("plain", details["settings"]["plain"], details["classes"], paths.artifacts)
    assert "Copies of training images were not looked for" in shown


def test_an_error_leaves_no_features_behind(paths):
    told = json.loads((paths.artifacts / "reference" / "reference.json").read_text())
    write_json(paths.artifacts / "reference" / "reference.json", told | {"image_size": 8})
    with pytest.raises(ValueError, match="16 x 16 pixels, the reference of 8 x 8"):
        evaluate(SETTINGS, RunConfig(device="cpu"), paths=paths)
    assert not (paths.scratch / "evaluate").exists() and not (paths.artifacts / "evaluate").exists()


def test_images_pass_through_the_autoencoder_as_they_are_asked_for(tmp_path):
    write_model(tmp_path)
    autoencoder, (images, labels) = Autoencoder.load(tmp_path / "vae"), bars(9)
    found = through(autoencoder, from_array(images, labels))
    assert found.labels is not None and found.count == 9 and found.digest != from_array(images, labels).digest
    np.testing.assert_array_equal(found.read(2, 5), autoencoder.reconstruct(images[2:5]))


@pytest.mark.parametrize("value, shown", [(None, ""), (0.0, "0.0000"), (1.23456, "1.2346"), (-4.2e-5, "-4.2e-05")])
def test_small_figures_keep_their_digits(value, shown):
    assert report._cell(value) == f"<td class=number>{shown}</td>"
