"""SiLU of GroupNorm in one go, for bfloat16 maps with channels last on a CPU: a small C++ function, where a compiler is.

torch makes two passes over the map and an intermediate of them. The function is compiled on first use, for this very
machine, and kept in the user's cache; without a compiler, with `LATENTRAY_FUSED=0`, with gradients and for anything but
such maps torch's own is used.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from latentray.models.layers import GroupNorm

_SOURCE = Path(__file__).with_suffix(".cpp")
_FLAGS = (
    "-std=c++20", "-O3", "-march=native", "-mprefer-vector-width=512", "-fno-math-errno", "-fno-trapping-math", "-fopenmp",
    "-shared", "-fPIC",
)  # fmt: skip
_PATIENCE_S = 60.0


def silu_of_norm(norm: GroupNorm, x_BCHW: Tensor, *, inplace: bool = False) -> Tensor:
    """silu(norm(x)). `inplace` allows that x is overwritten, where no gradient is wanted."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return F.silu(norm(x_BCHW))
    function = _function() if fits(x_BCHW) else None
    if function is None:
        return F.silu(norm(x_BCHW), inplace=True)
    out = x_BCHW if inplace else torch.empty_like(x_BCHW)
    weight, bias = norm.weight.float(), norm.bias.float()
    batch, channels, height, width = x_BCHW.shape
    function(
        x_BCHW.data_ptr(), out.data_ptr(), weight.data_ptr(), bias.data_ptr(), batch, height * width, channels,
        norm.num_groups, norm.eps, 1, torch.get_num_threads(),
    )  # fmt: skip
    return out


def fits(x_BCHW: Tensor) -> bool:
    """Whether a map is bfloat16, with channels last, on a CPU; and real, not a stand-in without contents."""
    if type(x_BCHW) is not Tensor or x_BCHW.dtype != torch.bfloat16 or x_BCHW.device.type != "cpu":
        return False
    return x_BCHW.numel() > 0 and x_BCHW.is_contiguous(memory_format=torch.channels_last)


@functools.cache
def _function() -> Any | None:
    """The compiled function; None where it is turned off or cannot be had."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if os.environ.get("LATENTRAY_FUSED") == "0" or compiler is None:
        return None
    try:
        library = ctypes.CDLL(str(_built(compiler)))
    except (OSError, subprocess.SubprocessError):
        return None
    function = library.latentray_group_norm
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    function.argtypes = [*[pointer] * 4, *[number] * 4, ctypes.c_double, ctypes.c_int, ctypes.c_int]
    function.restype = None
    return function


def _built(compiler: str) -> Path:
    """The library for this source and machine, compiled unless it is there. Raises OSError, CalledProcessError."""
    root = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "latentray"
    about = [_SOURCE.read_text(), *_FLAGS, compiler, _machine()]
    path = root / f"fused_norm-{hashlib.sha256(''.join(about).encode()).hexdigest()[:16]}.so"
    if not path.exists():
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root) as folder:
            made = Path(folder) / path.name
            command = [compiler, *_FLAGS, str(_SOURCE), "-o", str(made)]
            subprocess.run(command, check=True, capture_output=True, timeout=_PATIENCE_S)
            made.replace(path)  # whole or not at all, whoever else compiles it
    return path


def _machine() -> str:
    """What `-march=native` depends on: a cache may be seen by several machines."""
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.exists() else []
    return "".join(dict.fromkeys(line for line in lines if line.startswith(("flags", "model name", "Features"))))
