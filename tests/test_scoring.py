"""The loss on images that were never trained on, at the same noise and times every time."""

import pytest
import torch

from dit import scoring
from dit.checkpoint import save_tensors
from dit.diffusion import DiffusionConfig
from dit.model import DiT, ModelConfig
from dit.objective import ObjectiveConfig
from dit.paths import file_sha256, write_json
from dit.places import Folder
from dit.scoring import held_out_loss, scores

TRANSPORT = ObjectiveConfig("transport")
FIXED = ObjectiveConfig("diffusion", diffusion=DiffusionConfig(variance="fixed_small"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two shards of 30 held-out images each, and one to train on whose numbers would spoil every mean."""
    folder, shards = tmp_path_factory.mktemp("encode"), []
    draws = torch.Generator().manual_seed(0)
    for number, split in enumerate(("heldout", "train", "heldout")):
        mean = torch.randn(30, 2, 4, 4, generator=draws) + (split == "train") * 1e4
        tensors = {"mean": mean.half(), "std": torch.full_like(mean, 0.1).half(), "label": torch.arange(30) % 3}
        tensors["features"] = torch.randn(30, 4, 6, generator=draws).half()
        save_tensors(folder / f"{number}.safetensors", tensors)
        file = folder / f"{number}.safetensors"
        shards.append({"file": file.name, "split": split, "samples": 30, "sha256": file_sha256(file)})
    write_json(folder / "index.json", {"shards": shards, "normalization": {"mean": [0.5, 0.5], "std": [2.0, 2.0]}})
    return folder


def network(seed=0, num_classes=3, **changes):
    torch.manual_seed(seed)
    config = ModelConfig("custom", 2, 16, 1, 2, **changes)
    made = DiT(config, input_size=4, in_channels=2, num_classes=num_classes, condition_shape=(4, 6))
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return made.eval()


@pytest.mark.parametrize("objective", [TRANSPORT, FIXED], ids=lambda objective: objective.name)
def test_it_depends_on_the_weights_alone(folder, objective):
    torch.manual_seed(1)
    first = held_out_loss(network(), folder, objective, "fp32")
    torch.manual_seed(2)
    assert held_out_loss(network(), folder, objective, "fp32") == first and 0.1 < first < 10
    assert held_out_loss(network(seed=1), folder, objective, "fp32") != first


def test_every_image_has_a_time_of_its_own_part_and_is_asked_for_as_what_it_is(folder):
    seen = []
    made = network()
    made.register_forward_pre_hook(lambda module, inputs: seen.append(inputs))
    held_out_loss(made, folder, TRANSPORT, "fp32", images=40)
    x, t, y = (torch.cat(tensors) for tensors in zip(*seen, strict=True))
    assert torch.equal((40 * t).floor().sort().values, torch.arange(40.0)) and not torch.equal(t, t.sort().values)
    assert len(x) == 40 and x.abs().max() < 10 and set(y.tolist()) == {0, 1, 2}


def test_no_more_images_than_asked_for_and_in_any_batches(folder, monkeypatch):
    whole = held_out_loss(network(), folder, TRANSPORT, "fp32", images=50)
    assert whole != held_out_loss(network(), folder, TRANSPORT, "fp32", images=40)
    monkeypatch.setattr(scoring, "BATCH", 7)
    assert held_out_loss(network(), folder, TRANSPORT, "fp32", images=50) == pytest.approx(whole, rel=1e-6)


@pytest.mark.parametrize(
    ("changes", "precision"),
    [({"condition": "embeddings"}, "fp32"), ({"condition": "none", "num_classes": 0}, "fp32"), ({}, "bf16")],
)
def test_any_condition_and_precision(folder, changes, precision):
    assert 0.1 < held_out_loss(network(**changes), folder, TRANSPORT, precision, images=20) < 10


def test_it_is_logged_with_its_step_and_may_fail_without_harm(folder, tmp_path, capsys):
    logged = []
    observe = scores(folder, TRANSPORT, "fp32", lambda step, values: logged.append((step, values)), images=20)
    observe(7, network)
    assert logged == [(7, {"held_out_loss": held_out_loss(network(), folder, TRANSPORT, "fp32", images=20)})]
    write_json(tmp_path / "index.json", {"shards": [], "normalization": {"mean": [0.0], "std": [1.0]}})
    scores(tmp_path, TRANSPORT, "fp32", lambda *told: logged.append(told))(8, network)
    assert len(logged) == 1
    assert "score at step 8 failed (ValueError: data.held_out_fraction: no image is held out" in capsys.readouterr().out


def test_images_that_are_elsewhere_are_brought_once(folder, tmp_path):
    (tmp_path / "encode").mkdir()
    (tmp_path / "encode" / "index.json").write_text((folder / "index.json").read_text())  # nothing else is here
    logged, elsewhere = [], {"source": Folder(str(folder)), "cache": tmp_path / "cache"}
    score = scores(tmp_path / "encode", TRANSPORT, "fp32", lambda *told: logged.append(told), images=50, **elsewhere)
    score(1, network)
    expected = {"held_out_loss": held_out_loss(network(), folder, TRANSPORT, "fp32", images=50)}
    brought = sorted(tmp_path.glob("cache/*.safetensors"))
    assert logged == [(1, expected)] and len(brought) == 2
    for file in brought:
        file.unlink()
    score(2, network)
    assert logged[1:] == [(2, expected)] and not sorted(tmp_path.glob("cache/*.safetensors"))
