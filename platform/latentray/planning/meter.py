"""Memory and FLOPs of a computation, counted on tensors that have shapes and no contents.

Two kinds of stand-ins: torch's meta device with the GPU's choice of kernels, and fake CPU tensors, for which torch and
the networks choose what they choose on a CPU.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop, sdpa_flop

_aten = torch.ops.aten
_FORMULAS: dict[Any, Any] = flop_registry | {
    _aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *args, **kwargs: sdpa_flop(q, k, v),
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda g, q, k, v, *args, **kwargs: sdpa_backward_flop(
        g, q, k, v
    ),
}
_IN_BF16 = {
    F.linear, F.conv1d, F.conv2d, F.conv3d, F.conv_transpose2d, F.scaled_dot_product_attention,
    torch.matmul, torch.bmm, Tensor.matmul, Tensor.__matmul__, Tensor.bmm,
}  # fmt: skip
_IN_FP32 = {
    F.group_norm, F.layer_norm, F.rms_norm, F.softmax, F.mse_loss, torch.softmax, Tensor.softmax, Tensor.pow, torch.pow,
}  # fmt: skip


class Meter(TorchDispatchMode):
    """Counts bytes of living tensors, their peak, and FLOPs by the type of the operands, while it is entered.

    Args:
        apart: tensors that are counted elsewhere: weights, buffers and gradients that exist already.
    """

    def __init__(self, apart: Iterable[Tensor]) -> None:
        super().__init__()
        self._apart = list(apart)  # kept: a storage that died would hand its identity on
        self._known = {tensor.untyped_storage()._cdata for tensor in self._apart}
        self._sizes: dict[int, int] = {}
        self.live = self.peak = self.activations = 0
        self.flops: dict[str, int] = {}

    def before_backward(self) -> None:
        """What lives now is what the forward pass leaves for the backward pass; the most of several calls counts."""
        self.activations = max(self.activations, self.live)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        for tensor in pytree.tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._meet(tensor)
        formula = _FORMULAS.get(func.overloadpacket)
        if formula is not None:
            operand = next(a for a in args if isinstance(a, Tensor))
            kind = "fp32" if operand.dtype == torch.float32 else "bf16"
            self.flops[kind] = self.flops.get(kind, 0) + int(formula(*args, **kwargs, out_val=out))
        return out

    def _meet(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known or key in self._sizes:
            return
        self._sizes[key] = storage.nbytes()
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._part, key)

    def _part(self, key: int) -> None:
        self.live -= self._sizes.pop(key)


class _GpuKernels(TorchFunctionMode):
    """On the meta device: attention that never forms its matrix, as on GPUs, and CUDA's autocast where it is asked for."""

    def __init__(self, *, autocast: bool) -> None:
        super().__init__()
        self.autocast = autocast

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.autocast and func in _IN_BF16:
            args, kwargs = _cast((args, kwargs), torch.bfloat16)
        elif self.autocast and func in _IN_FP32:
            args, kwargs = _cast((args, kwargs), torch.float32)
        if func is F.scaled_dot_product_attention:
            q, k, v = args[:3]
            return _aten._scaled_dot_product_efficient_attention(q, k, v, None, True)[0]
        return func(*args, **kwargs)


def _cast(values: Any, dtype: torch.dtype) -> Any:
    def one(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    return pytree.tree_map(one, values)


@contextlib.contextmanager
def stand_ins(*, gpu: bool, autocast: bool = False) -> Iterator[None]:
    """Tensors made within have no contents, and compute as on a GPU or on this machine's CPU."""
    with contextlib.ExitStack() as stack:
        if gpu:
            stack.enter_context(torch.device("meta"))
            stack.enter_context(_GpuKernels(autocast=autocast))
        else:
            from torch._subclasses.fake_tensor import FakeTensorMode

            stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
            stack.enter_context(torch.autocast("cpu", torch.bfloat16, enabled=autocast))
        yield


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Networks built within have weights of this type."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
