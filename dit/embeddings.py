"""What is stored of each image beside its latents: L vectors of E numbers, from a file or from a feature extractor.

A network may be conditioned on them (`model.condition: embeddings`) or learn to agree with them
(`objective.alignment`). `encode.features` says where they come from:

- a file, found by its ending. `.npz`: arrays `keys` (n,) of text and `features` (n, E) or (n, L, E). `.safetensors`: the
  tensor `features`, and the keys as a JSON list under `keys` in its metadata. A key is an image's as `scan` lists it, for
  a folder the path below it (`cats/7.png`). Keys that no image has are left alone. With `data.mirror` a mirror image has
  the features of the image itself, which is right for a text's, or one vector for the whole image. Those of a grid are
  of places: to align tokens with a grid the file holds a second array or tensor, `features_mirror`, of the same shape,
  with the features of each mirror image.
- `pixels-4x4` (any size): no more than the mean colours of the squares of a grid, as one vector of an image; with
  `-tokens` at the end, as one vector of each square. It needs no weights and stands in for a real one.
- one of torch-fidelity's extractors, such as `clip-vit-b-32`: the layer that it compares images by. Its weights must be
  on this machine already: nothing is downloaded.
"""

import hashlib
import json
import os
import re
import zipfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dit import torchvision_cpu
from dit.paths import Given, file_sha256, given_here

SUFFIXES = (".npz", ".safetensors")
NAMES = ("features", "features_mirror")
PIXELS = re.compile(r"pixels-([1-9]\d?)x\1(-tokens)?")


@dataclass(frozen=True)
class Features:
    """A source of features: `of(keys, images)` gives (N, L, E) float16 for N keys and uint8 images (N, S, S, 3).

    `of_mirror(keys, images)`, given the same images, tells of their mirror images; None where those have no others.
    `digest` names all that features depend on; `digest_of(keys)` what those of some images depend on. `missing(keys)`
    are those it has nothing for.
    """

    source: str
    digest: str
    of: Callable[[Sequence[str], np.ndarray], Tensor]
    of_mirror: Callable[[Sequence[str], np.ndarray], Tensor] | None
    digest_of: Callable[[Sequence[str]], str]
    missing: Callable[[Iterable[str]], list[str]]


def require_source(source: str, given: Given = given_here) -> None:
    """Raise ValueError, one line, unless there is a file or an extractor of this name, with its weights. Reads none."""
    if is_file_name(source):
        path = given(source).absolute()
        if path.is_dir():
            raise ValueError(f"encode.features: {path} is a folder: name a .npz or .safetensors file")
        if not path.is_file():
            raise ValueError(
                f"encode.features: the file {source} is not there (looked at {path}): "
                "make it, name it by its whole path, or set encode.features to null"
            )
        if not os.access(path, os.R_OK):
            raise ValueError(f"encode.features: {path} may not be read by this user: chmod u+r, or name another file")
    elif not PIXELS.fullmatch(source):
        for file, url in library_weights(source):
            if not file.is_file():
                raise ValueError(
                    f"encode.features: {source} needs the file {file}: bring it from {url}, nothing is downloaded"
                )


def is_file_name(source: str) -> bool:
    """Whether `source` names a file by its ending, not an extractor."""
    return source.lower().endswith(SUFFIXES)


def read_header(source: str, given: Given = given_here) -> tuple[int, bool]:
    """L, and whether mirror images have features of their own; of a file no more than its header is read.

    Raises ValueError where the file has none that can be read. `require_source` comes first.
    """
    if not is_file_name(source):
        match = PIXELS.fullmatch(source)
        return (int(match[1]) ** 2 if match and match[2] else 1), True
    path = given(source).absolute()
    try:
        shapes = _npz_shapes(path) if path.suffix.lower() == ".npz" else _safetensors_shapes(path)
        shape = shapes["features"]
    except Exception as error:  # zip, numpy and safetensors each have their own
        raise _unreadable(path, error) from None
    return (shape[1] if len(shape) == 3 else 1), "features_mirror" in shapes


def open_features(source: str, device: torch.device | str = "cpu", given: Given = given_here) -> Features:
    """The source of this name. Raises ValueError, one line, where there is none, it is damaged, or its weights are
    not here."""
    require_source(source, given)
    if is_file_name(source):
        return _from_file(source, given(source).absolute())
    if PIXELS.fullmatch(source):
        return _extractor(source, source, lambda images: mean_colours(images, source))
    weights = library_weights(source)
    for file, url in weights:
        _require_content(file, url)
    digest = _library_digest(source, [file for file, _ in weights])
    return _extractor(source, digest, _library_extractor(source, device))


def require_all(features: Features, keys: Iterable[str]) -> None:
    """Raise ValueError with their number and the first, where images have no features."""
    if missing := features.missing(keys):
        raise ValueError(
            f"encode.features: {features.source} has nothing for {len(missing)} images, the first is {missing[0]!r}: "
            "its keys must be the images' as artifacts/scan/listing.json has them"
        )


def read_file(path: Path) -> tuple[list[str], Tensor, Tensor | None]:
    """Keys, features (n, L, E) float16 and, if there are any, those of the mirror images, of a file.

    Raises ValueError where it is not one, or holds what float16 cannot.
    """
    try:
        if path.suffix.lower() == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                keys = arrays["keys"].tolist()
                found = {name: torch.from_numpy(arrays[name]) for name in NAMES if name in arrays}
        else:
            from safetensors import safe_open

            with safe_open(path, "pt") as tensors:
                keys = json.loads((tensors.metadata() or {})["keys"])
                found = {name: tensors.get_tensor(name) for name in NAMES if name in tensors.keys()}  # noqa: SIM118
        features, mirror = found["features"], found.get("features_mirror")
    except Exception as error:  # zip, numpy, safetensors and JSON each have their own
        raise _unreadable(path, error) from None
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys) or len(set(keys)) < len(keys):
        raise ValueError(f"encode.features: the keys of {path} must be texts, each of them once")
    if features.dim() not in (2, 3) or len(features) != len(keys) or not features.numel():
        shape = tuple(features.shape)
        raise ValueError(
            f"encode.features: `features` of {path} must be (n, E) or (n, L, E) for {len(keys)} keys, found {shape}"
        )
    if mirror is not None and mirror.shape != features.shape:
        raise ValueError(
            f"encode.features: `features_mirror` of {path} must have the shape of `features` {tuple(features.shape)}, "
            f"found {tuple(mirror.shape)}"
        )
    halves = [_to_half(path, name, value, keys) for name, value in found.items()]
    return keys, halves[0], halves[1] if len(halves) > 1 else None


def _to_half(path: Path, name: str, features: Tensor, keys: list[str]) -> Tensor:
    """(n, E) or (n, L, E) -> (n, L, E) float16. Raises ValueError where nothing true would be left of a vector."""
    if features.is_complex():
        raise ValueError(f"encode.features: `{name}` of {path} holds complex numbers: store real ones")
    features = features if features.dim() == 3 else features.unsqueeze(1)
    half = features.half()
    if (bad := half.isnan().flatten(1).any(1)).any():
        first = keys[int(bad.nonzero()[0])]
        raise ValueError(
            f"encode.features: `{name}` of {path} holds NaN for {int(bad.sum())} images, the first is {first!r}: "
            "compute them again"
        )
    if not torch.isfinite(half).all():
        raise ValueError(
            f"encode.features: `{name}` of {path} holds numbers that are not finite in float16 (above 65504): scale them"
        )
    # One small number among others is as good as 0; a vector of nothing else would lose its direction.
    small = half.abs().amax(-1) < torch.finfo(torch.float16).tiny
    if features[small].double().any():
        raise ValueError(
            f"encode.features: `{name}` of {path} holds vectors that are lost in float16 "
            "(not 0, but no number in them reaches 6.1e-5): scale them"
        )
    return half


def _unreadable(path: Path, error: Exception) -> ValueError:
    reason = f"{type(error).__name__}: {error}".splitlines()[0]
    return ValueError(
        f"encode.features: {path} holds no `keys` and `features` that can be read ({reason}): "
        "write it again as dit/embeddings.py describes"
    )


def _npz_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    shapes = {}
    with zipfile.ZipFile(path) as members:
        for name in NAMES:
            if f"{name}.npy" not in members.namelist():
                continue
            with members.open(f"{name}.npy") as member:
                version = np.lib.format.read_magic(member)
                read = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}[version[0]]
                shapes[name] = read(member)[0]
    return shapes


def _safetensors_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    from safetensors import safe_open

    with safe_open(path, "pt") as tensors:
        return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118


def mean_colours(images: np.ndarray, name: str = "pixels-4x4") -> Tensor:
    """(N, 1, 3 G G), or (N, G G, 3) for `-tokens`, in [-1, 1]: the mean colours of a G x G grid, row by row."""
    side, tokens = PIXELS.fullmatch(name).groups()
    pixels = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
    colours = F.adaptive_avg_pool2d(pixels, int(side)).flatten(2).transpose(1, 2)
    return colours if tokens else colours.flatten(1).unsqueeze(1)


def library_weights(name: str) -> list[tuple[Path, str]]:
    """The files that torch-fidelity's extractor of this name opens, and where each is to be had.

    Raises ValueError for a name that it does not have.
    """
    torchvision_cpu.prepare()
    from torch_fidelity import feature_extractor_clip, feature_extractor_dinov2, feature_extractor_inceptionv3
    from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY
    from torchvision.models import VGG16_Weights

    if name not in FEATURE_EXTRACTORS_REGISTRY:
        folder = "a folder, " if Path(name).expanduser().is_dir() else ""
        raise ValueError(
            f"encode.features: {name!r} is {folder}no file (.npz, .safetensors) and no extractor: "
            f"use pixels-4x4 or one of {', '.join(FEATURE_EXTRACTORS_REGISTRY)}"
        )
    urls = {"inception-v3-compat": feature_extractor_inceptionv3.URL_INCEPTION_V3}
    urls |= {"vgg16": VGG16_Weights.IMAGENET1K_V1.url, **feature_extractor_clip.MODEL_URLS}
    for known, model in feature_extractor_dinov2.MODEL_METADATA.items():
        urls[known] = f"https://dl.fbaipublicfiles.com/dinov2/{model}/{model}_pretrain.pth"
    hub = Path(torch.hub.get_dir())
    files = [(hub / "checkpoints" / os.path.basename(urls[name]), urls[name])] if name in urls else []
    if name in feature_extractor_dinov2.MODEL_METADATA:  # its network's code is on the hub too
        repository = "facebookresearch/dinov2"
        files.append((hub / f"{repository.replace('/', '_')}_main" / "hubconf.py", f"https://github.com/{repository}"))
    return files


def _from_file(source: str, path: Path) -> Features:
    keys, features, mirror = read_file(path)
    row = {key: number for number, key in enumerate(keys)}

    def of(wanted: Sequence[str], images: np.ndarray) -> Tensor:
        return features[[row[key] for key in wanted]]

    def of_mirror(wanted: Sequence[str], images: np.ndarray) -> Tensor:
        return mirror[[row[key] for key in wanted]]

    def digest_of(wanted: Sequence[str]) -> str:
        told = hashlib.sha256()
        for tensor in (features, mirror) if mirror is not None else (features,):
            told.update(tensor[[row[key] for key in wanted]].numpy().tobytes())
        return told.hexdigest()

    def missing(wanted: Iterable[str]) -> list[str]:
        return [key for key in wanted if key not in row]

    return Features(source, file_sha256(path), of, None if mirror is None else of_mirror, digest_of, missing)


def _extractor(source: str, digest: str, of: Callable[[np.ndarray], Tensor]) -> Features:
    def seen(keys: Sequence[str], images: np.ndarray) -> Tensor:
        return of(images).half().cpu()

    def seen_in_the_mirror(keys: Sequence[str], images: np.ndarray) -> Tensor:
        return seen(keys, images[:, :, ::-1])

    return Features(source, digest, seen, seen_in_the_mirror, lambda keys: digest, lambda keys: [])


def _require_content(file: Path, url: str) -> None:
    # The files' names say what their content is: eight digits of it, or the folder of the address all of them.
    told = re.search(r"-([0-9a-f]{8,64})\.pth$|/([0-9a-f]{64})/[^/]+$", url)
    if told and not file_sha256(file).startswith(told.group(1) or told.group(2)):
        raise ValueError(
            f"encode.features: {file} is not the file that {url} names (its sha256 differs): bring it again"
        )


def _library_digest(name: str, weights: list[Path]) -> str:
    from importlib.metadata import version

    told = [name, version("torch-fidelity"), *(file_sha256(file) for file in weights)]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def _library_extractor(name: str, device: torch.device | str) -> Callable[[np.ndarray], Tensor]:
    from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY
    from torch_fidelity.utils import create_feature_extractor

    layer = FEATURE_EXTRACTORS_REGISTRY[name].get_default_feature_layer_for_metric("fid")
    extractor: Any = create_feature_extractor(name, [layer], cuda=False, verbose=False).to(device)

    @torch.no_grad()
    def of(images: np.ndarray) -> Tensor:
        pixels = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).to(device)
        return extractor(pixels)[0].flatten(1).unsqueeze(1)

    return of
