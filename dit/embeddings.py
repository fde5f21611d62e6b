"""What is stored of each image beside its latents: L vectors of E numbers, from a file or from a feature extractor.

A network may be conditioned on them (`model.condition: embeddings`) or learn to agree with them
(`objective.alignment`). `encode.features` says where they come from:

- a file, found by its ending. `.npz`: arrays `keys` (n,) of text and `features` (n, E) or (n, L, E). `.safetensors`: the
  tensor `features`, and the keys as a JSON list under `keys` in its metadata. A key is an image's as `scan` lists it, for
  a folder the path below it (`cats/7.png`). Keys that no image has are left alone.
- `pixels-4x4` (any size): no more than the mean colours of the squares of a grid, as one vector of an image; with
  `-tokens` at the end, as one vector of each square. It needs no weights and stands in for a real one.
- one of torch-fidelity's extractors, such as `clip-vit-b-32`: the layer that it compares images by. Its weights must be
  on this machine already: nothing is downloaded.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dit import torchvision_cpu
from dit.paths import file_sha256

SUFFIXES = (".npz", ".safetensors")
PIXELS = re.compile(r"pixels-([1-9]\d?)x\1(-tokens)?")


@dataclass(frozen=True)
class Features:
    """A source of features: `of(keys, images)` gives (N, L, E) float16 for N keys and uint8 images (N, S, S, 3).

    `sees_pixels`: it looks at the images, so that a mirror image has features of its own. `digest` names all that they
    depend on; `digest_of(keys)` what those of some images depend on. `missing(keys)` are those it has nothing for.
    """

    source: str
    digest: str
    sees_pixels: bool
    of: Callable[[Sequence[str], np.ndarray], Tensor]
    digest_of: Callable[[Sequence[str]], str]
    missing: Callable[[Iterable[str]], list[str]]


def require_source(source: str) -> None:
    """Raise ValueError, one line, unless there is a file or an extractor of this name, with its weights. Reads none."""
    if source.endswith(SUFFIXES):
        if not Path(source).expanduser().is_file():
            raise ValueError(f"encode.features: the file {source} is not there")
    elif not PIXELS.fullmatch(source):
        for file, url in library_weights(source):
            if not file.is_file():
                raise ValueError(
                    f"encode.features: {source} needs the file {file}: bring it from {url}, nothing is downloaded"
                )


def open_features(source: str, device: torch.device | str = "cpu") -> Features:
    """The source of this name. Raises ValueError, one line, where there is none, it is damaged, or its weights are
    not here."""
    require_source(source)
    if source.endswith(SUFFIXES):
        return _from_file(source)
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


def read_file(path: Path) -> tuple[list[str], Tensor]:
    """Keys and features (n, L, E) float16 of a file. Raises ValueError where it is not one, or holds what float16
    cannot."""
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                keys, features = arrays["keys"].tolist(), torch.from_numpy(arrays["features"])
        else:
            from safetensors import safe_open

            with safe_open(path, "pt") as tensors:
                keys = json.loads((tensors.metadata() or {})["keys"])
                features = tensors.get_tensor("features")
    except Exception as error:  # zip, numpy, safetensors and JSON each have their own
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(
            f"encode.features: {path} holds no `keys` and `features` that can be read ({reason})"
        ) from None
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys) or len(set(keys)) < len(keys):
        raise ValueError(f"encode.features: the keys of {path} must be texts, each of them once")
    if features.dim() not in (2, 3) or len(features) != len(keys) or not features.numel():
        shape = tuple(features.shape)
        raise ValueError(
            f"encode.features: `features` of {path} must be (n, E) or (n, L, E) for {len(keys)} keys, found {shape}"
        )
    features = (features if features.dim() == 3 else features.unsqueeze(1)).half()
    if not torch.isfinite(features).all():
        raise ValueError(
            f"encode.features: {path} holds numbers that are not finite in float16 (above 65504): scale them"
        )
    return keys, features


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
        raise ValueError(
            f"encode.features: {name!r} is no file (.npz, .safetensors) and no extractor: "
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


def _from_file(source: str) -> Features:
    path = Path(source).expanduser()
    keys, features = read_file(path)
    row = {key: number for number, key in enumerate(keys)}

    def rows(wanted: Sequence[str]) -> Tensor:
        return features[[row[key] for key in wanted]]

    def digest_of(wanted: Sequence[str]) -> str:
        return hashlib.sha256(rows(wanted).numpy().tobytes()).hexdigest()

    def missing(wanted: Iterable[str]) -> list[str]:
        return [key for key in wanted if key not in row]

    return Features(source, file_sha256(path), False, lambda wanted, images: rows(wanted), digest_of, missing)


def _extractor(source: str, digest: str, of: Callable[[np.ndarray], Tensor]) -> Features:
    return Features(
        source, digest, True, lambda keys, images: of(images).half().cpu(), lambda keys: digest, lambda keys: []
    )


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
