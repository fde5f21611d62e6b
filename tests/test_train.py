"""The stages `train` and `ema` on real, tiny latents, one after the other as DVC runs them."""

import json
import shutil
import time
from dataclasses import replace

import pytest
import torch

from dit.alignment import AlignmentConfig
from dit.checkpoint import load_checkpoint, load_tensors, save_checkpoint, save_tensors
from dit.entry import Interrupted
from dit.model import ModelConfig
from dit.monitor import COLUMNS
from dit.objective import ObjectiveConfig
from dit.paths import Paths, file_sha256, write_json
from dit.runtime import RunConfig
from dit.stages.ema import EmaConfig, ema
from dit.stages.train import train
from dit.training import TrainConfig
from dit.transport import TransportConfig

MODEL = ModelConfig("custom", 2, 16, 2, 2, learn_sigma=False)
RUN = RunConfig(log_every_steps=2, checkpoint_every_steps=4)
TRANSPORT = ObjectiveConfig("transport")


def settings(**changes):
    return TrainConfig(**{"max_steps": 6, "global_batch_size": 8, "lr": 1e-2, **changes})


@pytest.fixture
def paths(tmp_path, monkeypatch):
    """Latents of 24 images in 3 classes, with features; MLflow is not there."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    folder = tmp_path / "artifacts" / "encode"
    folder.mkdir(parents=True)
    draws = torch.Generator().manual_seed(0)
    for split in ("train", "heldout"):
        mean, label = torch.randn(24, 2, 4, 4, generator=draws), torch.arange(24) % 3
        tensors = {"mean": mean.half(), "std": torch.full_like(mean, 0.1).half(), "label": label}
        save_tensors(
            folder / f"{split}.safetensors", tensors | {"features": torch.randn(24, 4, 6, generator=draws).half()}
        )
    index = {"digest": "d" * 64, "autoencoder": "a" * 64, "channels": 2, "size": 4, "image_size": 16}
    index |= {"mirror": False, "classes": ["x", "y", "z"], "data": {"name": "tiny", "digest": "t" * 64}}
    index |= {"normalization": {"mode": "scale", "mean": [0.0, 0.0], "std": [1.0, 1.0]}}
    index |= {"features": {"source": "f.npz", "sha256": "f" * 64, "shape": [4, 6]}}
    told = {split: file_sha256(folder / f"{split}.safetensors") for split in ("train", "heldout")}
    shards = [{"file": f"{s}.safetensors", "split": s, "samples": 24, "sha256": sha} for s, sha in told.items()]
    write_json(folder / "index.json", index | {"shards": shards})
    return Paths(tmp_path)


def trained(paths, model=MODEL, objective=TRANSPORT, **changes):
    train(model, objective, settings(**changes), RUN, paths=paths)
    return json.loads((paths.artifacts / "train" / "config.json").read_text())


def edit_index(paths, **changes):
    file = paths.artifacts / "encode" / "index.json"
    told = json.loads(file.read_text()) | changes
    write_json(file, {key: value for key, value in told.items() if value is not None})


def test_power_averages_are_kept_and_any_width_is_rebuilt_from_them(paths, capsys):
    trained(paths, power_ema=(0.05, 0.1), snapshot_every_steps=2)
    kept = sorted(file.name for file in (paths.artifacts / "train" / "ema").iterdir())
    steps = ("00000002", "00000004", "00000006")
    assert kept == sorted(
        f"{kind}-{step}.safetensors" for kind in ("step", "power-0.05", "power-0.1") for step in steps
    )
    stored = load_tensors(paths.artifacts / "train" / "ema" / "power-0.1-00000004.safetensors")
    ema(EmaConfig(sigma_rel=0.1, step=4), paths=paths)
    assert "width 0.1 at step 4, its profile off by 0.0%" in capsys.readouterr().out
    opened = load_checkpoint(paths.artifacts / "ema")
    for name, tensor in opened.model.state_dict().items():
        torch.testing.assert_close(tensor, stored[name], rtol=1e-6, atol=1e-7)
    told = opened.config
    assert (told["weights"], told["step"], told["sigma_rel"]) == ("ema", 4, 0.1) and told["sigma_rel_error"] < 1e-6
    ema(EmaConfig(sigma_rel=0.2), paths=paths)
    assert "keep more averages for a better one" in capsys.readouterr().out
    between = load_checkpoint(paths.artifacts / "ema").model.final_layer.linear.weight
    assert not torch.equal(between, stored["final_layer.linear.weight"])
    ema(EmaConfig(), paths=paths)
    assert "sigma_rel" not in load_checkpoint(paths.artifacts / "ema").config


@pytest.mark.parametrize(
    "power,config,message",
    [
        ((), EmaConfig(sigma_rel=0.1), "ema.sigma_rel: training kept no power-function averages: set train.power_ema"),
        ((0.1,), EmaConfig(sigma_rel=0.1, step=3), "ema.step: no average of step 3 was kept; there are those of 4, 6"),
        ((0.1,), EmaConfig(step=3), "ema.step: no average of step 3 was kept; there are those of 4, 6"),
        (
            (0.001,),
            EmaConfig(sigma_rel=0.28),
            "ema.sigma_rel: 0.28 cannot be built from what training kept (its profile",
        ),
        ((0.1, 0.1000000001), EmaConfig(sigma_rel=0.15), "ema.sigma_rel: 0.15 cannot be built from what training kept"),
    ],
)
def test_what_was_not_kept_cannot_be_rebuilt(paths, power, config, message):
    trained(paths, power_ema=power, snapshot_every_steps=4)
    with pytest.raises(ValueError) as caught:
        ema(config, paths=paths)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change,message",
    [
        ({"sigma_rel": 0.0}, "sigma_rel must be above 0 and below 0.2887, got 0.0"),
        ({"sigma_rel": 0.29}, "sigma_rel must be above 0"),
        ({"sigma_rel": 0.1, "weights": "raw"}, "sigma_rel is the width of an average"),
    ],
)
def test_a_width_that_makes_no_sense_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        EmaConfig(**change)


@pytest.fixture
def initial(paths, tmp_path):
    """A trained model of the same latents, as a checkpoint folder with a licence."""
    trained(paths)
    ema(EmaConfig(), paths=paths)
    folder = shutil.copytree(paths.artifacts / "ema", tmp_path / "theirs")
    config = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", config | {"license": "CC-BY-NC-4.0"})
    return folder


def test_no_steps_pass_the_initial_weights_straight_on(paths, initial, capsys):
    config = trained(paths, max_steps=0, init_from="theirs")
    assert "the label table is kept: the same 3 classes" in capsys.readouterr().out
    assert (paths.artifacts / "train" / "loss.csv").read_text().split() == [",".join(COLUMNS)]
    assert config["license"] == "CC-BY-NC-4.0" and config["step"] == 0
    assert config["init"]["from"] == "theirs" and len(config["init"]["digest"]) == 64
    for weights in ("ema", "raw"):
        ema(EmaConfig(weights=weights), paths=paths)
        ours, theirs = load_checkpoint(paths.artifacts / "ema"), load_checkpoint(initial)
        assert ours.license == "CC-BY-NC-4.0"
        for name, tensor in theirs.model.state_dict().items():
            assert torch.equal(ours.model.state_dict()[name], tensor), name


def test_no_steps_and_another_objective_or_other_classes_are_refused(paths, initial):
    with pytest.raises(
        ValueError, match="train.max_steps: 0 trains nothing, .* set objective.transport.path to linear"
    ):
        trained(
            paths,
            objective=ObjectiveConfig("transport", transport=TransportConfig("gvp")),
            max_steps=0,
            init_from="theirs",
        )
    edit_index(paths, classes=["x", "y", "w"])
    with pytest.raises(
        ValueError, match="train.max_steps: 0 trains nothing, and the weights do not know the classes w"
    ):
        trained(paths, max_steps=0, init_from="theirs")


def test_fine_tuning_begins_with_the_weights_and_their_average(paths, initial):
    trained(paths, max_steps=1, lr=1e-9, init_from="theirs", ema_decay=0.5)
    theirs = load_tensors(initial / "model.safetensors")
    for file in ("model.safetensors", "ema/step-00000001.safetensors"):
        for name, tensor in load_tensors(paths.artifacts / "train" / file).items():
            torch.testing.assert_close(tensor, theirs[name], atol=1e-7, rtol=0)


def test_a_resumed_fine_tuning_does_not_begin_again_and_other_weights_are_another_training(paths, initial, capsys):
    trained(paths, max_steps=4, init_from="theirs")
    once = load_tensors(paths.artifacts / "train" / "model.safetensors")
    moved = initial.rename(initial.with_name("moved"))
    capsys.readouterr()
    trained(paths, max_steps=8, init_from="moved")
    said = capsys.readouterr().out
    assert "going on at step 4 of 8" in said and "label table" not in said
    tensors = load_tensors(moved / "model.safetensors")
    tensors["final_layer.linear.bias"] += 1
    save_checkpoint(moved, tensors, json.loads((moved / "config.json").read_text()))
    trained(paths, max_steps=4, init_from="moved")
    assert "going on" not in capsys.readouterr().out
    other = load_tensors(paths.artifacts / "train" / "model.safetensors")
    assert not torch.equal(once["final_layer.linear.bias"], other["final_layer.linear.bias"])


def test_what_does_not_fit_the_latents_is_refused_before_any_work(paths, initial):
    edit_index(paths, autoencoder="b" * 64)
    with pytest.raises(ValueError, match="belong to the autoencoder aaaaaaaaaaaa, .* set vae.pretrained"):
        trained(paths, init_from="theirs")
    edit_index(paths, features=None)
    with pytest.raises(ValueError, match="model.condition: the latents carry no embeddings: set encode.features"):
        trained(paths, ModelConfig("custom", 2, 16, 1, 2, learn_sigma=False, condition="embeddings"))


def test_a_model_conditioned_on_embeddings_carries_examples_of_them(paths):
    model = ModelConfig("custom", 2, 16, 1, 2, learn_sigma=False, condition="embeddings")
    aligned = ObjectiveConfig("transport", alignment=AlignmentConfig(weight=0.5, projector_size=8))
    config = trained(paths, model, aligned)
    assert config["model"]["condition_shape"] == [4, 6] and config["license"] is None and config["init"] is None
    assert not [name for name in load_tensors(paths.artifacts / "train" / "model.safetensors") if "align" in name]
    ema(EmaConfig(), paths=paths)
    opened = load_checkpoint(paths.artifacts / "ema")
    assert opened.conditions["features"].shape == (24, 4, 6) and opened.conditions["label"].shape == (24,)
    heldout = load_tensors(paths.artifacts / "encode" / "heldout.safetensors")["features"]
    assert (heldout.unsqueeze(0) == opened.conditions["features"][:, None]).all((2, 3)).any(1).all()
    images = opened.model(torch.randn(2, 2, 4, 4), torch.rand(2), opened.conditions["features"][:2].float())
    assert images.shape == (2, 2, 4, 4)


def test_a_worktree_takes_over_what_another_has_trained_and_begins_with_the_homes_weights(paths, initial, capsys):
    tree = Paths(paths.scratch / "worktrees" / "a")
    shutil.copytree(paths.artifacts / "encode", tree.artifacts / "encode")
    tree.scratch.mkdir()
    (tree.scratch / "home").write_text(str(paths.root))
    capsys.readouterr()
    trained(tree)
    assert "going on at step 6 of 6" in capsys.readouterr().out and not (tree.scratch / "train").exists()
    same = [(at.artifacts / "train" / "model.safetensors").read_bytes() for at in (paths, tree)]
    assert same[0] == same[1]
    config = trained(tree, init_from="theirs")
    assert config["init"]["from"] == "theirs" and "going on" not in capsys.readouterr().out


def files(paths):
    """What a training wrote, by name, but what tells of the process."""
    folder = paths.artifacts / "train"
    written = {file.relative_to(folder).as_posix(): file for file in folder.rglob("*") if file.is_file()}
    return {name: file.read_bytes() for name, file in written.items() if name != "run.json"}


def elsewhere(paths, name):
    """The same latents, and nothing trained yet."""
    shutil.copytree(paths.artifacts / "encode", paths.root / name / "artifacts" / "encode")
    return Paths(paths.root / name)


def test_stopped_by_a_batch_systems_limit_again_and_again_it_ends_as_if_it_had_not_been(paths, monkeypatch):
    changes = {"power_ema": (0.1,), "snapshot_every_steps": 2}
    whole = elsewhere(paths, "whole")
    trained(whole, **changes)
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) - 1))
    for step in range(1, 6):
        with pytest.raises(Interrupted, match=f"stopped at step {step} of 6, which is saved"):
            trained(paths, **changes)
        assert not (paths.artifacts / "train").exists()
    trained(paths, **changes)
    assert files(paths) == files(whole) and len(files(whole)) == 3 + 2 * 3


@pytest.mark.parametrize("where", ["mapped", "streamed"])
def test_wherever_the_latents_lie_the_training_is_the_same(paths, where):
    whole, place = elsewhere(paths, "whole"), elsewhere(paths, "place")
    trained(whole)
    run = replace(RUN, latents=where, latents_from=str(place.artifacts / "encode") if where == "streamed" else None)
    if where == "streamed":
        (paths.artifacts / "encode" / "train.safetensors").unlink()
    train(MODEL, TRANSPORT, settings(), run, paths=paths)
    assert files(paths) == files(whole)


def test_another_machine_goes_on_from_the_mirror(paths, capsys):
    run = replace(RUN, mirror=str(paths.root / "mirror"))
    there, whole = elsewhere(paths, "there"), elsewhere(paths, "whole")
    train(MODEL, TRANSPORT, settings(max_steps=4), run, paths=there)
    capsys.readouterr()
    train(MODEL, TRANSPORT, settings(), run, paths=paths)
    assert "going on at step 4 of 6" in capsys.readouterr().out
    trained(whole)
    assert files(paths) == files(whole)


def test_a_training_that_diverges_says_which_state_is_good(paths):
    with pytest.raises(
        ValueError, match=r"the last good state is step-000000\d\d.safetensors: lower train.lr"
    ) as caught:
        trained(paths, max_steps=200, lr=9.9, betas=(0.0, 0.0))
    assert "\n" not in str(caught.value) and not (paths.artifacts / "train").exists()


def test_loss_csv_tells_of_every_level_of_noise(paths):
    trained(paths, max_steps=4)
    header, *rows = (paths.artifacts / "train" / "loss.csv").read_text().splitlines()
    assert header == "step,loss,lr,grad_norm,skipped,loss_t1,loss_t2,loss_t3,loss_t4"
    assert [row.split(",")[0] for row in rows] == ["2", "4"] and all(float(row.split(",")[3]) > 0 for row in rows)
