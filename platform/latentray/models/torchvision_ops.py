"""Make `import torchvision` work beside a CPU build of torch.

The published torchvision wheel registers fakes for two operators that its compiled library defines only beside the
matching torch build; without the two declarations its import fails, and lpips' and transformers' with it.
"""

from __future__ import annotations

import importlib
import sys

_keep_alive: list[object] = []


def ensure_importable() -> None:
    """Import torchvision, declaring its `nms` and `qnms` operators first where that is what it lacks."""
    if "torchvision" in sys.modules:
        return
    try:
        importlib.import_module("torchvision")
        return
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
    for name in [n for n in sys.modules if n == "torchvision" or n.startswith("torchvision.")]:
        del sys.modules[name]
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")
    for operator in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, operator):
            library.define(operator + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _keep_alive.append(library)
    importlib.import_module("torchvision")
