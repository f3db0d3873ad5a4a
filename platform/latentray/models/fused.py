"""GroupNorm with SiLU, and GEGLU, each in one go with its gradients, for bfloat16 on a CPU: small C++, where a compiler is.

torch makes several passes over each map and keeps what lies between for the way back. The functions are compiled on first
use, for this very machine, and kept in the user's cache; without a compiler, with `LATENTRAY_FUSED=0` and for anything but
bfloat16 with channels last torch's own are used (`layers.py`, `attention.py`). To torch.compile they are operators of their
own, for large tensors: with small ones their bookkeeping takes longer than what the compiler makes of torch's. An eager call
goes past the operators.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_SOURCE = Path(__file__).with_suffix(".cpp")
_FLAGS = (
    "-std=c++20", "-O3", "-march=native", "-mprefer-vector-width=512", "-fno-math-errno", "-fno-trapping-math", "-fopenmp",
    "-shared", "-fPIC",
)  # fmt: skip
_PATIENCE_S = 60.0
_GRAPH_FROM = 2**17
"""Numbers in a tensor from which an operator in a compiled graph is faster than the graph's own loops."""
_POINTER, _NUMBER, _INT, _DOUBLE = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_double
_SIGNATURES: dict[str, list[Any]] = {
    "latentray_group_norm": [*[_POINTER] * 6, *[_NUMBER] * 4, *[_INT] * 3, _DOUBLE],
    "latentray_group_norm_backward": [*[_POINTER] * 10, *[_NUMBER] * 4, *[_INT] * 3],
    "latentray_geglu": [*[_POINTER] * 2, *[_NUMBER] * 2, _INT],
    "latentray_geglu_backward": [*[_POINTER] * 3, *[_NUMBER] * 2, _INT],
    "latentray_squares": [*[_POINTER] * 2, _NUMBER, *[_INT] * 2],
}
_RESULTS = {"latentray_squares": _DOUBLE}


def is_map(x_BCHW: Tensor) -> bool:
    """Whether this is a map in bfloat16 with channels last on a CPU."""
    return _is_ours(x_BCHW) and x_BCHW.ndim == 4 and x_BCHW.is_contiguous(memory_format=torch.channels_last)


def normalises(x_BCHW: Tensor, weight_C: Tensor) -> bool:
    """Whether `group_norm` takes a tensor, with weights: a map (`is_map`), where it is compiled."""
    return is_map(x_BCHW) and weight_C.dtype in (torch.bfloat16, torch.float32) and available()


def available() -> bool:
    """Whether the functions are compiled, or can be."""
    return _library() is not None


# What `torch.compiler.assume_constant_result` does: a graph is not to look for a compiler itself. That imports the whole of
# torch's own compiler, for seconds, wherever a network is built.
available._dynamo_marked_constant = True  # type: ignore[attr-defined]


def gates(x: Tensor) -> bool:
    """Whether `geglu` takes a tensor: bfloat16, contiguous, on a CPU; and compiled itself."""
    return _is_ours(x) and x.is_contiguous() and available()


def group_norm(
    x_BCHW: Tensor,
    weight_C: Tensor,
    bias_C: Tensor,
    add_BC: Tensor | None = None,
    *,
    groups: int,
    eps: float,
    silu: bool,
    inplace: bool = False,
) -> Tensor:
    """GroupNorm of x + add, and SiLU of it where asked, for maps that `normalises` (Wu & He 2018).

    Args:
        add_BC: added to all pixels of a sample's channel, not rounded in between.
        inplace: x may be overwritten, where no gradient is wanted.
    """
    if torch.compiler.is_compiling():
        return _norm_operator(x_BCHW, weight_C, bias_C, add_BC, groups, eps, silu)[0]
    if torch.is_grad_enabled():
        return _GroupNorm.apply(x_BCHW, weight_C, bias_C, add_BC, groups, eps, silu)  # type: ignore[no-any-return, no-untyped-call]
    out = x_BCHW if inplace else torch.empty_like(x_BCHW)
    _normalise(x_BCHW, out, None, weight_C, bias_C, _alike(add_BC, weight_C), groups, eps, silu)
    return out


def geglu(x: Tensor) -> Tensor:
    """(..., 2 C) -> (..., C): the first half times GELU of the second (Shazeer 2020), for tensors that it `gates`."""
    if torch.compiler.is_compiling():
        return _geglu_operator(x)
    if torch.is_grad_enabled():
        return _GEGLU.apply(x)  # type: ignore[no-any-return, no-untyped-call]
    return _gated(x)


def squares(tensors: Sequence[Tensor]) -> bool:
    """Whether `sum_of_squares` takes them: one type, bfloat16 or float32, on a CPU, contiguous; and compiled itself."""
    return (
        tensors[0].dtype in (torch.bfloat16, torch.float32)
        and all(type(x) is Tensor and x.device.type == "cpu" and x.is_contiguous() for x in tensors)
        and len({x.dtype for x in tensors}) == 1
        and available()
    )


def sum_of_squares(tensors: Sequence[Tensor]) -> float:
    """Of all elements of tensors that it `squares`; float32 sums of some thousand each, added up in float64."""
    library = _library()
    assert library is not None, "asked before"
    addresses = (_POINTER * len(tensors))(*(x.data_ptr() for x in tensors))
    sizes = (_NUMBER * len(tensors))(*(x.numel() for x in tensors))
    half = tensors[0].dtype == torch.bfloat16
    return float(library.latentray_squares(addresses, sizes, len(tensors), half, torch.get_num_threads()))


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, add: Tensor | None, groups: int, eps: float, silu: bool
    ) -> Tensor:
        out, stats = torch.empty_like(x), torch.empty(len(x), groups, 2)
        _normalise(x, out, stats, weight, bias, _alike(add, weight), groups, eps, silu)
        _keep(ctx, (x, weight, bias, add, groups, eps, silu), (out, stats))
        return out

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, weight, bias, add, stats = ctx.saved_tensors
        dx, d_weight, d_bias, d_add = _normalised_back(dy, x, weight, bias, add, stats, ctx.groups, ctx.silu)
        return dx, d_weight, d_bias, d_add if ctx.adds else None, None, None, None


class _GEGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return _gated(x)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return _gated_back(dy, *ctx.saved_tensors)


def _keep(ctx: Any, inputs: Any, output: tuple[Tensor, Tensor]) -> None:
    """What `_normalised_back` needs, of the inputs of `_GroupNorm` and of its output and statistics."""
    x, weight, bias, add, groups, _, silu = inputs
    ctx.save_for_backward(x, weight, bias, add, output[1])
    ctx.groups, ctx.silu, ctx.adds = groups, silu, add is not None


@torch.library.custom_op("latentray::group_norm", mutates_args=())
def _norm_operator(
    x: Tensor, weight: Tensor, bias: Tensor, add: Tensor | None, groups: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor]:
    out, stats = torch.empty_like(x), x.new_empty(len(x), groups, 2, dtype=torch.float32)
    _normalise(x, out, stats, weight, bias, _alike(add, weight), groups, eps, silu)
    return out, stats


@torch.library.custom_op("latentray::group_norm_backward", mutates_args=())
def _norm_back_operator(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, add: Tensor | None, stats: Tensor, groups: int, silu: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _normalised_back(dy, x, weight, bias, add, stats, groups, silu)


@torch.library.custom_op("latentray::geglu", mutates_args=())
def _geglu_operator(x: Tensor) -> Tensor:
    return _gated(x)


@torch.library.custom_op("latentray::geglu_backward", mutates_args=())
def _geglu_back_operator(dy: Tensor, x: Tensor) -> Tensor:
    return _gated_back(dy, x)


@_norm_operator.register_fake
def _(x: Any, weight: Any, bias: Any, add: Any, groups: int, eps: float, silu: bool) -> Any:
    return torch.empty_like(x), x.new_empty(len(x), groups, 2, dtype=torch.float32)


@_norm_back_operator.register_fake
def _(dy: Any, x: Any, weight: Any, bias: Any, add: Any, stats: Any, groups: int, silu: bool) -> Any:
    of_add = x.new_empty(0) if add is None else torch.empty_like(add, memory_format=torch.contiguous_format)
    return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(bias), of_add


@_geglu_operator.register_fake
def _(x: Any) -> Any:
    return x.new_empty(*x.shape[:-1], x.shape[-1] // 2)


@_geglu_back_operator.register_fake
def _(dy: Any, x: Any) -> Any:
    return torch.empty_like(x)


def _norm_gradients(ctx: Any, dy: Tensor, _: Tensor) -> Any:
    dx, d_weight, d_bias, d_add = _norm_back_operator(dy, *ctx.saved_tensors, ctx.groups, ctx.silu)
    return dx, d_weight, d_bias, d_add if ctx.adds else None, None, None, None


_norm_operator.register_autograd(_norm_gradients, setup_context=_keep)
_geglu_operator.register_autograd(
    lambda ctx, dy: _geglu_back_operator(dy, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


def _normalise(
    x: Tensor,
    out: Tensor,
    stats: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    add: Tensor | None,
    groups: int,
    eps: float,
    silu: bool,
) -> None:
    """Fill `out`, and `stats` with mean and 1/deviation, (B, groups, 2)."""
    library = _library()
    assert library is not None, "asked before"
    batch, channels, height, width = x.shape
    library.latentray_group_norm(
        x.data_ptr(), _address(add), out.data_ptr(), weight.data_ptr(), bias.data_ptr(), _address(stats), batch,
        height * width, channels, groups, silu, weight.dtype == torch.bfloat16, torch.get_num_threads(), eps,
    )  # fmt: skip


def _alike(add: Tensor | None, weight: Tensor) -> Tensor | None:
    """In the type of the weights: the functions read both in one."""
    return None if add is None else add.to(weight.dtype).contiguous()


def _normalised_back(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, add: Tensor | None, stats: Tensor, groups: int, silu: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias and what was added; the last is empty where nothing was."""
    library = _library()
    assert library is not None, "it was there for the way forth"
    batch, channels, height, width = x.shape
    dy, dx, add_like = dy.contiguous(memory_format=torch.channels_last), torch.empty_like(x), _alike(add, weight)
    d_weight, d_bias, d_add = torch.empty(3, batch, channels).unbind()
    library.latentray_group_norm_backward(
        x.data_ptr(), _address(add_like), dy.data_ptr(), dx.data_ptr(), weight.data_ptr(), bias.data_ptr(), stats.data_ptr(),
        d_weight.data_ptr(), d_bias.data_ptr(), None if add is None else d_add.data_ptr(), batch, height * width, channels,
        groups, silu, weight.dtype == torch.bfloat16, torch.get_num_threads(),
    )  # fmt: skip
    of_add = x.new_empty(0) if add is None else d_add.to(add.dtype, copy=True)
    return dx, d_weight.sum(0).to(weight.dtype), d_bias.sum(0).to(bias.dtype), of_add


def _gated(x: Tensor) -> Tensor:
    library = _library()
    assert library is not None, "asked before"
    width = x.shape[-1] // 2
    out = x.new_empty(*x.shape[:-1], width)
    library.latentray_geglu(x.data_ptr(), out.data_ptr(), x.shape[:-1].numel(), width, torch.get_num_threads())
    return out


def _gated_back(dy: Tensor, x: Tensor) -> Tensor:
    library = _library()
    assert library is not None, "it was there for the way forth"
    dy, dx = dy.contiguous(), torch.empty_like(x)
    rows, width = x.shape[:-1].numel(), x.shape[-1] // 2
    library.latentray_geglu_backward(x.data_ptr(), dy.data_ptr(), dx.data_ptr(), rows, width, torch.get_num_threads())
    return dx


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _is_ours(x: Tensor) -> bool:
    """bfloat16 on a CPU; and real, not a stand-in without contents; in a compiled graph large."""
    if type(x) is not Tensor or x.dtype != torch.bfloat16 or x.device.type != "cpu":
        return False
    return x.numel() >= (_GRAPH_FROM if torch.compiler.is_compiling() else 1)


@functools.cache
def _library() -> ctypes.CDLL | None:
    """The compiled functions; None where they are turned off or cannot be had."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if os.environ.get("LATENTRAY_FUSED") == "0" or compiler is None:
        return None
    try:
        library = ctypes.CDLL(str(_built(compiler)))
    except (OSError, subprocess.SubprocessError):
        return None
    for name, arguments in _SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, _RESULTS.get(name)
    return library


def _built(compiler: str) -> Path:
    """The library for this source and machine, compiled unless it is there. Raises OSError, CalledProcessError."""
    root = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "latentray"
    about = [_SOURCE.read_text(), *_FLAGS, compiler, _machine()]
    path = root / f"fused-{hashlib.sha256(''.join(about).encode()).hexdigest()[:16]}.so"
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
