"""Makes `import torchvision` work where its compiled part does not load, such as beside a CPU-only torch.

diffusers and torch-fidelity both import torchvision, and it fails while it describes two operators (`nms`, `qnms`)
that its compiled part would have declared. Nobody here calls them; declaring them is enough. Call `prepare` before
importing either.
"""

import importlib.util
from pathlib import Path

import torch

_SIGNATURE = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_library = None  # kept alive: what it declares goes with it


def _compiled_part_loads() -> bool:
    spec = importlib.util.find_spec("torchvision")
    if spec is None or not spec.submodule_search_locations:
        return True  # not installed: let the import itself say so
    for file in Path(spec.submodule_search_locations[0]).glob("_C*.*"):
        try:
            torch.ops.load_library(file)
            return True
        except OSError:
            continue
    return False


def prepare() -> None:
    """Make torchvision importable; cheap where it is already, or was."""
    global _library
    if _library is None and not _compiled_part_loads():
        _library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            _library.define(name + _SIGNATURE)
