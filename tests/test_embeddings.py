"""Where an image's features come from, and what is said where they do not."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from dit import embeddings
from dit.embeddings import mean_colours, open_features, require_all

KEYS = ["a/1.png", "a/2.png", "b/1.png"]


def write(path, keys=KEYS, features=None):
    features = np.arange(30, dtype=np.float32).reshape(3, 2, 5) if features is None else features
    if path.suffix == ".npz":
        np.savez(path, keys=np.array(keys), features=features)
    else:
        save_file({"features": torch.from_numpy(features)}, path, {"keys": json.dumps(keys)})
    return str(path)


@pytest.mark.parametrize("name", ["f.npz", "f.safetensors"])
def test_a_file_gives_each_key_its_own(tmp_path, name):
    features = open_features(write(tmp_path / name))
    got = features.of(["b/1.png", "a/1.png"], np.zeros((2, 8, 8, 3), np.uint8))
    assert got.dtype == torch.float16 and got.shape == (2, 2, 5) and not features.sees_pixels
    assert got[:, 0, 0].tolist() == [20.0, 0.0]
    assert features.digest_of(KEYS[:1]) == features.digest_of(KEYS[:1]) != features.digest_of(KEYS[1:2])
    require_all(features, KEYS)
    with pytest.raises(ValueError, match="has nothing for 2 images, the first is 'c/9.png'"):
        require_all(features, [*KEYS, "c/9.png", "c/8.png"])


def test_a_vector_is_a_sequence_of_one(tmp_path):
    source = write(tmp_path / "f.npz", features=np.ones((3, 4), np.float64))
    assert open_features(source).of(KEYS, np.empty(0)).shape == (3, 1, 4)


@pytest.mark.parametrize("name", ["f.npz", "f.safetensors"])
@pytest.mark.parametrize(
    ("keys", "features", "said"),
    [
        (KEYS[:2], None, r"`features` of .* must be \(n, E\) or \(n, L, E\) for 2 keys, found \(3, 2, 5\)"),
        (KEYS[:1] * 3, None, "keys of .* must be texts, each of them once"),
        (KEYS, np.ones(3, np.float32), r"found \(3,\)"),
        (KEYS, np.full((3, 2), 1e6, np.float32), "not finite in float16"),
        (KEYS, np.full((3, 2), np.nan, np.float32), "not finite in float16"),
    ],
)
def test_a_file_that_cannot_be_right_is_refused(tmp_path, name, keys, features, said):
    with pytest.raises(ValueError, match=said) as caught:
        open_features(write(tmp_path / name, keys, features))
    assert str(caught.value).startswith("encode.features: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["f.npz", "f.safetensors"])
def test_a_file_that_is_none_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match="encode.features: the file .* is not there"):
        open_features(str(tmp_path / name))
    (tmp_path / name).write_bytes(b"no such thing")
    with pytest.raises(ValueError, match="holds no `keys` and `features` that can be read") as caught:
        open_features(str(tmp_path / name))
    assert "\n" not in str(caught.value)


def test_nothing_is_unpickled(tmp_path):
    np.savez(tmp_path / "f.npz", keys=np.array(KEYS, dtype=object), features=np.ones((3, 2), np.float32))
    with pytest.raises(ValueError, match="holds no `keys` and `features` that can be read"):
        open_features(str(tmp_path / "f.npz"))


def test_mean_colours_are_those_of_the_squares_row_by_row():
    image = np.zeros((1, 8, 8, 3), np.uint8)
    image[:, :4, 4:, 0] = 255  # upper right: red
    tokens = mean_colours(image, "pixels-2x2-tokens")
    assert tokens.shape == (1, 4, 3) and tokens[0, :, 0].tolist() == [-1, 1, -1, -1] and tokens[0, 1, 1] == -1
    assert torch.equal(mean_colours(image, "pixels-2x2"), tokens.flatten(1).unsqueeze(1))
    source = open_features("pixels-4x4")
    ours = source.of(["x"], image)
    assert ours.shape == (1, 1, 48) and ours.dtype == torch.float16 and source.sees_pixels
    mirrored = source.of(["x"], image[:, :, ::-1]).view(4, 4, 3)
    assert torch.equal(mirrored, ours.view(4, 4, 3).flip(1)) and not torch.equal(mirrored, ours.view(4, 4, 3))


@pytest.mark.parametrize("name", ["pixels-4x3", "dinov2", "features.csv"])
def test_a_name_of_nothing_lists_what_there_is(name):
    with pytest.raises(ValueError, match=f"'{name}' is no file .* use pixels-4x4 or one of .*clip-vit-b-32.*"):
        open_features(name)


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("clip-vit-b-32", "checkpoints/ViT-B-32.pt"),
        ("inception-v3-compat", "checkpoints/weights-inception-2015-12-05-6726825d.pth"),
        ("vgg16", "checkpoints/vgg16-397923af.pth"),
        ("dinov2-vit-s-14", "checkpoints/dinov2_vits14_pretrain.pth"),
    ],
)
def test_weights_that_are_not_here_are_named_and_not_fetched(tmp_path, monkeypatch, name, file):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *_, **__: pytest.fail("a download"))
    with pytest.raises(ValueError) as caught:
        open_features(name)
    assert str(caught.value).startswith(
        f"encode.features: {name} needs the file {tmp_path / file}: bring it from https"
    )
    if "dinov2" in name:
        return
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / file).write_bytes(b"half of it")
    with pytest.raises(ValueError, match="is not the file that https.* names"):
        open_features(name)


def test_any_extractor_of_torch_fidelity_serves(monkeypatch):
    assert embeddings.library_weights("clip-vit-b-16")  # makes the library importable
    from torch_fidelity.feature_extractor_base import FeatureExtractorBase
    from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

    class Corner(FeatureExtractorBase):
        def __init__(self, name, features_list, **_):
            super().__init__(name, features_list)

        @staticmethod
        def get_provided_features_list():
            return ("corner", "other")

        @staticmethod
        def get_default_feature_layer_for_metric(metric):
            return "corner"

        @staticmethod
        def can_be_compiled():
            return False

        def forward(self, images):
            assert images.dtype == torch.uint8
            return (images[:, :, 0, 0].float(),)

    monkeypatch.setitem(FEATURE_EXTRACTORS_REGISTRY, "corner", Corner)
    features = open_features("corner")
    image = np.zeros((2, 8, 8, 3), np.uint8)
    image[1, 0, 0] = (1, 2, 3)
    assert features.of(["x", "y"], image).tolist() == [[[0, 0, 0]], [[1, 2, 3]]] and features.sees_pixels
    assert features.digest != open_features("pixels-4x4").digest
