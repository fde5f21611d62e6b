"""The spaces in which images are compared, by name: each takes uint8 images and gives their features by layer.

- `inception`: the network that published figures are made with (see `dit/inception.py`); one pass gives FID's, sFID's
  and the Inception Score's features. With weights other than the published ones it is called `inception_custom`.
- `classifier`: the one that the stage `reference` fitted on the data set itself, under the name that it has there.
- `random`: convolutions whose weights are drawn once for all, for images without labels and machines without weights.
  Such features order images by what they look like, and tell nothing of what they show (arXiv 2002.09797, section 4).
- any other that torch-fidelity has registered, such as `clip-vit-b-32`: the layer that it takes for FID.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dit.classifier import MAX_SIDE, load_classifier
from dit.inception import SIDE, WIDTHS, load_inception
from dit.parallel import world
from dit.paths import file_sha256
from dit.weights import INCEPTION, inception_weights, is_official, library_weights, weights_file

__all__ = [
    "Extractor",
    "open_extractor",
    "classifier_extractor",
    "random_kernels",
    "weights_file",
]

RANDOM_CHANNELS = (3, 32, 64, 128)
RANDOM_SEED = 2020


@dataclass(frozen=True)
class Extractor:
    """A feature space: called with uint8 images (N, 3, H, W) it gives features by layer, each (N, width) float32.

    `name` stands in metrics' names, `digest` names the weights and `resize` says how images of any size are brought
    to the network's. `frechet` tells which layers have a Frechet distance and what goes into its name for them
    (nothing for the first); `spatial` is sFID's layer, `neighbours` that of precision and recall, `kernel` KID's infix
    and layer, `scores` the logits of the Inception Score: None where there are none.
    """

    name: str
    digest: str
    resize: str
    widths: Mapping[str, int]
    frechet: Mapping[str, str]
    neighbours: str
    kernel: tuple[str, str]
    network: Callable[[Tensor], Mapping[str, Tensor]] = field(repr=False)
    spatial: str | None = None
    scores: str | None = None
    official: bool = False  # Inception with the weights that published figures are made with
    device: torch.device = torch.device("cpu")
    device_batch_size: int = 256  # images in one pass

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        with torch.inference_mode(), full_float32(self.device):
            parts = [self.network(part.to(self.device)) for part in images.split(self.device_batch_size)]
        return {layer: torch.cat([part[layer] for part in parts]).float() for layer in parts[0]}

    @property
    def kept(self) -> tuple[str, ...]:
        """The layers in which images are compared one by one, or class by class."""
        return tuple(dict.fromkeys([*self.frechet.values(), self.neighbours, self.kernel[1]]))

    @property
    def moments_of(self) -> tuple[str, ...]:
        """The layers whose mean and covariance count."""
        return tuple(dict.fromkeys([*self.frechet.values(), *([self.spatial] if self.spatial else [])]))


@contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """Products in float32 to its last digit: CUDA's shorter TensorFloat-32 would change figures in the third, and so
    would the bfloat16 that some CPUs multiply in when they are allowed to."""
    before, cudnn = torch.get_float32_matmul_precision(), torch.backends.cudnn
    torch.set_float32_matmul_precision("highest")
    kept = {"enabled": cudnn.enabled, "benchmark": cudnn.benchmark, "deterministic": cudnn.deterministic}
    try:
        with cudnn.flags(**kept, allow_tf32=False) if device.type == "cuda" else nullcontext():
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def open_extractor(
    name: str, *, device: torch.device | str = "cpu", weights: Path | None = None, folder: Path | None = None
) -> Extractor:
    """The extractor of this name on `device`. `weights` is Inception's file, `folder` the reference's with a classifier.

    Raises ValueError, one line, where there is no such extractor or its weights are missing or damaged.
    """
    device = torch.device(device)
    if weights is not None and name not in INCEPTION:
        raise ValueError(
            f"reference.weights (--weights): only the extractor inception takes a file, not {name!r}: leave it out"
        )
    if name in INCEPTION:
        return _inception(device, weights)
    if name == "random":
        return _random(device)
    if name == "classifier":
        return _classifier_of(folder, device)
    return _library(name, device)


def _inception(device: torch.device, weights: Path | None) -> Extractor:
    if world().main:
        inception_weights(weights)  # one process brings the file
    world().barrier()
    path, sha256 = inception_weights(weights)
    official = is_official(sha256)
    return Extractor(
        name="inception" if official else "inception_custom",
        digest=sha256,
        resize=f"TensorFlow 1 bilinear to {SIDE}",
        widths=WIDTHS,
        frechet={"": "pooled"},
        neighbours="pooled",
        kernel=("", "pooled"),
        network=load_inception(path, device),
        spatial="spatial",
        scores="logits",
        official=official,
        device=device,
        device_batch_size=_large_images(device),
    )


def _classifier_of(folder: Path | None, device: torch.device) -> Extractor:
    try:
        told = json.loads((folder / "reference.json").read_text()) if folder else None
        name, classes = told["extractor"], told["num_classes"]
    except (OSError, TypeError, KeyError, ValueError):
        raise ValueError(
            f"{folder or 'the reference'} holds no classifier (reference.json is missing or torn): "
            "run the stage `reference`, or choose another extractor"
        ) from None
    return classifier_extractor(name, folder / "classifier.safetensors", bool(classes), device)


def classifier_extractor(name: str, weights: Path, classes: bool, device: torch.device | str = "cpu") -> Extractor:
    """The classifier of this file; its logits are scores where it learned `classes`, not rotations."""
    classifier = load_classifier(weights).to(device)
    hidden, pooled = classifier.hidden.out_features, classifier.hidden.in_features // 16
    return Extractor(
        name=name,
        digest=file_sha256(weights),
        resize=f"area to {MAX_SIDE} where larger",
        widths={"hidden": hidden, "pooled": pooled, "logits": classifier.logits.out_features},
        frechet={"": "hidden", "_pooled": "pooled"},
        neighbours="hidden",
        kernel=("_pooled", "pooled"),
        network=classifier,
        scores="logits" if classes else None,
        device=torch.device(device),
    )


def _random(device: torch.device) -> Extractor:
    kernels = random_kernels()
    placed = [torch.from_numpy(kernel).to(device) for kernel in kernels]

    def network(images: Tensor) -> dict[str, Tensor]:
        x = images.float() / 127.5 - 1
        if max(x.shape[2:]) > MAX_SIDE:
            x = F.interpolate(x, size=(MAX_SIDE, MAX_SIDE), mode="area")
        for kernel in placed:
            x = F.relu(F.conv2d(x, kernel, stride=2, padding=1))
        return {"pooled": F.adaptive_avg_pool2d(x, 2).flatten(1)}  # the mean of each quarter of the image

    return Extractor(
        name="random",
        digest=hashlib.sha256(b"".join(kernel.tobytes() for kernel in kernels)).hexdigest(),
        resize=f"area to {MAX_SIDE} where larger",
        widths={"pooled": 4 * RANDOM_CHANNELS[-1]},
        frechet={"": "pooled"},
        neighbours="pooled",
        kernel=("", "pooled"),
        network=network,
        device=device,
    )


def random_kernels() -> list[np.ndarray]:
    """The kernels of `random`, (outputs, inputs, 3, 3) float32: uniform with He's variance (arXiv 1502.01852, eq. 10).

    They are made from the generator's own 64-bit numbers, which are the same on every machine and in every version.
    """
    bits = np.random.PCG64(RANDOM_SEED)
    kernels = []
    for inputs, outputs in zip(RANDOM_CHANNELS, RANDOM_CHANNELS[1:], strict=False):
        shape, limit = (outputs, inputs, 3, 3), np.sqrt(6 / (9 * inputs))
        uniform = (bits.random_raw(int(np.prod(shape))) >> np.uint64(11)).astype(np.float64) / 2**53
        kernels.append(((2 * uniform - 1) * limit).astype(np.float32).reshape(shape))
    return kernels


def _library(name: str, device: torch.device) -> Extractor:
    files = library_weights(name)
    from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY
    from torch_fidelity.utils import create_feature_extractor

    layer = FEATURE_EXTRACTORS_REGISTRY[name].get_default_feature_layer_for_metric("fid")
    extractor = create_feature_extractor(name, [layer], cuda=False, verbose=False).to(device)

    @torch.inference_mode()
    def network(images: Tensor) -> dict[str, Tensor]:
        return {"features": extractor(images)[0].flatten(1)}

    told = [version("torch-fidelity"), *(file_sha256(file) for file in files)]
    probe = network(torch.zeros(1, 3, SIDE, SIDE, dtype=torch.uint8, device=device))
    return Extractor(
        name=re.sub(r"\W", "_", name),
        digest=hashlib.sha256(json.dumps(told).encode()).hexdigest() if files else told[0],
        resize=f"torch-fidelity's for {name}",
        widths={"features": probe["features"].shape[1]},
        frechet={"": "features"},
        neighbours="features",
        kernel=("", "features"),
        network=network,
        device=device,
        device_batch_size=_large_images(device),
    )


def _large_images(device: torch.device) -> int:
    return 16 if device.type == "cpu" else 128  # 299 x 299: more are no faster, and each takes 5 MiB and more
