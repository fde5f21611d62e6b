import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_model import write_model

from dit.checkpoint import Checkpoint, load_checkpoint
from dit.generation import draw_labels, evaluations, generate, generate_blocks, generate_latents
from dit.grids import grid, overview, shown
from dit.setting import SAMPLERS, SampleConfig, Setting
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


SDE_FORMS = ("constant", "sbdm", "sigma", "linear", "decreasing", "increasing_decreasing", "kl", "kl_eta")
WAYS = [
    *(Setting("s", 1.5, name, None if name == "dopri5" else 6) for names in SAMPLERS.values() for name in names),
    *(Setting("s", 1.5, "sde_euler", 6, diffusion_form=form, diffusion_norm=0.5) for form in SDE_FORMS),
    *(Setting("s", 1.5, name, 6, last_step=last) for name in ("sde_euler", "sde_heun") for last in ("none", "tweedie")),
    Setting("s", 1.5, "ddpm", 5, spacing="stride", clip=True),
    Setting("s", 1.5, "ddim", 6, eta=1.0),
    Setting("s", 1.5, "dpmpp", 6, cfg_interval=(0.2, 0.9), cfg_channels="first3"),
]
FITTING = {objective: [way for way in WAYS if way.sampler in names] for objective, names in SAMPLERS.items()}


def latents(checkpoint, setting, indices=(0, 1, 2), seed=0):
    wanted = torch.tensor(indices) % 3 if checkpoint.conditions is None else torch.tensor(indices)
    return generate_latents(checkpoint, setting, wanted, indices, seed=seed)


def test_every_way_to_draw_is_a_function_of_seed_and_index(model):
    checkpoint, _ = model
    seen = set()
    for way in FITTING[checkpoint.config["objective"]["name"]]:
        whole = latents(checkpoint, way)
        assert torch.isfinite(whole).all() and whole.std() > 0.1, way
        assert torch.equal(whole, latents(checkpoint, way)), way
        assert (whole - latents(checkpoint, way, seed=1)).abs().max() > 0.1, way
        if way.sampler != "dopri5":
            alone = latents(checkpoint, way, [2])
            torch.testing.assert_close(alone, whole[2:], rtol=1e-3, atol=1e-3 * float(whole.abs().max()))
        seen.add(round(float(whole.sum()), 3))
    # On the linear path the forms sigma and linear are the same, and sbdm and kl.
    doubles = {"transport": 2, "diffusion": 0}[checkpoint.config["objective"]["name"]]
    assert len(seen) == len(FITTING[checkpoint.config["objective"]["name"]]) - doubles


def test_dopri5_agrees_within_its_tolerances_whatever_it_is_drawn_with(model):
    checkpoint, _ = model
    if checkpoint.config["objective"]["name"] == "diffusion":
        pytest.skip("an ODE of transport")
    fine = Setting("s", 1.5, "dopri5", rtol=1e-5, atol=1e-5)
    assert (latents(checkpoint, fine)[2:] - latents(checkpoint, fine, [2])).abs().max() < 2e-3
    many = latents(checkpoint, Setting("s", 1.5, "heun", 200))
    assert (latents(checkpoint, fine) - many).abs().max() < 2e-3


def test_evaluations_are_counted_right(model):
    checkpoint, _ = model
    calls = []
    handle = checkpoint.model.register_forward_hook(lambda *_: calls.append(1))
    for way in FITTING[checkpoint.config["objective"]["name"]]:
        calls.clear()
        latents(checkpoint, way)
        assert calls and len(calls) == (evaluations(way) or len(calls)), way
        assert (evaluations(way) is None) == (way.sampler == "dopri5")
    handle.remove()


def test_no_step_asks_the_device_anything_or_mixes_devices(model):
    """On torch's `meta` device, which holds no numbers: a question to it is an error, as is another device's tensor."""
    checkpoint, _ = model
    elsewhere = Checkpoint(copy.deepcopy(checkpoint.model).to("meta"), checkpoint.config)
    for way in {(way.sampler, way.last_step): way for way in FITTING[checkpoint.config["objective"]["name"]]}.values():
        if way.sampler == "dopri5":
            continue  # its steps are as long as what it finds on the device
        for interval in ((0.0, 1.0), (0.2, 0.7)):
            drawn = latents(elsewhere, replace(way, cfg_interval=interval))
            assert drawn.device.type == "meta" and drawn.shape == (3, 4, 8, 8), way


def test_guidance_keeps_to_its_interval(model):
    checkpoint, _ = model
    sampler = {"transport": "euler", "diffusion": "ddim"}[checkpoint.config["objective"]["name"]]
    sizes = []
    handle = checkpoint.model.register_forward_pre_hook(lambda _, given: sizes.append(len(given[0])))
    latents(checkpoint, Setting("s", 1.5, sampler, 8, cfg_interval=(0.35, 0.65)))
    handle.remove()
    within = sizes.count(6)  # three steps of eight lie before 0.35, from noise, whichever way a sampler's time runs
    assert sizes == [3] * 3 + [6] * within + [3] * (5 - within) and 2 <= within <= 3


def test_guidance_keeps_to_its_channels(tmp_path):
    write_model(tmp_path)
    checkpoint = load_checkpoint(tmp_path / "ema")
    once = lambda scale, **told: latents(checkpoint, Setting("s", scale, "euler", 1, **told))  # noqa: E731
    plain, every, three = once(1.0), once(3.0), once(3.0, cfg_channels="first3")
    torch.testing.assert_close(three[:, :3], every[:, :3])
    torch.testing.assert_close(three[:, 3], plain[:, 3])
    assert (every[:, 3] - plain[:, 3]).abs().max() > 0.01


@pytest.mark.parametrize("path", ["linear", "gvp", "vp"])
@pytest.mark.parametrize("prediction", ["velocity", "score", "noise"])
def test_the_checkpoints_own_objective_decides(tmp_path, path, prediction):
    objective = {"name": "transport", "transport": {"path": path, "prediction": prediction}}
    write_model(tmp_path, objective=objective)
    checkpoint = load_checkpoint(tmp_path / "ema")
    plain = Checkpoint(checkpoint.model, {**checkpoint.config, "objective": {"name": "transport"}})
    for way in (Setting("s", 1.5, "heun", 5), Setting("s", 1.5, "sde_heun", 5)):
        drawn = latents(checkpoint, way)
        assert torch.isfinite(drawn).all(), way
        # Along a velocity the ODE is the same on every path from t = 0 to 1; its SDE needs the path's score.
        same = prediction == "velocity" and path in (("linear", "gvp") if way.sampler == "heun" else ("linear",))
        assert torch.equal(drawn, latents(plain, way)) == same


@pytest.mark.parametrize("changes", [{"schedule": "cosine"}, {"prediction": "v"}, {"variance": "fixed_small"}])
def test_a_diffusion_models_chain_is_the_one_it_was_trained_with(tmp_path, changes):
    write_model(tmp_path, objective={"name": "diffusion", "diffusion": changes})
    checkpoint = load_checkpoint(tmp_path / "ema")
    plain = Checkpoint(checkpoint.model, {**checkpoint.config, "objective": {"name": "diffusion"}})
    way = Setting("s", 1.0, "ddpm", 6)
    assert torch.isfinite(latents(checkpoint, way)).all()
    assert not torch.equal(latents(checkpoint, way), latents(plain, way))


def test_another_autoencoder_is_refused(model, tmp_path):
    checkpoint, _ = model
    write_model(tmp_path, seed=1)
    with pytest.raises(ValueError, match="the model's latents belong to another autoencoder"):
        generate(checkpoint, Autoencoder.load(tmp_path / "vae"), setting(checkpoint), torch.tensor([0]), [0], seed=0)


def test_a_setting_that_does_not_fit_the_model_is_refused(model):
    checkpoint, _ = model
    wrong = {"transport": "ddim", "diffusion": "euler"}[checkpoint.config["objective"]["name"]]
    with pytest.raises(ValueError, match=f"^sample.settings 's': sampler '{wrong}' does not fit objective"):
        latents(checkpoint, Setting("s", 1.5, wrong, 3))


def test_an_unconditional_model_draws(tmp_path):
    write_model(tmp_path, classes=[])
    checkpoint, autoencoder = load_checkpoint(tmp_path / "ema"), Autoencoder.load(tmp_path / "vae")
    config = SampleConfig(3, 0, "balanced", 2, (EULER,))
    images, labels = generate_blocks(checkpoint, autoencoder, EULER, config)
    assert len(images) == 3 and labels.tolist() == [-1, -1, -1]


def test_a_model_of_embeddings_draws_for_its_bank_and_for_any_others(tmp_path):
    write_model(tmp_path, condition_shape=(2, 5))
    checkpoint, autoencoder = load_checkpoint(tmp_path / "ema"), Autoencoder.load(tmp_path / "vae")
    bank, way = checkpoint.conditions, Setting("s", 2.0, "heun", 3)
    config = SampleConfig(10, 0, "balanced", 4, (way,))
    images, labels = generate_blocks(checkpoint, autoencoder, way, config)
    rows = torch.arange(10) % 7
    assert labels.tolist() == bank["label"][rows].tolist()
    itself = generate(checkpoint, autoencoder, way, bank["features"][rows[4:8]].float(), range(4, 8), seed=0)
    assert np.array_equal(itself.numpy(), images[4:8])
    same_noise = generate(checkpoint, autoencoder, way, torch.tensor([0, 1, 2, 3]), range(4, 8), seed=0)
    assert (same_noise.int() - images[4:8]).abs().max() > 2, "the embeddings say what is drawn"
    random, _ = generate_blocks(checkpoint, autoencoder, way, SampleConfig(10, 0, "random", 4, (way,)))
    assert not np.array_equal(random, images)


def test_a_model_of_embeddings_says_what_it_takes(tmp_path):
    write_model(tmp_path, condition_shape=(2, 5))
    checkpoint = load_checkpoint(tmp_path / "ema")
    draw = lambda wanted, of=checkpoint: generate_latents(of, EULER, wanted, range(len(wanted)), seed=0)  # noqa: E731
    with pytest.raises(ValueError, match=r"takes embeddings \(N, 2, 5\), and was given \(3, 2, 4\)"):
        draw(torch.zeros(3, 2, 4))
    with pytest.raises(ValueError, match="bank has 7 rows: ask for 0 to 6"):
        draw(torch.tensor([7]))
    without = Checkpoint(checkpoint.model, checkpoint.config)
    assert torch.equal(draw(torch.zeros(1, 2, 5), without), draw(torch.zeros(1, 2, 5)))
    with pytest.raises(ValueError, match="no conditions.safetensors to draw for"):
        draw(torch.tensor([0]), without)


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


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(-1, 4), min_size=1, max_size=60), st.integers(1, 3), st.integers(1, 4))
def test_the_few_that_a_grid_shows_give_the_same_grid(labels, num_classes, per_class):
    labels = np.array(labels)
    images = np.arange(len(labels), dtype=np.uint8).reshape(-1, 1, 1, 1).repeat(3, 3)
    few = shown(labels, num_classes, per_class)
    assert len(few) <= num_classes * per_class and np.all(np.diff(few) > 0)
    assert np.array_equal(
        overview(images[few], labels[few], num_classes, per_class), overview(images, labels, num_classes, per_class)
    )
