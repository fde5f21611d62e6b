"""References of every form: what is read is what was written, and what is damaged is refused in one line."""

import hashlib
import json
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit.extractors import Extractor, open_extractor
from dit.imagesets import from_array, open_images
from dit.parallel import World
from dit.references import (
    build_reference,
    read_reference,
    real_features,
    reference_form,
    require_match,
    save_reference,
)


def colours(images):
    """Two layers of few numbers: the mean colour, and each quarter's brightness with logits of two classes."""
    x = images.float() / 255
    quarters = torch.nn.functional.adaptive_avg_pool2d(x.mean(dim=1, keepdim=True), 2).flatten(1)
    return {"pooled": x.mean(dim=(2, 3)), "spatial": quarters, "logits": 5 * quarters[:, :2]}


def tiny(name="colours", digest="0" * 64):
    widths = {"pooled": 3, "spatial": 4, "logits": 2}
    return Extractor(
        name, digest, "none", widths, {"": "pooled"}, "pooled", ("", "pooled"), colours, "spatial", "logits"
    )


def pictures(count=40, side=8, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3)).astype(np.uint8)


def moments_of(images):
    """By NumPy, which shares no code with ours."""
    features = colours(torch.from_numpy(images).permute(0, 3, 1, 2))
    return {
        layer: (x.double().mean(0).numpy(), np.cov(x.double().numpy(), rowvar=False)) for layer, x in features.items()
    }


def statistics_file(path, images, *, spatial=True, arr_0=True, **changes):
    """`arr_0` may be other images than those that the statistics are of."""
    found = moments_of(images)
    arrays = dict(zip(("mu", "sigma"), found["pooled"], strict=True))
    arrays |= dict(zip(("mu_s", "sigma_s"), found["spatial"], strict=True)) if spatial else {}
    if arr_0 is not False:
        arrays["arr_0"] = images if arr_0 is True else arr_0
    np.savez(path, **{name: array for name, array in (arrays | changes).items() if array is not None})
    return path


def same(moments, expected):
    for layer, (mean, covariance) in moments.items():
        np.testing.assert_allclose(mean, expected[layer][0], rtol=1e-6)
        np.testing.assert_allclose(covariance, expected[layer][1], rtol=1e-4, atol=1e-9)
        assert mean.dtype == covariance.dtype == torch.float64
    return set(moments)


def test_a_reference_made_of_images_survives_its_file(tmp_path):
    images, labels = pictures(), np.arange(40) % 7
    made = build_reference(from_array(images, labels), tiny(), tmp_path / "features", most=10)
    assert same(made.moments, moments_of(images)) == {"pooled", "spatial"}
    assert (made.form, made.extractor, made.count, made.image_size, made.num_classes) == ("images", "colours", 40, 8, 7)
    assert made.labels.tolist() == labels[::4].tolist() and len(made.features["pooled"]) == 10

    save_reference(made, tmp_path / "kept")
    read = read_reference(tmp_path / "kept")
    assert reference_form(tmp_path / "kept") == "ours" and sorted(p.name for p in tmp_path.iterdir()) == [
        "features",
        "kept",
    ]
    for name in ("form", "extractor", "extractor_digest", "digest", "count", "image_size", "num_classes", "resize"):
        assert getattr(read, name) == getattr(made, name), name
    for layer, pair in made.moments.items():
        assert all(torch.equal(a, b) for a, b in zip(read.moments[layer], pair, strict=True))
    assert set(read.features) == {"pooled"} and torch.equal(read.features["pooled"], made.features["pooled"])
    assert torch.equal(read.labels, made.labels)
    assert real_features(read, tiny(), tmp_path / "unused") is read.features and not (tmp_path / "unused").exists()
    with pytest.raises(ValueError, match="kept is there already"):
        save_reference(made, tmp_path / "kept")


def test_a_disk_that_fills_up_leaves_no_half_reference(tmp_path, monkeypatch):
    from safetensors import SafetensorError

    def full(*_):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    made = build_reference(from_array(pictures()), tiny(), tmp_path / "features")
    monkeypatch.setattr("dit.references.save_tensors", full)
    with pytest.raises(ValueError, match="kept cannot be written .*No space left"):
        save_reference(made, tmp_path / "kept")
    assert not (tmp_path / "kept").exists()


def test_the_digest_names_images_and_extractor(tmp_path):
    def digest(images, extractor):
        return build_reference(from_array(images), extractor, tmp_path).digest

    same_again, other = digest(pictures(), tiny()), digest(pictures(seed=1), tiny())
    assert digest(pictures(), tiny()) == same_again != other != digest(pictures(), tiny(digest="1" * 64)) != same_again


def test_adms_batch_gives_statistics_at_once_and_features_when_asked(tmp_path):
    statistics_of, images = pictures(60, seed=1), pictures(12)
    path = statistics_file(tmp_path / "adm.npz", statistics_of, arr_0=images)
    read = read_reference(path, tiny())
    assert same(read.moments, moments_of(statistics_of)) == {"pooled", "spatial"}
    assert (read.form, read.count, read.image_size, len(read.features)) == ("adm", None, 8, 0)
    assert read.digest == hashlib.sha256(path.read_bytes()).hexdigest()
    features = real_features(read, tiny(), tmp_path / "scratch")
    expected = colours(torch.from_numpy(images).permute(0, 3, 1, 2))["pooled"]
    torch.testing.assert_close(features["pooled"], expected)
    save_reference(replace(read, features=features), tmp_path / "kept")
    again = read_reference(tmp_path / "kept")
    assert again.form == "adm" and again.digest == read.digest and again.image_size == 8
    assert torch.equal(again.features["pooled"], features["pooled"])


def test_the_main_process_decides_whether_anything_is_extracted(tmp_path, monkeypatch):
    read = read_reference(statistics_file(tmp_path / "adm.npz", pictures()), tiny())
    told = []

    class Other(World):
        def share(self, mine):
            told.append(mine)
            return True  # the main process has the features

    monkeypatch.setattr("dit.references.world", lambda: Other(1, 2))
    assert real_features(read, tiny(), tmp_path / "scratch") == {} and told == [False]


def test_real_features_lie_apart_from_others_of_the_same_layer(tmp_path):
    from dit.features import collect

    generated = collect(tiny(), from_array(pictures(20, seed=3)), keep={"pooled": None}, folder=tmp_path)
    before = generated.kept["pooled"].clone()
    read = read_reference(statistics_file(tmp_path / "adm.npz", pictures()), tiny())
    real_features(read, tiny(), tmp_path)
    assert torch.equal(generated.kept["pooled"], before)


def test_statistics_files_of_pytorch_fid_and_torch_fidelity(tmp_path):
    images = pictures()
    npz = statistics_file(tmp_path / "stats.npz", images, spatial=False, arr_0=False)
    mean, covariance = moments_of(images)["pooled"]
    cached = tmp_path / "cifar10-colours-stat-fid-pooled.pt"
    torch.save({"mu": mean, "sigma": covariance}, cached)
    for path in (npz, cached):
        read = read_reference(path, tiny())
        assert same(read.moments, {"pooled": (mean, covariance)}) == {"pooled"}
        assert (read.form, read.count, read.image_size, read.images) == ("statistics", None, None, None)
        assert real_features(read, tiny(), tmp_path) == {}
    as_float32 = statistics_file(tmp_path / "float32.npz", images, mu=mean.astype(np.float32), arr_0=False)
    assert read_reference(as_float32, tiny()).moments["pooled"][0].dtype == torch.float64


def test_torch_fidelitys_own_cache_is_read(tmp_path):
    from dit import torchvision_cpu

    torchvision_cpu.prepare()
    from torch_fidelity.metric_fid import fid_features_to_statistics
    from torch_fidelity.utils import cache_lookup_one_recompute_on_miss

    features = torch.randn(50, 2048, generator=torch.manual_seed(0))
    name = "mine-inception-v3-compat-stat-fid-2048"
    told = cache_lookup_one_recompute_on_miss(
        name, lambda: fid_features_to_statistics(features), cache=True, cache_root=str(tmp_path), verbose=False
    )
    read = read_reference(tmp_path / f"{name}.pt")
    assert read.extractor == "inception" and set(read.moments) == {"pooled"}
    np.testing.assert_array_equal(read.moments["pooled"][0], told["mu"].astype(np.float64))
    np.testing.assert_array_equal(read.moments["pooled"][1], told["sigma"].astype(np.float64))
    (tmp_path / f"{name}.pt").rename(tmp_path / "mine-inception-v3-compat-stat-fid-768.pt")
    with pytest.raises(ValueError, match="by its name these are not the statistics of inception's features"):
        read_reference(tmp_path / "mine-inception-v3-compat-stat-fid-768.pt")


def test_a_pickle_that_runs_a_program_is_not_unpickled(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "it ran"), "w"))

    torch.save({"mu": Bomb(), "sigma": 0}, tmp_path / "bomb.pt")
    with pytest.raises(ValueError, match=r"bomb.pt is damaged, or holds no statistics .*") as refused:
        read_reference(tmp_path / "bomb.pt", tiny())
    assert "\n" not in str(refused.value) and not (tmp_path / "it ran").exists()


NAN = np.array([0.1, np.nan, 0.2])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sigma": None}, "lacks sigma: a reference holds mu and sigma"),
        ({"mu": None}, "lacks mu"),
        ({"mu_s": None}, "lacks mu_s"),
        ({"sigma": np.eye(3)[:2]}, r"are \(3,\) and \(2, 3\), they must be \(D,\) and \(D, D\)"),
        ({"sigma": np.eye(4)}, r"are \(3,\) and \(4, 4\)"),
        ({"mu": np.zeros(7), "sigma": np.eye(7)}, "have 7 dimensions, colours's features .pooled. 3"),
        ({"mu_s": np.zeros(7), "sigma_s": np.eye(7)}, "have 7 dimensions, colours's features .spatial. 4"),
        ({"mu": NAN}, "not finite"),
        ({"sigma": np.triu(np.ones((3, 3)))}, "not symmetric"),
        ({"sigma": -np.eye(3)}, "negative on the diagonal"),
        ({"mu": np.zeros(3, np.int64)}, r"mu is int64 \(3,\), not the statistics"),
        ({"mu": np.array([{}, 1, 2], object)}, "mu is object"),
        ({"sigma": np.zeros((1, 20_000))}, "not the statistics of features"),
    ],
)
def test_damaged_statistics_are_refused_in_one_line(tmp_path, changes, message):
    path = statistics_file(tmp_path / "stats.npz", pictures(), arr_0=False, **changes)
    with pytest.raises(ValueError, match=message) as refused:
        read_reference(path, tiny())
    assert str(path) in str(refused.value) and "\n" not in str(refused.value)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1_000_000), st.sampled_from(["npz", "pt", "safetensors"]))
def test_a_truncated_file_is_refused_with_its_name(tmp_path_factory, cut, kind):
    folder = tmp_path_factory.mktemp("torn")
    if kind == "safetensors":
        save_reference(build_reference(from_array(pictures(8)), tiny(), folder / "scratch"), folder / "reference")
        path, named = folder / "reference" / "features.safetensors", folder / "reference"
    else:
        path = named = folder / f"reference.{kind}"
        mean, covariance = moments_of(pictures())["pooled"]
        (
            np.savez(path, mu=mean, sigma=covariance)
            if kind == "npz"
            else torch.save({"mu": mean, "sigma": covariance}, path)
        )
    whole = path.read_bytes()
    path.write_bytes(whole[: cut % len(whole)])
    with pytest.raises(ValueError, match="damaged|torn|missing") as refused:
        read_reference(named, tiny())
    assert str(path) in str(refused.value) and "\n" not in str(refused.value)


def test_a_header_that_asks_for_more_than_there_is_allocates_nothing(tmp_path):
    def header(shape):
        content = repr({"descr": "<f8", "fortran_order": False, "shape": shape}).encode()
        return b"\x93NUMPY\x01\x00" + len(content).to_bytes(2, "little") + content

    with zipfile.ZipFile(tmp_path / "bomb.npz", "w") as archive:
        archive.writestr("mu.npy", header((16_000,)))
        archive.writestr("sigma.npy", header((16_000, 16_000)))
    with pytest.raises(ValueError, match="torn or forged"):
        read_reference(tmp_path / "bomb.npz")


def test_forms_are_told_apart_by_what_is_there(tmp_path):
    np.savez(tmp_path / "images.npz", arr_0=pictures(3))
    torch.save({}, tmp_path / "x.pt")
    assert reference_form(tmp_path / "images.npz") == "images" == reference_form(tmp_path)
    assert reference_form(statistics_file(tmp_path / "a.npz", pictures())) == "adm"
    assert reference_form(statistics_file(tmp_path / "b.npz", pictures(), arr_0=False)) == "statistics"
    assert reference_form(tmp_path / "x.pt") == "statistics"
    with pytest.raises(ValueError, match="nowhere is not there"):
        reference_form(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="x.pt lacks mu and sigma"):
        read_reference(tmp_path / "x.pt")


@pytest.mark.parametrize("content", ["", "[]", "{", '{"extractor": "x"}'])
def test_a_torn_reference_json_is_refused(tmp_path, content):
    (tmp_path / "reference.json").write_text(content)
    with pytest.raises(ValueError, match="holds no reference .reference.json is missing or torn."):
        read_reference(tmp_path)


def test_a_reference_without_a_layers_covariance_is_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"pooled.mu": torch.zeros(3)}, tmp_path / "features.safetensors")
    (tmp_path / "reference.json").write_text(json.dumps({"extractor": "x", "digest": "y", "num_classes": 0}))
    with pytest.raises(ValueError, match="lacks means or covariances"):
        read_reference(tmp_path)


def test_what_does_not_match_is_refused(tmp_path):
    images = from_array(pictures(), name="mine.npz")
    reference = build_reference(images, tiny(), tmp_path)
    require_match(reference, tiny(), images)
    with pytest.raises(ValueError, match="features of colours, not of shapes"):
        require_match(reference, tiny("shapes"), images)
    with pytest.raises(ValueError, match=r"other weights of colours \(0{12}\) than are here \(1{12}\)"):
        require_match(reference, tiny(digest="1" * 64), images)
    with pytest.raises(ValueError, match="mine.npz holds images of 16 x 16 pixels, the reference of 8 x 8"):
        require_match(reference, tiny(), from_array(pictures(side=16), name="mine.npz"))
    with pytest.raises(ValueError, match=r"resized in another way \(bicubic\) than these would be \(none\)"):
        require_match(replace(reference, resize="bicubic"), tiny(), images)
    unknown_size = replace(reference, images=None, image_size=None)
    require_match(unknown_size, tiny(), from_array(pictures(side=16)))
    with pytest.raises(ValueError, match="needs at least 2 images, got 1"):
        build_reference(from_array(pictures(1)), tiny(), tmp_path)


def test_images_of_any_shape_have_a_reference(tmp_path):
    wide = from_array(pictures(side=8)[:, :4], name="wide")
    reference = build_reference(wide, tiny(), tmp_path)
    assert reference.image_size is None
    require_match(reference, tiny(), wide)
    with pytest.raises(ValueError, match="the reference of 4 x 8"):
        require_match(reference, tiny(), from_array(pictures()))


def test_the_fallback_without_weights_or_labels(tmp_path):
    np.savez(tmp_path / "real.npz", arr_0=pictures(6))
    random = open_extractor("random")
    made = build_reference(open_images(tmp_path / "real.npz"), random, tmp_path / "scratch")
    assert made.extractor == "random" and made.labels is None and made.num_classes == 0
    (mean, covariance) = made.moments["pooled"]
    assert len(mean) == random.widths["pooled"] and torch.isfinite(covariance).all()
