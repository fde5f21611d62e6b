"""Mean and covariance of features, from the files that others keep them in; nothing in them is believed unchecked.

An .npz with `mu` and `sigma` is pytorch-fid's form; ADM's (arXiv 2105.05233) adds sFID's `mu_s` and `sigma_s`. A .pt with
a dict of the two is torch-fidelity's cache, whose name tells extractor and layer: INPUT-EXTRACTOR-stat-fid-LAYER.pt.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dit.arrays import Member, open_npz

NAMES = {"pooled": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}  # by Inception's layers
MAX_DIMENSIONS = 16_384  # a header that asks for more is no statistics file's
Statistics = tuple[Tensor, Tensor]  # (D,), (D, D), float64


def read_npz(path: Path, layer: str) -> dict[str, Statistics]:
    """The statistics of an .npz: `mu` and `sigma` under the name `layer`, sFID's, where there are any, as `spatial`.

    Raises ValueError, one line, where the file is damaged, lacks one or holds something else under their names.
    """
    members, found = open_npz(path), {}
    for name, pair in {layer: NAMES["pooled"], "spatial": NAMES["spatial"]}.items():
        missing = [array for array in pair if array not in members]
        if missing and (name == layer or len(missing) == 1):
            raise ValueError(
                f"{path} lacks {' and '.join(missing)}: a reference holds {' and '.join(pair)} of real images"
            )
        if not missing:
            found[name] = checked(path, *(_numbers(members[array]) for array in pair))
    return found


def read_cache(path: Path, layer: str, extractor: str) -> dict[str, Statistics]:
    """torch-fidelity's cached statistics of `extractor`'s features, of which nothing but arrays is unpickled.

    Raises ValueError, one line, where the file is damaged, or by its name another extractor's.
    """
    head, told, which = path.stem.rpartition("-stat-fid-")
    inception = head.endswith("inception-v3-compat")
    if told and (inception != extractor.startswith("inception") or (inception and which != "2048")):
        raise ValueError(
            f"{path}: by its name these are not the statistics of {extractor}'s features that a distance needs: "
            "choose their extractor (--extractor), and of Inception's layers 2048"
        )
    from numpy._core.multiarray import _reconstruct

    kinds = [type(np.dtype(kind)) for kind in ("float64", "float32")]
    allowed = [_reconstruct, (_reconstruct, "numpy.core.multiarray._reconstruct"), np.ndarray, np.dtype, *kinds]
    try:
        with torch.serialization.safe_globals(allowed):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip and torch each have their own
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path} is damaged, or holds no statistics of torch-fidelity's ({why[:200]})") from None
    pair = [content.get(name) for name in NAMES["pooled"]] if isinstance(content, dict) else [None]
    if not all(isinstance(values, np.ndarray | Tensor) for values in pair):
        raise ValueError(f"{path} lacks mu and sigma: name a `...-stat-fid-...` file of torch-fidelity's cache")
    return {layer: checked(path, *(torch.as_tensor(values) for values in pair))}


def checked(path: Path, mean: Tensor, covariance: Tensor) -> Statistics:
    """Both in float64. Raises ValueError where they are not (D,) and (D, D), not finite, or no covariance."""
    if mean.dim() != 1 or tuple(covariance.shape) != (len(mean), len(mean)) or not len(mean):
        shapes = f"{tuple(mean.shape)} and {tuple(covariance.shape)}"
        raise ValueError(f"{path}: mean and covariance are {shapes}, they must be (D,) and (D, D): make them again")
    mean, covariance = mean.double(), covariance.double()
    if not torch.isfinite(mean).all() or not torch.isfinite(covariance).all():
        raise ValueError(f"{path}: mean or covariance is not finite: make the statistics again")
    skewed = (covariance - covariance.T).abs().max() > 1e-4 * covariance.abs().max()
    if skewed or (covariance.diagonal() < 0).any():
        raise ValueError(f"{path}: its covariance is not symmetric, or negative on the diagonal: make it again")
    return mean, covariance


def _numbers(member: Member) -> Tensor:
    if member.dtype.kind != "f" or not 1 <= len(member.shape) <= 2 or max(member.shape) > MAX_DIMENSIONS:
        raise ValueError(f"{member.told} is {member.dtype} {member.shape}, not the statistics of features")
    return torch.from_numpy(np.array(member.load(), np.float64))
