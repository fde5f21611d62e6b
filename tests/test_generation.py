import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_model import write_model

from dit.checkpoint import load_checkpoint
from dit.generation import SampleConfig, Setting, draw_labels, generate, generate_blocks, require_sampler
from dit.grids import grid, overview
from dit.vae import Autoencoder

EULER = Setting("plain", 1.0, "euler", 3)


@pytest.fixture(scope="module", params=["transport", "diffusion"])
def model(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    write_model(folder, objective=request.param)
    return load_checkpoint(folder / "ema"), Autoencoder.load(folder / "vae")


def setting(checkpoint, cfg_scale=1.5):
    name = {"transport": "heun", "diffusion": "ddpm"}[checkpoint.config["objective"]["name"]]
    return Setting("s", cfg_scale, name, 4)


def test_an_image_depends_on_seed_and_index_alone(model):
    checkpoint, autoencoder = model
    draw = lambda indices, seed=0: generate(  # noqa: E731
        checkpoint, autoencoder, setting(checkpoint), torch.tensor(indices) % 3, indices, seed=seed
    ).int()
    whole = draw(list(range(6)))
    assert whole.shape == (6, 16, 16, 3)
    for indices in ([5, 0], [3], [4, 2, 1]):
        assert (draw(indices) - whole[indices]).abs().max() <= 1
    assert (draw(list(range(6)), seed=1) - whole).abs().max() > 5


def test_blocks_are_bit_identical_however_they_are_spread(model):
    checkpoint, autoencoder = model
    config = SampleConfig(10, 0, "balanced", 4, (setting(checkpoint),))
    images, labels = generate_blocks(checkpoint, autoencoder, setting(checkpoint), config)
    assert images.shape == (10, 16, 16, 3) and labels.tolist() == [i % 3 for i in range(10)]
    second = generate(checkpoint, autoencoder, setting(checkpoint), torch.tensor(labels[4:8]), range(4, 8), seed=0)
    assert np.array_equal(images[4:8], second.numpy())


def test_kept_blocks_are_taken_and_give_the_same_images(model, tmp_path):
    checkpoint, autoencoder = model
    config = SampleConfig(10, 0, "balanced", 4, (setting(checkpoint),))
    whole, _ = generate_blocks(checkpoint, autoencoder, setting(checkpoint), config)

    class Stopped(Exception):
        pass

    def stop(count):
        raise Stopped

    with pytest.raises(Stopped):
        generate_blocks(checkpoint, autoencoder, setting(checkpoint), config, keep=tmp_path / "k", progress=stop)
    [kept] = (tmp_path / "k").iterdir()
    stamp = kept.stat().st_mtime_ns
    again, _ = generate_blocks(checkpoint, autoencoder, setting(checkpoint), config, keep=tmp_path / "k")
    assert np.array_equal(again, whole) and kept.stat().st_mtime_ns == stamp
    assert len(list((tmp_path / "k").iterdir())) == 3


def test_every_sampler_draws_something_finite(model):
    checkpoint, autoencoder = model
    for sampler in {"transport": ("euler", "heun"), "diffusion": ("ddpm", "ddim")}[
        checkpoint.config["objective"]["name"]
    ]:
        images = generate(checkpoint, autoencoder, Setting("s", 2.0, sampler, 5), torch.tensor([0, 1]), [0, 1], seed=0)
        assert images.dtype == torch.uint8 and images.float().std() > 0


def test_another_autoencoder_is_refused(model, tmp_path):
    checkpoint, _ = model
    write_model(tmp_path, seed=1)
    with pytest.raises(ValueError, match="the model's latents belong to another autoencoder"):
        generate(checkpoint, Autoencoder.load(tmp_path / "vae"), setting(checkpoint), torch.tensor([0]), [0], seed=0)


def test_settings_that_do_not_fit_the_model_are_refused():
    require_sampler(EULER, "transport", 10)
    with pytest.raises(ValueError, match="sampler 'euler' does not fit objective 'diffusion': use ddpm or ddim"):
        require_sampler(EULER, "diffusion", 10)
    with pytest.raises(ValueError, match="an unconditional model has nothing to guide"):
        require_sampler(Setting("s", 1.5, "euler", 3), "transport", 0)
    with pytest.raises(ValueError, match="num_steps must be 2 to 1000 for ddpm, got 1001"):
        require_sampler(Setting("s", 1.5, "ddpm", 1001), "diffusion", 3)
    with pytest.raises(ValueError, match="num_steps must be 2 to 1000 for ddim, got 1"):
        require_sampler(Setting("s", 1.0, "ddim", 1), "diffusion", 3)
    with pytest.raises(ValueError, match="name must be letters"):
        Setting("../x", 1.0, "euler", 3)
    with pytest.raises(ValueError, match="each with a name of its own"):
        SampleConfig(10, 0, "balanced", 4, (EULER, EULER))


def test_an_unconditional_model_draws(tmp_path):
    write_model(tmp_path, classes=[])
    checkpoint, autoencoder = load_checkpoint(tmp_path / "ema"), Autoencoder.load(tmp_path / "vae")
    config = SampleConfig(3, 0, "balanced", 2, (EULER,))
    images, labels = generate_blocks(checkpoint, autoencoder, EULER, config)
    assert len(images) == 3 and labels.tolist() == [0, 0, 0]


@settings(max_examples=20, deadline=None)
@given(classes=st.integers(1, 12), count=st.integers(1, 50), start=st.integers(0, 100))
def test_labels(classes, count, start):
    indices = range(start, start + count)
    balanced = draw_labels("balanced", classes, 0, indices)
    counts = np.bincount(balanced.numpy(), minlength=classes)
    assert counts.max() - counts.min() <= 1
    random = draw_labels("random", classes, 0, indices)
    assert random.min() >= 0 and random.max() < classes
    assert torch.equal(random[-1:], draw_labels("random", classes, 0, indices[-1:]))


def test_grids_show_every_image_in_its_place():
    images = np.arange(5, dtype=np.uint8).reshape(5, 1, 1, 1).repeat(2, 1).repeat(2, 2).repeat(3, 3)
    sheet = grid(images, 3)
    assert sheet.shape == (5, 8, 3) and sheet[0, 0, 0] == 0 and sheet[0, 3, 0] == 1 and sheet[3, 3, 0] == 4
    assert sheet[0, 2].tolist() == [255] * 3
    rows = overview(images, np.array([0, 1, 0, 1, 1]), per_class=2)
    assert rows[0, 0, 0] == 0 and rows[0, 3, 0] == 2 and rows[3, 0, 0] == 1 and rows[3, 3, 0] == 3
