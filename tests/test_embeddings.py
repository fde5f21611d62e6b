"""Where an image's features come from, and what is said where they do not."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from dit import embeddings
from dit.embeddings import mean_colours, open_features, read_header, require_all
from dit.paths import Paths

KEYS = ["a/1.png", "a/2.png", "b/1.png"]


def write(path, keys=KEYS, features=None, mirror=None):
    features = np.arange(30, dtype=np.float32).reshape(3, 2, 5) if features is None else features
    arrays = {"features": features} | ({} if mirror is None else {"features_mirror": mirror})
    if path.suffix.lower() == ".npz":
        with open(path, "wb") as file:
            np.savez(file, keys=np.array(keys), **arrays)
    else:
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        save_file(tensors, path, {"keys": json.dumps(keys)})
    return str(path)


@pytest.mark.parametrize("name", ["f.npz", "f.safetensors"])
def test_a_file_gives_each_key_its_own(tmp_path, name):
    features = open_features(write(tmp_path / name))
    got = features.of(["b/1.png", "a/1.png"], np.zeros((2, 8, 8, 3), np.uint8))
    assert got.dtype == torch.float16 and got.shape == (2, 2, 5) and features.of_mirror is None
    assert got[:, 0, 0].tolist() == [20.0, 0.0]
    assert features.digest_of(KEYS[:1]) == features.digest_of(KEYS[:1]) != features.digest_of(KEYS[1:2])
    require_all(features, KEYS)
    with pytest.raises(ValueError, match="has nothing for 2 images, the first is 'c/9.png'"):
        require_all(features, [*KEYS, "c/9.png", "c/8.png"])


@pytest.mark.parametrize("name", ["f.npz", "f.safetensors"])
def test_a_files_mirror_images_have_their_own(tmp_path, name):
    grid = np.arange(60, dtype=np.float32).reshape(3, 4, 5)
    flipped = np.ascontiguousarray(grid.reshape(3, 2, 2, 5)[:, :, ::-1].reshape(3, 4, 5))
    features = open_features(write(tmp_path / name, features=grid, mirror=flipped))
    got = features.of_mirror(["b/1.png", "a/1.png"], np.empty(0))
    assert got.dtype == torch.float16 and got.tolist() == flipped[[2, 0]].tolist()
    assert features.of(KEYS, np.empty(0)).tolist() == grid.tolist()
    assert read_header(str(tmp_path / name)) == (4, True)
    before = features.digest_of(KEYS)
    flipped[0] += 1
    assert open_features(write(tmp_path / name, features=grid, mirror=flipped)).digest_of(KEYS) != before
    with pytest.raises(
        ValueError, match=r"`features_mirror` of .* must have the shape of `features` \(3, 4, 5\), found"
    ):
        open_features(write(tmp_path / name, features=grid, mirror=flipped[:, :2].copy()))
    with pytest.raises(ValueError, match="`features_mirror` of .* holds NaN"):
        open_features(write(tmp_path / name, features=grid, mirror=np.full_like(grid, np.nan)))


@pytest.mark.parametrize("name", ["f.NPZ", "f.SafeTensors"])
def test_an_ending_in_capitals_is_the_same_ending(tmp_path, name):
    source = write(tmp_path / name, features=np.ones((3, 4), np.float32))
    assert open_features(source).of(KEYS, np.empty(0)).shape == (3, 1, 4) and read_header(source) == (1, False)


def test_small_numbers_and_zeros_beside_others_are_taken(tmp_path):
    features = open_features(write(tmp_path / "f.npz", features=np.array([[1.0, 1e-9], [0.0, 0.0], [1e-4, 0.0]])))
    assert features.of(KEYS, np.empty(0))[:, 0, 0].tolist() == pytest.approx([1.0, 0.0, 1e-4], rel=1e-3)


def test_a_header_tells_how_many_vectors_there_are_and_no_more_is_read(tmp_path, monkeypatch):
    files = [write(tmp_path / name) for name in ("f.npz", "f.safetensors")]
    monkeypatch.setattr(np, "load", lambda *_, **__: pytest.fail("the file was read"))
    assert [read_header(file) for file in files] == [(2, False)] * 2
    names = ("pixels-4x4", "pixels-4x4-tokens", "clip-vit-b-32")
    assert [read_header(name) for name in names] == [(1, True), (16, True), (1, True)]
    for file in files:
        Path(file).write_bytes(b"no such thing")
        with pytest.raises(ValueError, match="holds no `keys` and `features` that can be read .*: write it again"):
            read_header(file)


def test_a_file_that_cannot_be_opened_is_named_by_its_whole_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=rf"the file f.npz is not there \(looked at {tmp_path / 'f.npz'}\): make it"):
        open_features("f.npz")
    (tmp_path / "f.npz").mkdir()
    with pytest.raises(ValueError, match=f"{tmp_path / 'f.npz'} is a folder: name a .npz or .safetensors file"):
        open_features("f.npz")
    (tmp_path / "features").mkdir()
    with pytest.raises(ValueError, match="'features' is a folder, no file"):
        open_features("features")
    write(tmp_path / "g.npz")
    monkeypatch.setattr("os.access", lambda *_: False)  # as for a user who is not root
    with pytest.raises(ValueError, match=f"{tmp_path / 'g.npz'} may not be read by this user: chmod"):
        open_features("g.npz")


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
        (KEYS, np.full((3, 2), np.inf, np.float32), "not finite in float16"),
        (KEYS, np.array([[1, 2], [np.nan, 1], [3, 4]]), "holds NaN for 1 images, the first is 'a/2.png'"),
        (KEYS, np.full((3, 2), 1e-9), "holds vectors that are lost in float16 .*: scale them"),
        (KEYS, np.ones((3, 2), np.complex64), "holds complex numbers: store real ones"),
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
    assert ours.shape == (1, 1, 48) and ours.dtype == torch.float16
    mirrored = source.of_mirror(["x"], image).view(4, 4, 3)
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
    assert features.of(["x", "y"], image).tolist() == [[[0, 0, 0]], [[1, 2, 3]]]
    assert features.of_mirror(["x", "y"], image[:, :, ::-1]).tolist() == [[[0, 0, 0]], [[1, 2, 3]]]
    assert features.digest != open_features("pixels-4x4").digest


def test_a_relative_file_lies_where_paths_are_given_from(tmp_path, monkeypatch):
    write(tmp_path / "f.npz")
    given = Paths(tmp_path).given
    assert open_features("f.npz", given=given).source == "f.npz" and read_header("f.npz", given) == (2, False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"the file f.npz is not there .looked at {tmp_path}/elsewhere/f.npz"):
        open_features("f.npz", given=Paths(tmp_path / "elsewhere").given)
