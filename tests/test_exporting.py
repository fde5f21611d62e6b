"""`dit export`: what diffusers draws from the folder, with none of our code, is what we draw."""

import json
import sys

import numpy as np
import pytest
import torch
from tiny_foreign import network, write_diffusion

from dit import denoising, sampling
from dit.checkpoint import load_checkpoint
from dit.diffusion import chain
from dit.exporting import export_diffusers, timestep_error
from dit.importing import Wanted, import_weights
from dit.objective import objective_from
from dit.vae import Autoencoder, import_diffusers

LABELS, STEPS, SCALE = [0, 1, 2, 1], 10, 2.5


@pytest.fixture
def pipeline(monkeypatch, tmp_path):
    """pipeline(folder) opens a folder with diffusers alone; code that comes with it is kept in a folder of the test."""
    import_diffusers()
    from diffusers import DiTPipeline
    from diffusers.utils import dynamic_modules_utils

    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))

    def open_folder(folder, **trust):
        opened = DiTPipeline.from_pretrained(folder, low_cpu_mem_usage=False, local_files_only=True, **trust)
        opened.set_progress_bar_config(disable=True)
        return opened

    return open_folder


def drawn_by_diffusers(opened):
    images = opened(
        LABELS, guidance_scale=SCALE, num_inference_steps=STEPS, generator=torch.manual_seed(5), output_type="np"
    ).images
    return (images * 255).round().astype(int)


def drawn_by_us(artifacts):
    """The same pictures by our own code: DDIM, our spacing `stride`, guidance on all channels."""
    checkpoint, autoencoder = load_checkpoint(artifacts / "ema"), Autoencoder.load(artifacts / "vae")
    model = checkpoint.model
    noise = torch.randn(len(LABELS), 4, model.input_size, model.input_size, generator=torch.manual_seed(5))
    steps = chain(objective_from(checkpoint.config["objective"]).diffusion, f"ddim{STEPS}")
    y = torch.tensor(LABELS)
    with torch.no_grad():
        latents = denoising.ddim(sampling.guided(model, y, model.null(len(y)), SCALE), noise, steps)
    shift, scale = (torch.tensor(checkpoint.config["latents"][k]).view(1, -1, 1, 1) for k in ("mean", "std"))
    return autoencoder.decode(latents * scale + shift).numpy().astype(int)


def most_apart(artifacts, opened):
    ours, theirs = drawn_by_us(artifacts), drawn_by_diffusers(opened)
    assert ours.std() > 10, "pictures of one grey would prove nothing"
    return np.abs(ours - theirs).max()


CHANNELWISE = {"mean": [0.5, -1.0, 0.0, 0.2], "std": [3.0, 2.0, 4.0, 1.0]}


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"latents": CHANNELWISE, "learn_sigma": False, "objective": {"variance": "fixed_small"}},
        {"objective": {"schedule": "cosine", "prediction": "v"}},
        {"objective": {"prediction": "x"}, "patch_size": 4},
    ],
    ids=["epsilon", "scaled by channel", "cosine, v", "x"],
)
def test_diffusers_alone_draws_the_same_pictures(tmp_path, pipeline, change):
    write_diffusion(tmp_path, timestep_embedding="diffusers", **change)
    said = export_diffusers(tmp_path / "ema", tmp_path / "vae", tmp_path / "out")
    assert said == [f"open it with DiTPipeline.from_pretrained('{tmp_path}/out')"]
    opened = pipeline(tmp_path / "out")
    assert opened.labels == {"zero": 0, "one": 1, "two": 2} and type(opened).__module__.startswith("diffusers.")
    assert most_apart(tmp_path, opened) <= 2


def test_with_code_the_published_frequencies_are_exact_and_without_it_the_warning_is_true(tmp_path, pipeline):
    model = write_diffusion(tmp_path)
    said = export_diffusers(tmp_path / "ema", tmp_path / "vae", tmp_path / "exact", with_code=True)
    assert said == [f"open it with DiTPipeline.from_pretrained('{tmp_path}/exact', trust_remote_code=True)"]
    assert most_apart(tmp_path, pipeline(tmp_path / "exact", trust_remote_code=True)) <= 2
    with pytest.raises(ValueError, match="trust_remote_code"):
        pipeline(tmp_path / "exact")

    said = export_diffusers(tmp_path / "ema", tmp_path / "vae", tmp_path / "near")
    worst, rms = timestep_error(model)
    assert (
        f"off by {rms:.2%} (rms; at most {worst:.2%}" in said[0] and 0.001 < rms and "--with-code is exact" in said[0]
    )
    assert said[0] in (tmp_path / "near" / "README.md").read_text()
    stock = pipeline(tmp_path / "near").transformer
    x, t = torch.randn(6, 4, 8, 8, generator=torch.manual_seed(0)), torch.tensor([0, 100, 250, 500, 750, 999])
    with torch.no_grad():
        error = stock(x, timestep=t, class_labels=t % 3).sample - model(x, t, t % 3)
    assert 0.3 * worst < error.abs().max() / model(x, t, t % 3).abs().max() < 3 * worst


def test_a_model_goes_there_and_back_unchanged(tmp_path):
    for convention, license in (("published", "CC0-1.0"), ("diffusers", None)):
        model = write_diffusion(tmp_path, timestep_embedding=convention)
        file = tmp_path / "ema" / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "license": license, "weights": "raw"}))
        export_diffusers(tmp_path / "ema", tmp_path / "vae", tmp_path / "out")
        said = import_weights(tmp_path / "out", tmp_path / "back", Wanted())
        before, back = load_checkpoint(tmp_path / "ema"), load_checkpoint(tmp_path / "back")
        assert back.config["model"] == before.config["model"]
        for key in ("classes", "image_size", "license", "weights"):
            assert back.config[key] == before.config[key], key
        assert back.config["latents"]["std"] == pytest.approx(before.config["latents"]["std"])
        assert back.config["latents"]["autoencoder"] == Autoencoder.load(tmp_path / "out" / "vae").digest
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), back.model.parameters(), strict=True))
        assert any(f"timestep embedding: {convention}, since the export says so" in line for line in said)
    assert "licence none (its trainer's own, as the export says)" in said


def test_the_licence_travels(tmp_path):
    write_diffusion(tmp_path, timestep_embedding="diffusers")
    file = tmp_path / "ema" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "license": "CC-BY-NC-4.0"}))
    export_diffusers(tmp_path / "ema", tmp_path / "vae", tmp_path / "out")
    assert "\nlicense: cc-by-nc-4.0\n" in (tmp_path / "out" / "README.md").read_text()
    assert json.loads((tmp_path / "out" / "model_index.json").read_text())["_license"] == "CC-BY-NC-4.0"
    (tmp_path / "out" / "transformer" / "config.json").write_text(  # as another tool may leave it
        (tmp_path / "out" / "transformer" / "config.json").read_text().replace('"_dit"', '"_gone"')
    )
    import_weights(tmp_path / "out", tmp_path / "back", Wanted())
    assert json.loads((tmp_path / "back" / "config.json").read_text())["license"] == "CC-BY-NC-4.0"


@pytest.mark.parametrize(
    "change,reason",
    [
        ({"mlp_ratio": 2.0}, "its mlp_ratio is 2, and diffusers fixes 4"),
        ({"block": "in_context"}, "its blocks are in_context, and diffusers has adaln_zero only"),
        ({"rotary": True, "qk_norm": True}, "model.rotary, model.qk_norm is none of diffusers' options"),
        ({"norm": "rms"}, "model.norm is none"),
        ({"condition": "none"}, "its condition is no class"),
    ],
)
def test_what_diffusers_has_no_words_for_is_refused_with_the_reason(tmp_path, change, reason):
    write_diffusion(tmp_path, **change)
    with pytest.raises(ValueError, match=reason) as caught:
        export_diffusers(tmp_path / "ema", tmp_path / "vae", tmp_path / "out")
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "change,message",
    [
        ({"latents": None}, "latents must be an object, got None"),
        ({"latents": {"mean": [0.0], "std": [1.0]}}, "classes or latents do not fit the network's tensors"),
        ({"latents": {"mean": [0.0] * 4, "std": [1.0, 0, 1, 1]}}, r"latents\.std\.1 must be a number above 0, got 0"),
        ({"classes": ["a"]}, "classes or latents do not fit"),
        ({"license": "mine\nx: y"}, "license must be a line of text"),
        ({"objective": {"name": "foo"}}, r"objective\.name must be one of diffusion, transport, got 'foo'"),
        ({"objective": {"name": "diffusion", "diffusion": {"foo": 1}}}, "objective is none that this code knows"),
    ],
)
def test_a_checkpoint_that_lacks_something_is_one_line(tmp_path, change, message):
    write_diffusion(tmp_path)
    file = tmp_path / "ema" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(ValueError, match=message) as caught:
        export_diffusers(tmp_path / "ema", tmp_path / "vae", tmp_path / "out")
    assert str(file) in str(caught.value) and "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_only_an_earlier_export_is_replaced(tmp_path):
    write_diffusion(tmp_path, timestep_embedding="diffusers")
    out, told = tmp_path / "out", tmp_path / "out" / "transformer" / "config.json"
    for _ in range(2):
        export_diffusers(tmp_path / "ema", tmp_path / "vae", out)
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds something else: choose another --output"):
        export_diffusers(tmp_path / "ema", tmp_path / "vae", out)
    (out / "notes.txt").unlink()
    told.write_text(told.read_text().replace('"_dit"', '"_gone"'))  # a pipeline's folder of somebody else
    with pytest.raises(ValueError, match="holds something else: choose another --output"):
        export_diffusers(tmp_path / "ema", tmp_path / "vae", out)


def test_transport_and_strange_autoencoders_are_refused_and_nothing_is_written(tmp_path):
    write_diffusion(tmp_path)
    file = tmp_path / "ema" / "config.json"
    told = json.loads(file.read_text())
    file.write_text(json.dumps({**told, "objective": {"name": "transport"}}))
    with pytest.raises(ValueError, match="its objective is transport, and DiTPipeline denoises a discrete chain"):
        export_diffusers(tmp_path / "ema", tmp_path / "vae", tmp_path / "out")
    file.write_text(json.dumps({**told, "latents": {**told["latents"], "autoencoder": "f" * 64}}))
    with pytest.raises(ValueError, match="is not the autoencoder that"):
        export_diffusers(tmp_path / "ema", tmp_path / "vae", tmp_path / "out")
    file.write_text(json.dumps({**told, "image_size": 64, "latents": {**told["latents"], "autoencoder": None}}))
    with pytest.raises(ValueError, match="is not the autoencoder that"):  # 2 pixels per latent, not 8
        export_diffusers(tmp_path / "ema", tmp_path / "vae", tmp_path / "out")
    vae = tmp_path / "vae" / "config.json"
    kept = vae.read_text()
    vae.write_text(json.dumps({**json.loads(kept), "block_out_channels": None}))
    with pytest.raises(ValueError, match="block_out_channels must be a list with members, got None"):
        export_diffusers(tmp_path / "ema", tmp_path / "vae", tmp_path / "out")
    vae.write_text(kept)
    with pytest.raises(ValueError, match="is not an autoencoder's folder"):
        export_diffusers(tmp_path / "ema", tmp_path / "nosuch", tmp_path / "out")
    assert sorted(f.name for f in tmp_path.iterdir()) == ["ema", "vae"]


def test_the_error_of_the_other_frequencies_is_zero_where_there_is_none():
    assert timestep_error(network(timestep_embedding="diffusers")) == (0, 0)
