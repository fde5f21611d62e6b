import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_classifier import QUICK, bars

from dit import torchvision_cpu, weights
from dit.classifier import LAYERS, Classifier, extract, load_classifier, save_classifier
from dit.extractors import open_extractor, random_kernels, weights_file
from dit.features import collect
from dit.imagesets import from_array
from dit.inception import resized, spatial_features
from dit.metrics import frechet_distance

OFFICIAL = weights_file("inception")


def random_inception(seed=0):
    """torch-fidelity's network with random weights in the range of trained ones, as its own class builds it."""
    torchvision_cpu.prepare()
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    network = object.__new__(FeatureExtractorInceptionV3)
    load, FeatureExtractorInceptionV3.load_state_dict = FeatureExtractorInceptionV3.load_state_dict, lambda *_: None
    original, torch.load = torch.load, lambda *_, **__: {}
    try:
        network.__init__("inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path="none")
    finally:
        FeatureExtractorInceptionV3.load_state_dict, torch.load = load, original
    torch.manual_seed(seed)
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_uniform_(module.weight, nonlinearity="relu")
        if isinstance(module, torch.nn.BatchNorm2d):
            module.weight.uniform_(0.5, 1.5)
            module.bias.normal_(0, 0.1)
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return network


@pytest.fixture(scope="module")
def network():
    return random_inception()


@pytest.fixture(scope="module")
def file(network, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "random.pth"
    torch.save(network.state_dict(), path)
    return path


def registered_extractor(name, weights):
    """The classifier as torch-fidelity's feature extractor: uint8 (N, 3, S, S) -> features by layer.

    It is in torch-fidelity's registry from then on, so that `calculate_metrics(feature_extractor=name)` finds it too.
    """
    torchvision_cpu.prepare()
    from torch_fidelity.feature_extractor_base import FeatureExtractorBase
    from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY, register_feature_extractor
    from torch_fidelity.utils import create_feature_extractor

    class Registered(FeatureExtractorBase):
        def __init__(self, name, features_list, **_):
            super().__init__(name, features_list)
            self.classifier = load_classifier(weights)

        @staticmethod
        def get_provided_features_list():
            return LAYERS

        @staticmethod
        def get_default_feature_layer_for_metric(metric):
            return {"isc": "logits", "kid": "pooled"}.get(metric, "hidden")

        @staticmethod
        def can_be_compiled():
            return False

        def forward(self, images):
            features = self.classifier(images)
            return tuple(features[layer] for layer in self.features_list)

    FEATURE_EXTRACTORS_REGISTRY.pop(name, None)
    register_feature_extractor(name, Registered)
    extractor = create_feature_extractor(name, list(LAYERS), cuda=False, verbose=False)
    return lambda images: extractor.convert_features_tuple_to_dict(extractor(images))


def noise(count, side, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (count, 3, side, side)).astype(np.uint8))


def relative(a, b):
    return float((a - b).abs().max() / b.abs().max())


def test_inception_agrees_with_torch_fidelity(network, file):
    images = torch.cat([noise(2, 64), noise(1, 4).repeat_interleave(16, 2).repeat_interleave(16, 3)])
    seen = {}
    hook = network.Mixed_6d.branch1x1.register_forward_hook(lambda module, inputs, output: seen.update(block=output))
    with torch.no_grad():
        pooled, logits = network(images)
    hook.remove()
    extractor = open_extractor("inception", weights=file)
    ours = extractor(images)
    assert set(ours) == set(extractor.widths) and extractor.moments_of == ("pooled", "spatial")
    for layer, theirs in {
        "pooled": pooled,
        "logits": logits,
        "spatial": seen["block"][:, :7].permute(0, 2, 3, 1),
    }.items():
        assert ours[layer].shape == (3, extractor.widths[layer]) and ours[layer].dtype == torch.float32
        assert relative(ours[layer], theirs.flatten(1)) < 1e-5, layer
    assert not extractor.official and extractor.name == "inception_custom"


def test_features_of_an_image_do_not_depend_on_its_neighbours(file):
    extractor, images = open_extractor("inception", weights=file), noise(3, 32, seed=1)
    alone, together = extractor(images[2:]), extractor(images)
    assert all(relative(alone[layer][0], together[layer][2]) < 1e-5 for layer in together)


@pytest.mark.parametrize("height, width", [(4, 4), (32, 48), (299, 299), (320, 500), (1, 7)])
def test_the_resize_is_tensorflows(height, width):
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

    images = torch.randint(0, 256, (1, 3, height, width)).float()
    theirs = interpolate_bilinear_2d_like_tensorflow1x(images, size=(299, 299), align_corners=False)
    assert torch.equal(resized(images), theirs)


def test_the_resize_has_no_half_pixels():
    # Two pixels on four: places 0, 0.5, 1, 1.5, and nothing lies after the second pixel.
    assert resized(torch.tensor([[[[0.0, 8.0]]]]), 4)[0, 0, 0].tolist() == [0, 4, 8, 8]


def test_spatial_features_are_seven_channels_by_height_width_channel(file):
    x = torch.zeros(1, 9, 17, 17)
    x[0, 3, 2, 5], x[0, 6, 16, 16], x[0, 7, 0, 0] = 1, 2, 3
    flat = spatial_features(x)[0]
    assert flat.shape == (2023,) and flat.nonzero().flatten().tolist() == [(2 * 17 + 5) * 7 + 3, 2022]
    assert flat[2022] == 2


def hand_made(tensors):
    """Weights that pass an image's red on, from the middle of every kernel, times a factor that tells the place."""
    made = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        if name.endswith(".conv.weight"):
            made[name][:, 0, tensor.shape[2] // 2, tensor.shape[3] // 2] = 1
        if name.endswith("running_var"):
            made[name] += 1 - 1e-3  # with TensorFlow's epsilon 1
        if name.endswith("bn.weight"):
            made[name] += 1
            if name.startswith("Mixed_6"):  # the first channel of a block passes on, all others are marked
                made[name][1:] = 1000
    made["Mixed_6d.branch1x1.bn.weight"] = torch.arange(1.0, 193)
    return made


def test_the_spatial_features_of_a_network_made_by_hand(file, tmp_path):
    """By arithmetic: what stands at (h, w, channel) is the pixel that strides and windows lead to, times channel + 1.

    Maximum pools take the last of three on a ramp: 2 (2 (2 (2 h + 1) + 2 + 1) + 2) + 3 and so on, 16 h + 27.
    """
    torch.save(hand_made(torch.load(file, weights_only=True)), tmp_path / "made.pth")
    down, right = torch.arange(299)[:, None], torch.arange(299)
    red = 128 + (down + 2 * right) // 8
    images = torch.stack([red, torch.zeros_like(red), torch.zeros_like(red)])[None].to(torch.uint8)
    told = open_extractor("inception", weights=tmp_path / "made.pth")(images)["spatial"]
    place = 16 * torch.arange(17) + 27
    seen = (red[place][:, place] - 128) / 128
    by_hand = torch.tensor([float(seen[h, w]) * (c + 1) for h in range(17) for w in range(17) for c in range(7)])
    assert told.shape == (1, 2023) and torch.allclose(told[0], by_hand, rtol=1e-5)


def test_features_keep_all_digits_whatever_is_allowed_elsewhere():
    seen, extractor = [], open_extractor("random")
    watched = replace(
        extractor, network=lambda x: seen.append(torch.get_float32_matmul_precision()) or extractor.network(x)
    )
    torch.set_float32_matmul_precision("medium")
    try:
        watched(noise(1, 8))
        assert seen == ["highest"] and torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_the_spatial_layer_is_mixed_6d_branch_1x1(network, file, tmp_path):
    tensors = torch.load(file, weights_only=True)
    before = open_extractor("inception", weights=file)(noise(1, 32))["spatial"]
    told = {}
    for block in ("Mixed_6c", "Mixed_6d", "Mixed_6e"):
        changed = dict(tensors)
        changed[f"{block}.branch1x1.bn.bias"] = tensors[f"{block}.branch1x1.bn.bias"] + 1000 * torch.arange(192)
        torch.save(changed, tmp_path / "changed.pth")
        told[block] = open_extractor("inception", weights=tmp_path / "changed.pth")(noise(1, 32))["spatial"] - before
    assert told["Mixed_6e"].abs().max() == 0  # what comes after
    step = told["Mixed_6d"].view(17, 17, 7)
    assert torch.allclose(step[..., 1:], torch.full((), 1000.0) * torch.arange(1, 7), atol=20)
    assert step[..., 0].abs().max() == 0
    assert not torch.allclose(
        told["Mixed_6c"].view(17, 17, 7)[..., 1:], step[..., 1:], atol=20
    )  # passes through weights


@pytest.mark.skipif(not OFFICIAL.is_file(), reason="Inception's published weights are not on this machine")
def test_the_published_weights_agree_with_torch_fidelity():
    from torch_fidelity.utils import create_feature_extractor

    theirs = create_feature_extractor("inception-v3-compat", ["2048", "logits_unbiased"], cuda=False, verbose=False)
    extractor, images = open_extractor("inception"), noise(2, 64)
    assert extractor.official and extractor.name == "inception"
    ours = extractor(images)
    for layer, features in zip(("pooled", "logits"), theirs(images), strict=True):
        assert relative(ours[layer], features) < 1e-4


def test_missing_weights_say_which_from_where_to_where(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(weights, "INCEPTION_URL", (tmp_path / "nowhere.pth").as_uri())
    assert weights_file("inception") == tmp_path / "hub" / "checkpoints" / weights.INCEPTION_FILE
    with pytest.raises(ValueError, match="cannot be reached") as told:
        open_extractor("inception")
    message = str(told.value)
    assert "\n" not in message and str(weights_file("inception")) in message and "nowhere.pth" in message
    with pytest.raises(ValueError, match="gone.pth is not there: bring it from"):
        open_extractor("inception", weights=tmp_path / "gone.pth")


def test_weights_are_brought_once_and_checked(tmp_path, monkeypatch, file):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    release = tmp_path / "release.pth"
    release.write_bytes(file.read_bytes())
    monkeypatch.setattr(weights, "INCEPTION_URL", release.as_uri())
    with pytest.raises(ValueError, match="gave another file"):
        weights.inception_weights()
    assert not any(path.is_file() for path in (tmp_path / "home").rglob("*"))
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    monkeypatch.setattr(weights, "INCEPTION_SHA256", sha256[:8])
    said = []
    path, digest = weights.inception_weights(say=said.append)
    assert digest == sha256 and path == weights_file("inception") and len(said) == 1
    release.unlink()
    assert open_extractor("inception").official and weights.inception_weights(say=said.append)[1] == sha256
    assert len(said) == 1
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="torn or another file"):
        open_extractor("inception")


@pytest.mark.parametrize("content", ["torn", "another network", "code"])
def test_a_damaged_weights_file_is_refused_and_runs_nothing(tmp_path, file, content):
    path = tmp_path / "bad.pth"
    if content == "torn":
        path.write_bytes(file.read_bytes()[:1000])
    elif content == "another network":
        torch.save({"fc.weight": torch.zeros(10, 10)}, path)
    else:
        torch.save(Code(tmp_path / "ran"), path)
    with pytest.raises(ValueError, match=r"bad\.pth does not hold the weights of Inception") as told:
        open_extractor("inception", weights=path)
    assert "\n" not in str(told.value) and not (tmp_path / "ran").exists()


class Code:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_random_is_the_same_everywhere():
    kernels = random_kernels()
    assert [kernel.shape for kernel in kernels] == [(32, 3, 3, 3), (64, 32, 3, 3), (128, 64, 3, 3)]
    extractor = open_extractor("random")
    assert (
        extractor.digest == "3fbedace9402ab4cf7ef8069a036caab123c65f63c3a765ca2766c76a8bbe4cc"
        and extractor.name == "random"
    )
    for kernel in kernels:
        fan_in = kernel[0].size
        assert abs(kernel).max() <= np.sqrt(6 / fan_in) and kernel.var() == pytest.approx(2 / fan_in, rel=0.1)
    told = extractor(noise(2, 200))
    assert told["pooled"].shape == (2, 512) and told["pooled"].std(dim=0).mean() > 0
    assert extractor(noise(1, 7))["pooled"].shape == (1, 512)


def test_random_features_order_images_by_what_they_look_like(tmp_path):
    extractor, images = open_extractor("random"), bars(150)[0]
    others = {"real": bars(150, seed=2)[0], "dim": bars(150, seed=2)[0] // 2, "noise": noise(150, 16).numpy()}
    others["noise"] = others["noise"].transpose(0, 2, 3, 1)
    a, *rest = (collect(extractor, from_array(x), folder=tmp_path) for x in (images, *others.values()))
    moments = [found.moments["pooled"] for found in (a, *rest)]
    distances = [frechet_distance(x.mean, x.covariance, moments[0].mean, moments[0].covariance) for x in moments[1:]]
    assert distances[0] < distances[1] / 2 and distances[1] < distances[2]


def test_the_classifier_has_the_name_that_the_reference_gave_it(tmp_path):
    classifier = Classifier(2).eval()
    save_classifier(tmp_path / "classifier.safetensors", classifier)
    for classes in (2, 0):
        (tmp_path / "reference.json").write_text(json.dumps({"extractor": "bars_classifier", "num_classes": classes}))
        extractor = open_extractor("classifier", folder=tmp_path)
        assert extractor.name == "bars_classifier" and extractor.scores == ("logits" if classes else None)
    images = bars(5)[0]
    ours, direct = extractor(torch.from_numpy(images).permute(0, 3, 1, 2)), extract(classifier, images)
    assert all(torch.equal(ours[layer].double(), direct[layer]) for layer in direct)
    assert {layer: features.shape[1] for layer, features in ours.items()} == extractor.widths


@pytest.mark.parametrize("name, arguments, message", [
    ("classifier", {}, "holds no classifier"),
    ("inceptoin", {}, "there is no extractor 'inceptoin': use inception, classifier, random or one of"),
    ("random", {"weights": Path("x.pth")}, "only the extractor inception takes a file"),
])  # fmt: skip
def test_a_wrong_name_is_refused_in_one_line(name, arguments, message):
    with pytest.raises(ValueError, match=message) as told:
        open_extractor(name, **arguments)
    assert "\n" not in str(told.value)


def test_the_librarys_other_extractors_need_their_file(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    path = weights_file("clip-vit-b-32")
    assert path == tmp_path / "hub" / "checkpoints" / "ViT-B-32.pt"
    with pytest.raises(ValueError, match="clip-vit-b-32 needs the file .*ViT-B-32.pt: bring it from https://"):
        open_extractor("clip-vit-b-32")
    path.parent.mkdir(parents=True)
    path.write_bytes(b"torn")
    with pytest.raises(ValueError, match="ViT-B-32.pt is torn or another file"):
        open_extractor("clip-vit-b-32")


def test_any_registered_extractor_can_be_used(tmp_path):
    save_classifier(tmp_path / "c.safetensors", Classifier(3).eval())
    direct = registered_extractor("bars-of.three", tmp_path / "c.safetensors")
    extractor = open_extractor("bars-of.three")
    assert extractor.name == "bars_of_three" and extractor.widths == {"features": 64}
    images = torch.from_numpy(bars(4)[0]).permute(0, 3, 1, 2)
    assert torch.equal(extractor(images)["features"], direct(images)["hidden"])
    assert weights_file("bars-of.three") is None and weights_file("random") is None


def test_torch_fidelity_finds_the_classifier_and_agrees(tmp_path):
    from dit.stages.reference import write_reference

    images, labels = bars(200)
    others = np.clip(bars(120, seed=2)[0].astype(int) + 15, 0, 255).astype(np.uint8)
    told = {"extractor": "bars_classifier", "num_classes": 2}
    write_reference(tmp_path, from_array(images, labels), from_array(*bars(100, seed=3)), told, QUICK)
    extractor = open_extractor("classifier", folder=tmp_path)
    a, b = (collect(extractor, from_array(x), folder=tmp_path).moments["hidden"] for x in (others, images))
    registered_extractor("bars_classifier", tmp_path / "classifier.safetensors")
    theirs = calculated(others, images, "bars_classifier")
    assert frechet_distance(a.mean, a.covariance, b.mean, b.covariance) == pytest.approx(theirs, rel=1e-5)


def calculated(a, b, name):
    import torch_fidelity

    class Images(torch.utils.data.Dataset):
        def __init__(self, array):
            self.array = torch.from_numpy(array).permute(0, 3, 1, 2).contiguous()

        def __len__(self):
            return len(self.array)

        def __getitem__(self, index):
            return self.array[index]

    told = torch_fidelity.calculate_metrics(
        input1=Images(a), input2=Images(b), feature_extractor=name, cuda=False, verbose=False, fid=True, cache=False,
        save_cpu_ram=True,  # no worker processes: they die where the tests themselves run in several
    )  # fmt: skip
    return told["frechet_inception_distance"]
