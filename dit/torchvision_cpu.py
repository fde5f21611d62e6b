"""Makes `import torchvision` work where its compiled part does not load, such as beside a CPU-only torch.

diffusers and torch-fidelity both import torchvision, and it fails while it describes two operators (`nms`, `qnms`)
that its compiled part would have declared. Nobody here calls them; declaring them is enough. Import this module
before either.
"""

import importlib.util
from pathlib import Path

import torch

_SIGNATURE = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_library = None


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


if not _compiled_part_loads():
    _library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        _library.define(name + _SIGNATURE)
