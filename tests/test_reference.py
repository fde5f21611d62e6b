import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from ports import free_port
from test_classifier import QUICK, bars
from test_extractors import random_inception

from dit.checkpoint import load_tensors
from dit.classifier import ReferenceConfig, extract, load_classifier
from dit.extractors import open_extractor
from dit.imagesets import from_array
from dit.stages.reference import write_reference

ROOT = Path(__file__).parents[1]
CLASSES, NONE = ({"extractor": f"bars_{kind}", "num_classes": n} for kind, n in (("classifier", 2), ("rotation", 0)))


def written(folder, told, train, heldout=None, **changes):
    folder.mkdir(exist_ok=True)
    config = ReferenceConfig(max_steps=QUICK.max_steps, global_batch_size=QUICK.global_batch_size, **changes)
    heldout = from_array(*bars(40, seed=9)) if heldout is None else heldout
    told = write_reference(folder, train, heldout, told, config)
    assert told == json.loads((folder / "reference.json").read_text())
    return told, load_tensors(folder / "features.safetensors")


def test_it_tells_how_it_was_made(tmp_path):
    images, labels = bars(100)
    told, tensors = written(tmp_path / "r", CLASSES, from_array(images, labels), max_features=30)
    names = {"hidden", "hidden.mu", "hidden.sigma", "pooled", "pooled.mu", "pooled.sigma", "labels", "indices"}
    assert set(tensors) == names
    assert (told["count"], told["kept"], told["image_size"], told["num_classes"]) == (100, 30, 16, 2)
    assert told["extractor"] == "bars_classifier" and told["resize"].startswith("area")
    assert told["extractor_digest"] == open_extractor("classifier", folder=tmp_path / "r").digest
    assert told["judge_accuracy_train"] > 0.9 and told["classifier_accuracy_heldout"] > 0.9
    assert sorted(os.listdir(tmp_path)) == ["r"]  # nothing is left of the work
    features = extract(load_classifier(tmp_path / "r" / "classifier.safetensors"), images)
    for layer in ("hidden", "pooled"):  # statistics of all, features of some
        np.testing.assert_allclose(tensors[f"{layer}.sigma"], np.cov(features[layer].numpy(), rowvar=False), atol=1e-9)
        torch.testing.assert_close(tensors[layer], features[layer][tensors["indices"]].float(), rtol=1e-5, atol=1e-5)
    assert tensors["labels"].tolist() == labels[tensors["indices"]].tolist()


def test_the_digest_is_of_what_the_folder_holds(tmp_path):
    train = from_array(*bars(60))
    digests = [written(tmp_path / name, CLASSES, train, seed=seed)[0]["digest"] for name, seed in (("a", 0), ("b", 0))]
    assert len(set(digests)) == 1
    assert written(tmp_path / "c", CLASSES, train, seed=1)[0]["digest"] not in digests


def test_without_labels_there_is_neither_judge_nor_score(tmp_path):
    told, tensors = written(tmp_path / "r", NONE, from_array(bars(60)[0]))
    assert not {"judge.safetensors"} & set(os.listdir(tmp_path / "r")) and "labels" not in tensors
    assert told["extractor"] == "bars_rotation"
    assert open_extractor("classifier", folder=tmp_path / "r").scores is None


def test_another_extractor_needs_no_classifier(tmp_path):
    told, tensors = written(tmp_path / "r", CLASSES, from_array(*bars(60)), extractor="random")
    assert told["extractor"] == "random" and tensors["pooled"].shape == (60, 512)
    assert sorted(os.listdir(tmp_path / "r")) == ["features.safetensors", "judge.safetensors", "reference.json"]


@pytest.mark.slow
def test_inceptions_reference_has_both_statistics(tmp_path):
    torch.save(random_inception().state_dict(), tmp_path / "weights.pth")
    settings = {"extractor": "inception", "weights": str(tmp_path / "weights.pth"), "max_features": 3}
    told, tensors = written(tmp_path / "r", NONE, from_array(bars(5)[0]), **settings)
    assert told["extractor"] == "inception_custom" and told["extractor_kind"] == "inception"
    assert os.listdir(tmp_path / "r") and not list((tmp_path / "r").glob("*classifier*"))
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    assert shapes.pop("pooled") == (3, 2048) and shapes.pop("indices") == (3,)
    assert shapes == {
        "pooled.mu": (2048,), "pooled.sigma": (2048, 2048), "spatial.mu": (2023,), "spatial.sigma": (2023, 2023)
    }  # fmt: skip


@pytest.mark.parametrize(
    "settings, message",
    [({"weights": "x.pth"}, "set weights to null"), ({"max_features": 1}, "at least 2"), ({"lr": 0.0}, "above 0")],
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ReferenceConfig(**settings)


SHARED = """
import sys, torch
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_classifier import QUICK, bars
from test_extractors import random_inception
from dit.imagesets import from_array
from dit.stages.reference import write_reference
torch.set_num_threads(1)
train, heldout = (from_array(*bars(count, seed=seed)) for count, seed in ((700, 0), (60, 3)))
write_reference(Path(sys.argv[1]), train, heldout, {{"extractor": "bars_classifier", "num_classes": 2}}, QUICK)
"""


@pytest.mark.slow
def test_two_processes_make_the_same_reference(tmp_path):
    port = free_port()
    script = tmp_path / "script.py"
    script.write_text(SHARED.format(tests=str(ROOT / "tests")))
    for name, size in (("one", 1), ("two", 2)):
        (tmp_path / name).mkdir()
        spread = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        environments = [os.environ | spread | {"RANK": str(rank), "PYTHONPATH": str(ROOT)} for rank in range(size)]
        command = [sys.executable, str(script), str(tmp_path / name)]
        processes = [subprocess.Popen(command, env=environment) for environment in environments]
        assert [process.wait(120) for process in processes] == [0] * size
    one, two = (load_tensors(tmp_path / name / "features.safetensors") for name in ("one", "two"))
    assert set(one) == set(two) and len(one["hidden"]) == 700
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-6, atol=1e-9)
        if "." not in name:
            assert torch.equal(one[name], two[name]), name
