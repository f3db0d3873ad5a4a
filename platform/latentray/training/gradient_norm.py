"""The norm of the gradients in one pass over them, in place of DeepSpeed's four or more.

It asks each gradient for its largest and its smallest number first, to see whether all are finite, then takes the norm of a
copy in fp64: several launches for each parameter on a GPU, a fifth of the optimizer's time on a CPU. The norm alone says both,
for where one gradient is not finite it is not, and DeepSpeed drops such a step by itself.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from latentray.models import fused


def shorten(zero: Any, world: int) -> None:
    """Have a ZeRO optimizer of DeepSpeed's (stages 1 to 3, nothing offloaded) take its norms so. It changes `zero`."""
    if world == 1:
        zero.gradient_average = False  # it divides every gradient by 1
    if not hasattr(zero, "get_grad_norm_direct") or getattr(zero, "cpu_offload", False) or _offloads(zero):
        return
    zero.has_overflow = lambda partition_gradients=True: False
    zero.get_grad_norm_direct = functools.partial(_norm, zero)


def sum_of_squares(tensors: Sequence[Tensor]) -> Tensor:
    """Of all elements of tensors of one device, as a number in fp64; no number where one of them is none."""
    if not tensors:
        return torch.zeros((), dtype=torch.float64)
    if fused.squares(tensors):
        return torch.tensor(fused.sum_of_squares(tensors), dtype=torch.float64)
    return torch.stack(torch._foreach_norm(list(tensors), 2, dtype=torch.float32)).double().square().sum()


def _offloads(zero: Any) -> bool:
    return bool(getattr(zero, "offload_optimizer", False))


def _norm(zero: Any, gradients: Sequence[Tensor], params: Sequence[Any], norm_type: float = 2) -> Tensor:
    """2-norm over all ranks of one group's gradients; -1, as DeepSpeed marks it, where it is no number. Collective."""
    assert norm_type == 2, "of the others DeepSpeed asks for none"
    held = [one.detach() for one in gradients if not getattr(one, "_zero_padding", False)]
    total = sum_of_squares(held).to(zero.device)
    dist.all_reduce(total, group=zero.dp_process_group)
    norm = total.sqrt().float()
    return torch.where(norm.isfinite(), norm, -1.0)
