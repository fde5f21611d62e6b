"""`dit import`: the same numbers come out of the same weights, and what had to be decided is said."""

import argparse
import json
from pathlib import Path

import pytest
import torch
from tiny_foreign import inputs, network
from tiny_model import write_model

from dit import cli
from dit.checkpoint import load_checkpoint, save_tensors
from dit.generation import generate
from dit.importing import Wanted, import_weights
from dit.setting import Setting
from dit.vae import Autoencoder


def bring(source, output, **wanted):
    said = import_weights(source, output, Wanted(**{"num_heads": 2} | wanted))
    return load_checkpoint(output), "\n".join(said)


def same_forward(ours, theirs):
    x, t, y = inputs(theirs)
    with torch.no_grad():
        return torch.equal(ours(x, t, y), theirs(x, t, y))


def test_a_published_state_dict_computes_what_the_published_code_did(tmp_path, golden):
    tensors, shape = golden("dit_forward_p2")
    state = {name.removeprefix("state."): value for name, value in tensors.items() if name.startswith("state.")}
    torch.save(state, tmp_path / "DiT-tiny-2.pt")
    made, said = bring(tmp_path / "DiT-tiny-2.pt", tmp_path / "out", num_heads=shape["num_heads"])
    with torch.no_grad():
        found = made.model(tensors["in.x"], tensors["in.t"], tensors["in.y"])
    torch.testing.assert_close(found, tensors["out.forward"], atol=2e-5, rtol=1e-5)
    told = made.config
    assert told["license"] == "CC-BY-NC-4.0" and "licence CC-BY-NC-4.0 (of the published DiT weights" in said
    assert told["objective"]["name"] == "diffusion" and told["classes"] == [str(i) for i in range(10)]
    assert told["latents"] == {"digest": None, "autoencoder": None, "mean": [0.0] * 4, "std": [1 / 0.18215] * 4}
    assert (
        told["image_size"] == 64 and told["source"]["file"] == "DiT-tiny-2.pt" and len(told["source"]["sha256"]) == 64
    )
    assert told["model"]["timestep_embedding"] == "published" and told["source"]["format"] == "published"


def test_a_training_checkpoint_gives_its_average_and_its_arguments(tmp_path):
    raw, average = network(num_classes=5), network(num_classes=5, seed=1)
    args = argparse.Namespace(model="SiT-S/2", num_classes=5, image_size=64, path_type="GVP", prediction="noise")
    args.loss_weight = "likelihood"
    wrapped = {f"module.{name}": tensor for name, tensor in average.state_dict().items()}
    optimizer = torch.optim.AdamW(network().requires_grad_(True).parameters())
    torch.save(
        {"model": raw.state_dict(), "ema": wrapped, "opt": optimizer.state_dict(), "args": args},
        tmp_path / "0000010.pt",
    )
    made, said = bring(tmp_path / "0000010.pt", tmp_path / "out")
    assert same_forward(made.model, average) and not same_forward(made.model, raw)
    told = made.config["objective"]
    assert told["name"] == "transport" and "transport objective" in said
    assert [told["transport"][k] for k in ("path", "prediction", "weighting")] == ["gvp", "noise", "likelihood"]
    assert made.config["license"] == "unknown" and "warning: SiT's repository says MIT" in said
    torch.save({"model": raw.state_dict(), "args": args}, tmp_path / "raw.pt")
    made, said = bring(tmp_path / "raw.pt", tmp_path / "raw", license="MIT")
    assert same_forward(made.model, raw) and made.config["weights"] == "raw" and made.config["license"] == "MIT"


def test_safetensors_and_half_precision_are_taken_and_heads_guessed_by_rule(tmp_path):
    ours = network(hidden_size=64, depth=1, num_heads=1)
    save_tensors(tmp_path / "my-dit.safetensors", {k: v.half() for k, v in ours.state_dict().items()})
    made, said = bring(tmp_path / "my-dit.safetensors", tmp_path / "out", num_heads=None)
    assert made.model.config.num_heads == 1 and "1 heads (a guess: 64 channels each; --num-heads" in said
    assert made.model.final_layer.linear.weight.dtype == torch.float32
    torch.save(network(hidden_size=384, depth=1, num_heads=6).state_dict(), tmp_path / "dit.pt")
    assert (
        "6 heads (as the published network of this width"
        in bring(tmp_path / "dit.pt", tmp_path / "o", num_heads=None)[1]
    )
    torch.save(network().state_dict(), tmp_path / "dit.pt")
    with pytest.raises(ValueError, match="32 channels are of no published network: say --num-heads"):
        bring(tmp_path / "dit.pt", tmp_path / "none", num_heads=None)


def test_another_number_of_classes_begins_the_label_table_anew_and_another_size_the_positions(tmp_path):
    theirs = network()
    torch.save(theirs.state_dict(), tmp_path / "DiT.pt")
    made, said = bring(tmp_path / "DiT.pt", tmp_path / "out", num_classes=7, image_size=128)
    assert "the label table begins anew: 7 classes, not the 3 of the weights" in said
    assert "7 classes; 128 pixels, trained at 64: its position table is computed anew" in said
    assert (made.model.num_classes, made.model.input_size, made.config["image_size"]) == (7, 16, 128)
    assert made.model.y_embedder.embedding_table.weight.std() < 0.05  # as at the start of a training
    for name, tensor in theirs.state_dict().items():
        if name not in ("pos_embed", "y_embedder.embedding_table.weight"):
            assert torch.equal(tensor, made.model.state_dict()[name]), name
    other = network(input_size=16, num_classes=7)
    assert torch.equal(made.model.pos_embed, other.pos_embed)


def test_a_table_without_a_null_row_gains_one(tmp_path):
    theirs = network()
    state = theirs.state_dict()
    state["y_embedder.embedding_table.weight"] = state["y_embedder.embedding_table.weight"][:3]
    torch.save({"ema": state, "args": argparse.Namespace(num_classes=3)}, tmp_path / "DiT.pt")
    for wanted in ({}, {"num_classes": 3}):
        made, said = bring(tmp_path / "DiT.pt", tmp_path / "out", **wanted)
        table = made.model.y_embedder.embedding_table.weight
        assert "no row for 'no class' there" in said and table.shape == (4, 32)
        assert torch.equal(table[:3], state["y_embedder.embedding_table.weight"])
        torch.testing.assert_close(table[3], table[:3].mean(0))


def test_a_table_without_a_null_row_is_known_by_its_own_arguments_alone(tmp_path):
    state = network().state_dict()  # four rows
    table = state["y_embedder.embedding_table.weight"]
    torch.save({"ema": state}, tmp_path / "DiT.pt")
    made, said = bring(tmp_path / "DiT.pt", tmp_path / "out", num_classes=4)
    assert "the label table begins anew: 4 classes, not the 3 of the weights" in said and "no row" not in said
    torch.save({"ema": state, "args": {"num_classes": 7}}, tmp_path / "DiT.pt")
    with pytest.raises(
        ValueError, match="7 classes, as it says, do not fit a label table of 4 rows: say --num-classes"
    ):
        bring(tmp_path / "DiT.pt", tmp_path / "out")
    made, said = bring(tmp_path / "DiT.pt", tmp_path / "out", num_classes=3)
    assert torch.equal(made.model.y_embedder.embedding_table.weight, table) and "\n3 classes; 64 pixels;" in said


def test_the_image_size_is_the_tables_the_arguments_or_said_to_be_assumed(tmp_path):
    state = network().state_dict()
    del state["pos_embed"]
    for args, wanted, told in (
        ({}, {}, "256 pixels are assumed, since nothing tells it (--image-size)"),
        ({}, {"image_size": 128}, "128 pixels;"),
        ({"image_size": 64}, {}, "64 pixels;"),
        ({"image_size": 64}, {"image_size": 32}, "32 pixels, trained at 64: its position table is computed anew"),
        ({"image_size": 64}, {"factor": 4}, "64 pixels; latents 16 x 16 x 4"),
    ):
        torch.save({"ema": state, "args": args}, tmp_path / "DiT.pt")
        made, said = bring(tmp_path / "DiT.pt", tmp_path / "out", **wanted)
        assert f"3 classes; {told}" in said and f"; {made.config['image_size']} pixels" in said
    torch.save({"ema": state, "args": {"image_size": 50}}, tmp_path / "DiT.pt")
    with pytest.raises(ValueError, match=r"DiT\.pt: args\.image_size 50 is no multiple of 8"):
        bring(tmp_path / "DiT.pt", tmp_path / "out")


@pytest.mark.parametrize("kind", [dict, argparse.Namespace])
def test_arguments_are_read_as_a_dict_or_a_namespace_and_refused_where_they_are_not_known(tmp_path, kind):
    def save(**args):
        torch.save({"ema": network().state_dict(), "args": kind(**args)}, tmp_path / "dit.pt")
        return bring(tmp_path / "dit.pt", tmp_path / "out")[0].config["objective"]

    told = save(model="SiT-XL/2", path_type="GVP", prediction="score", loss_weight=None)
    assert (
        told["name"] == "transport"
        and told["transport"]["path"] == "gvp"
        and told["transport"]["weighting"] == "uniform"
    )
    for args, message in (
        ({"path_type": "Weird"}, r"args\.path_type must be one of linear, gvp, vp, got 'weird'"),
        ({"path_type": "VP", "prediction": "x"}, r"args\.prediction must be one of velocity, score, noise, got 'x'"),
        ({"path_type": 3}, r"args\.path_type must be a line of text, got 3"),
        ({"image_size": "64"}, r"args\.image_size must be a whole number above 0, got '64'"),
    ):
        with pytest.raises(ValueError, match=r"dit\.pt: " + message):
            save(**args)


def test_the_published_tables_1001_rows_are_of_1000_classes_whatever_is_asked_for(tmp_path):
    torch.save(network(num_classes=1000).state_dict(), tmp_path / "DiT.pt")
    made, said = bring(tmp_path / "DiT.pt", tmp_path / "out", num_classes=1001)
    assert "the label table begins anew: 1001 classes, not the 1000 of the weights" in said
    assert made.model.y_embedder.embedding_table.weight.shape == (1002, 32) and "no row" not in said


@pytest.mark.parametrize(
    "spoil,message",
    [
        (lambda s: s.pop("blocks.1.attn.qkv.bias"), r"blocks\.1\.attn\.qkv\.bias is missing"),
        (lambda s: s.update({"projector.0.weight": torch.ones(2)}), r"projector\.0\.weight is in no DiT or SiT"),
        (lambda s: s.update({"blocks.0.attn.proj.bias": torch.ones(31)}), r"attn\.proj\.bias is 31 and must be 32"),
        (lambda s: s["blocks.0.attn.proj.bias"].fill_(float("nan")), r"attn\.proj\.bias holds numbers that are not finite"),
        (lambda s: s.update({"final_layer.linear.weight": torch.ones(5, 32)}), r"final_layer\.linear\.weight has 5 rows, not 16 or 32"),
        (lambda s: s.update({"pos_embed": torch.randn(1, 16, 32)}), "pos_embed is not the sine-cosine table"),
        (lambda s: s.update({"pos_embed": s["pos_embed"][:, :6]}), "pos_embed is 1 x 6 x 32, no square grid"),
        (lambda s: s.update({"pos_embed": s["pos_embed"][0]}), r"pos_embed is \(16, 32\), and must have 3 sides"),
        (lambda s: s.update({"x_embedder.proj.weight": torch.ones(32, 4, 2, 3)}), "patches of 2 x 3, 32 channels"),
        (lambda s: s.update({"blocks.99999.x": torch.ones(2)}), r"blocks\.2\.\S+ is missing|blocks.99999.x is in no DiT"),
        (lambda s: s.pop("y_embedder.embedding_table.weight"), r"y_embedder\.embedding_table\.weight is missing"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_one_line_and_nothing_is_written(tmp_path, spoil, message):
    state = {name: tensor.clone() for name, tensor in network().state_dict().items()}
    spoil(state)
    torch.save(state, tmp_path / "DiT.pt")
    with pytest.raises(ValueError, match=message) as caught:
        bring(tmp_path / "DiT.pt", tmp_path / "weights" / "out")
    assert "\n" not in str(caught.value) and [file.name for file in tmp_path.iterdir()] == ["DiT.pt"]


def test_what_cannot_be_known_is_asked_for_and_nothing_else_is_overwritten(tmp_path):
    torch.save(network().state_dict(), tmp_path / "model.pt")
    with pytest.raises(ValueError, match="does not tell whether it is a DiT or a SiT: say --objective"):
        bring(tmp_path / "model.pt", tmp_path / "out")
    with pytest.raises(ValueError, match="--image-size 50 is no multiple of 16"):
        bring(tmp_path / "model.pt", tmp_path / "out", objective="diffusion", image_size=50)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="holds something else: choose another --output"):
        bring(tmp_path / "model.pt", tmp_path / "mine", objective="diffusion")
    for _ in range(2):  # an earlier import is replaced
        bring(tmp_path / "model.pt", tmp_path / "out", objective="diffusion")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["mine", "model.pt", "out"]
    with pytest.raises(ValueError, match="is a checkpoint of ours already"):
        bring(tmp_path / "out", tmp_path / "again")


@pytest.mark.parametrize(
    "option,message",
    [
        ({"num_heads": 0}, "--num-heads must be a whole number above 0, got 0"),
        ({"num_heads": 3}, "32 channels cannot be 3 heads"),
        ({"image_size": -16}, "--image-size must be a whole number above 0, got -16"),
        ({"num_classes": 0}, "--num-classes must be a whole number above 0, got 0"),
        ({"factor": -8}, "--factor must be a whole number above 0, got -8"),
        ({"factor": 3}, "--factor must be a power of two"),
        ({"license": ""}, "--license must be a line of text, got ''"),
        ({"license": "mine\nx: y"}, "--license must be a line of text"),
    ],
)
def test_options_that_cannot_be_are_one_line(tmp_path, option, message):
    torch.save(network().state_dict(), tmp_path / "DiT.pt")
    with pytest.raises(ValueError, match=message) as caught:
        bring(tmp_path / "DiT.pt", tmp_path / "out", **option)
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_an_unfinished_import_leaves_nothing(tmp_path, monkeypatch):
    torch.save(network().state_dict(), tmp_path / "DiT.pt")

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dit.checkpoint.write_json", full_disk)
    with pytest.raises(OSError):
        bring(tmp_path / "DiT.pt", tmp_path / "out")
    assert [file.name for file in tmp_path.iterdir()] == ["DiT.pt"]


@pytest.mark.parametrize("name,sampler", [("DiT", "ddim"), ("SiT", "euler")])
def test_an_imported_folder_is_drawn_from(tmp_path, name, sampler):
    write_model(tmp_path)
    torch.save(network().state_dict(), tmp_path / f"{name}.pt")
    made, _ = bring(tmp_path / f"{name}.pt", tmp_path / "out", factor=2)
    setting = Setting("plain", 1.5, sampler, 2)
    images = generate(made, Autoencoder.load(tmp_path / "vae"), setting, torch.tensor([0, 1]), [0, 1], seed=0)
    assert images.shape == (2, made.config["image_size"], 16, 3) and images.float().std() > 0


def test_the_network_is_recorded_with_the_convention_it_was_trained_with(tmp_path):
    torch.save(network().state_dict(), tmp_path / "DiT.pt")
    made, _ = bring(tmp_path / "DiT.pt", tmp_path / "out", timestep_embedding="diffusers")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model"]["timestep_embedding"] == "diffusers"
    assert same_forward(made.model, network(timestep_embedding="diffusers"))


def test_the_command_says_what_it_did_or_one_line_of_what_is_wrong(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.save(network().state_dict(), "DiT-tiny.pt")
    assert cli.main(["import", "DiT-tiny.pt", "--num-heads", "2", "--license", "MIT"]) == 0
    said = capsys.readouterr().out
    assert said.startswith(
        "weights/DiT-tiny:\n2 blocks of 32 channels, patch 2, 2 heads (as said); diffusion objective\n"
    )
    assert load_checkpoint("weights/DiT-tiny").license == "MIT" and "licence MIT (as said)" in said
    torch.save(network(seed=1).state_dict(), "other.pt")
    Path("sub").mkdir()
    Path("other.pt").rename("sub/DiT-tiny.pt")
    again = ["import", "sub/DiT-tiny.pt", "--num-heads", "2"]
    assert cli.main(again) == 2  # of the same name, and another
    assert (
        capsys.readouterr().err
        == "dit: weights/DiT-tiny is of other weights (DiT-tiny.pt): say a place with --output\n"
    )
    for place, reason in {
        "artifacts/ema": "belongs to the pipeline",
        "DiT-tiny.pt/x": "is no folder",
        ".": "else",
    }.items():
        assert cli.main([*again, "--output", place]) == 2
        told = capsys.readouterr().err
        assert told.startswith(f"dit: {place} ") and reason in told and told.count("\n") == 1
    assert cli.main([*again, "--output", "weights/DiT-tiny"]) == 0 and capsys.readouterr().out
    with monkeypatch.context() as broken:
        broken.setattr("dit.checkpoint.save_tensors", lambda file, _: file.open("x").close() or file.open("x"))
        assert cli.main([*again, "--output", "new"]) == 2 and capsys.readouterr().err.endswith(": File exists\n")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["DiT-tiny.pt", "sub", "weights"]
    assert cli.main(["import", "nosuch.pt"]) == 2 and capsys.readouterr().err.count("\n") == 1
    export = ["export", "weights/DiT-tiny", "--format", "diffusers", "--output", "hf"]
    assert cli.main(export) == 2 and "is not an autoencoder's folder" in capsys.readouterr().err
