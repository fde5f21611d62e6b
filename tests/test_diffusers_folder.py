"""A folder of diffusers' is read as diffusers would, and where its files contradict each other, not at all."""

import json

import pytest
import torch
from tiny_foreign import network

from dit import interop
from dit.checkpoint import save_tensors
from dit.importing import Wanted, import_weights, read
from dit.vae import digest_of


def write_transformer(folder, ours, **config):
    """A DiTTransformer2DModel's folder, as `save_pretrained` leaves it."""
    folder.mkdir(exist_ok=True)
    save_tensors(folder / f"{interop.WEIGHTS}.safetensors", interop.to_diffusers(ours.state_dict(), ours.config.depth))
    told = {"_class_name": "DiTTransformer2DModel", "num_attention_heads": 2, "attention_head_dim": 16, "patch_size": 2}
    told |= {"num_layers": ours.config.depth, "sample_size": 8, "norm_type": "ada_norm_zero", "in_channels": 4}
    told["num_embeds_ada_norm"] = ours.num_classes
    (folder / "config.json").write_text(json.dumps({**told, **config}))


def write_pipeline(folder, **change):
    """A whole pipeline's folder; `change` is merged into its files: transformer, scheduler, vae, index."""
    folder.mkdir()
    write_transformer(folder / "transformer", network(), **change.get("transformer", {}))
    scheduler = {"_class_name": "DDIMScheduler", "beta_schedule": "linear", "prediction_type": "epsilon"}
    vae = {"block_out_channels": [8, 8], "latent_channels": 4, "scaling_factor": 0.5}
    for name, file, told in (("scheduler", "scheduler_config.json", scheduler), ("vae", "config.json", vae)):
        (folder / name).mkdir()
        (folder / name / file).write_text(json.dumps({**told, **change.get(name, {})}))
    save_tensors(folder / "vae" / f"{interop.WEIGHTS}.safetensors", {"x": torch.ones(1)})
    index = {"id2label": {"0": "cat", "1": "dog", "2": "eel"}, **change.get("index", {})}
    (folder / "model_index.json").write_text(json.dumps(index))


def test_a_folder_of_diffusers_follows_its_convention_unless_it_is_the_published_weights(tmp_path):
    for name, expected in {"mine": "diffusers", "DiT-XL-2-256": "published"}.items():
        write_transformer(tmp_path / name, network())
        found = read(tmp_path / name)
        assert found.timestep_embedding == expected and found.num_classes == 3 and found.input_size == 8
        said = import_weights(tmp_path / name, tmp_path / "out", Wanted())
        assert any(line.startswith(f"timestep embedding: {expected}, since") for line in said)
        assert any("norm_eps is 1e-05" in line for line in said)


def test_a_pickled_folder_and_a_sharded_one_hold_the_same(tmp_path):
    ours = network()
    write_transformer(tmp_path, ours)
    file = tmp_path / f"{interop.WEIGHTS}.safetensors"
    first = read(tmp_path).tensors
    theirs = interop.to_diffusers(ours.state_dict(), 2)
    file.unlink()
    torch.save(theirs, tmp_path / f"{interop.WEIGHTS}.bin")
    pickled = read(tmp_path).tensors
    names, where = sorted(theirs), {}
    for i, part in enumerate((names[::2], names[1::2])):
        save_tensors(tmp_path / f"part-{i}.safetensors", {name: theirs[name] for name in part})
        where |= dict.fromkeys(part, f"part-{i}.safetensors")
    (tmp_path / f"{interop.WEIGHTS}.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    sharded = read(tmp_path).tensors
    assert first.keys() == pickled.keys() == sharded.keys()
    assert all(torch.equal(first[k], pickled[k]) and torch.equal(first[k], sharded[k]) for k in first)


@pytest.mark.parametrize("class_name", ["DiTTransformer2DModel", "Transformer2DModel"])
def test_a_pipelines_folder_tells_everything(tmp_path, class_name):
    write_pipeline(
        tmp_path / "p", transformer={"_class_name": class_name}, scheduler={"prediction_type": "v_prediction"}
    )
    said = import_weights(tmp_path / "p", tmp_path / "out", Wanted())
    told = json.loads((tmp_path / "out" / "config.json").read_text())
    assert said[1] == "3 classes; 16 pixels; latents 8 x 8 x 4" and told["classes"] == ["cat", "dog", "eel"]
    assert told["objective"]["diffusion"]["prediction"] == "v" and told["license"] == "unknown"
    latents = {"digest": None, "autoencoder": digest_of(tmp_path / "p" / "vae"), "mean": [0.0] * 4, "std": [2.0] * 4}
    assert told["latents"] == latents


def test_an_autoencoder_without_weights_is_passed_over_with_its_settings(tmp_path):
    write_pipeline(tmp_path / "p")
    (tmp_path / "p" / "vae" / f"{interop.WEIGHTS}.safetensors").unlink()
    said = import_weights(tmp_path / "p", tmp_path / "out", Wanted())
    told = json.loads((tmp_path / "out" / "config.json").read_text())
    assert told["latents"]["std"] == [1 / 0.18215] * 4 and told["latents"]["autoencoder"] is None
    assert told["image_size"] == 64 and any("passed over, with its config.json" in line for line in said)


@pytest.mark.parametrize(
    "part,change,message",
    [
        ("transformer", {"num_layers": 1}, r"of 1 blocks, as its config.json says: transformer_blocks\.1\S+ is no part"),
        ("transformer", {"num_layers": 3}, r"of 3 blocks, as its config.json says: transformer_blocks\.2\S+ is missing"),
        ("transformer", {"num_layers": "2"}, "num_layers must be a whole number above 0, got '2'"),
        ("transformer", {"num_attention_heads": 4}, "num_attention_heads 4 x attention_head_dim 16 are not the 32"),
        ("transformer", {"num_attention_heads": 0}, "num_attention_heads must be a whole number above 0"),
        ("transformer", {"patch_size": 4}, "patch_size is 4 and must be 2: not what the tensors are"),
        ("transformer", {"num_embeds_ada_norm": 7}, "num_embeds_ada_norm is 7 and must be 3"),
        ("transformer", {"sample_size": [8, 8]}, "sample_size must be a whole number above 0"),
        ("transformer", {"sample_size": 5}, "sample_size 5 is no multiple of patch_size 2"),
        ("transformer", {"_class_name": "UNet2DModel"}, "_class_name must be one of DiTTransformer2DModel"),
        ("transformer", {"norm_type": "layer_norm"}, "norm_type is 'layer_norm' and must be 'ada_norm_zero'"),
        ("transformer", {"_dit": [1]}, "_dit must be an object"),
        ("transformer", {"_dit": {"num_classes": "3"}}, r"_dit\.num_classes must be a whole number"),
        ("transformer", {"_dit": {"num_classes": 2}}, r"id2label names 3 classes, .*_dit\.num_classes 2"),
        ("transformer", {"_dit": {"license": "a\nb"}}, r"_dit\.license must be a line of text"),
        ("transformer", {"_dit": {"timestep_embedding": "weird"}}, r"_dit\.timestep_embedding must be one of published"),
        ("index", {"id2label": {"0": "a", "2": "b"}}, "id2label must name the labels 0 to 1, each once"),
        ("index", {"id2label": ["a", "b"]}, "id2label must be an object"),
        ("index", {"id2label": {"0": 1, "1": 2, "2": 3}}, "id2label.0 must be a line of text, got 1"),
        ("scheduler", {"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr is True and must be False: a chain"),
        ("scheduler", {"trained_betas": [0.1]}, "trained_betas is .0.1. and must be None: a chain"),
        ("scheduler", {"beta_end": 0.012}, "beta_end is 0.012 and must be 0.02: a chain"),
        ("scheduler", {"beta_schedule": "scaled_linear"}, "beta_schedule must be one of linear"),
        ("scheduler", {"prediction_type": ["x"]}, "prediction_type must be a line of text"),
        ("vae", {"scaling_factor": 0}, "scaling_factor must be a number above 0, got 0"),
        ("vae", {"scaling_factor": None}, "scaling_factor must be a number above 0, got None"),
        ("vae", {"shift_factor": "x"}, "shift_factor must be a number, got 'x'"),
        ("vae", {"block_out_channels": None}, "block_out_channels must be a list with members"),
        ("vae", {"latent_channels": 8}, "latent_channels is 8, and the transformer takes 4"),
    ],
)  # fmt: skip
def test_files_that_contradict_the_tensors_or_have_other_types_are_one_line(tmp_path, part, change, message):
    write_pipeline(tmp_path / "p", **{part: change})
    with pytest.raises(ValueError, match=message) as caught:
        import_weights(tmp_path / "p", tmp_path / "out", Wanted())
    assert "\n" not in str(caught.value) and str(tmp_path / "p") in str(caught.value)
    assert [file.name for file in tmp_path.iterdir()] == ["p"]


def test_a_folder_that_lacks_something_is_one_line(tmp_path):
    with pytest.raises(
        ValueError, match="is no diffusers folder of a DiT: it holds no config.json, and no transformer/"
    ):
        read(tmp_path)
    write_transformer(tmp_path, network())
    file = tmp_path / f"{interop.WEIGHTS}.safetensors"
    for told in ("[]", '{"a": 1}'):
        index = tmp_path / f"{file.name}.index.json"
        index.write_text(f'{{"weight_map": {told}}}')
        with pytest.raises(ValueError, match=r"weight_map(\.a)? must be"):
            read(tmp_path)
    index.unlink()
    file.unlink()
    with pytest.raises(ValueError, match="holds no weights"):
        read(tmp_path)
