import json

import numpy as np
import pytest
import torch

from dit.paths import Paths
from dit.vae import CONFIG, WEIGHTS, Autoencoder, VaeConfig, digest_of, fetch, fit, psnr, to_images, to_pixels

SMALL = VaeConfig(pretrained=None, block_out_channels=(8, 8), max_steps=60, latent_channels=3)


@pytest.fixture(scope="module")
def images():
    """Blobs at random places: something that has to be encoded, and can be learned in seconds."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:16, 0:16]
    centres = rng.uniform(3, 13, (120, 2))
    blobs = np.exp(-((y - centres[:, :1, None]) ** 2 + (x - centres[:, 1:, None]) ** 2) / 8)
    return np.repeat((255 * blobs).astype(np.uint8)[..., None], 3, axis=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, images):
    folder = tmp_path_factory.mktemp("vae")
    fit(images, SMALL, torch.device("cpu")).save_pretrained(folder)
    return folder


def test_a_fitted_one_reconstructs_and_is_a_plain_diffusers_folder(folder, images):
    autoencoder = Autoencoder.load(folder)
    assert (autoencoder.channels, autoencoder.factor) == (3, 2)
    blank = psnr(np.full_like(images, int(images.mean())), images)
    assert psnr(autoencoder.reconstruct(images), images) > blank + 5
    from diffusers import AutoencoderKL

    theirs = AutoencoderKL.from_pretrained(folder, low_cpu_mem_usage=False).eval()
    pixels = to_pixels(images[:2])
    with torch.no_grad():
        mean, _ = autoencoder.moments(images[:2])
        torch.testing.assert_close(theirs.encode(pixels).latent_dist.mean, mean)
        assert torch.equal(to_images(theirs.decode(mean).sample), autoencoder.decode(mean))


def test_its_scaling_factor_brings_latents_to_unit_spread(folder, images):
    autoencoder = Autoencoder.load(folder)
    mean, std = autoencoder.moments(images)
    latents = (mean + std * torch.randn_like(mean)) * autoencoder.scaling_factor
    assert latents.std().item() == pytest.approx(1, rel=0.03)


def test_fitting_twice_gives_the_same_weights(tmp_path, images):
    config = VaeConfig(pretrained=None, block_out_channels=(8, 8), max_steps=3)
    digests = set()
    for name in "ab":
        torch.rand(3)
        fit(images, config, torch.device("cpu")).save_pretrained(tmp_path / name)
        digests.add(digest_of(tmp_path / name))
    assert len(digests) == 1


def test_identity_follows_weights_and_shape_and_not_the_librarys_notes(tmp_path, folder):
    fetch(str(folder), tmp_path)
    assert digest_of(tmp_path) == digest_of(folder)
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps({**config, "_diffusers_version": "9", "_name_or_path": "/x"}))
    assert digest_of(tmp_path) == digest_of(folder)
    (tmp_path / CONFIG).write_text(json.dumps({**config, "scaling_factor": 7.0}))
    assert digest_of(tmp_path) != digest_of(folder)


def test_a_pipelines_folder_and_any_channel_count_are_taken(tmp_path, folder):
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "vae").symlink_to(folder)
    (tmp_path / "copy").mkdir()
    fetch(str(tmp_path / "pipeline"), tmp_path / "copy")
    assert Autoencoder.load(tmp_path / "copy").channels == 3


def test_what_cannot_be_had_says_which_file_to_bring(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(ValueError) as caught:
        fetch("stabilityai/no-such-autoencoder", tmp_path)
    message = str(caught.value)
    assert message.startswith("vae.pretrained: 'stabilityai/no-such-autoencoder' is not a folder")
    assert f"bring {CONFIG} and {WEIGHTS} of https://huggingface.co/stabilityai/no-such-autoencoder" in message
    assert "\n" not in message
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="has no config.json"):
        fetch(str(tmp_path / "empty"), tmp_path)
    with pytest.raises(ValueError, match="is not an autoencoder's folder: config.json is missing"):
        Autoencoder.load(tmp_path / "empty")


def test_pixels_round_trip_and_are_truncated_as_the_field_does():
    images = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)
    assert np.array_equal(to_images(to_pixels(images)).numpy(), images)
    values = torch.tensor([-2.0, -1.0, 0.0, 0.999, 1.0, 2.0]).view(1, 1, 1, 6)
    assert to_images(values).flatten().tolist() == [0, 0, 128, 255, 255, 255]


def test_psnr_equals_its_definition():
    a = np.zeros((2, 4, 4, 3), np.uint8)
    assert psnr(a, a + 16) == pytest.approx(20 * np.log10(255 / 16)) and psnr(a, a) == float("inf")


@pytest.mark.parametrize(
    "change,message",
    [({"block_out_channels": (8, 12)}, "block_out_channels must be multiples"), ({"lr": 0}, "lr must be above 0")],
)
def test_bad_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        VaeConfig(**{"pretrained": None, **change})


def test_a_relative_folder_lies_where_paths_are_given_from(tmp_path, folder, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "weights").symlink_to(folder.parent)
    fetch(f"weights/{folder.name}", tmp_path, Paths(tmp_path).given)
    assert digest_of(tmp_path) == digest_of(folder)
    with pytest.raises(ValueError, match="the folder .*/gone is not there"):
        fetch("./gone", tmp_path, Paths(tmp_path).given)
