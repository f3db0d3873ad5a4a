"""How many numbers an optimizer keeps of a network, beside the weights."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import nn

from latentray.models.matrices import hidden_matrices


def numbers(optimizer: str, net: nn.Module) -> int:
    """Of all trained parameters together, in fp32; whole, before ZeRO shares them out."""
    return _NUMBERS[optimizer](net)


def staged(optimizer: str, net: nn.Module) -> int:
    """What DeepSpeed's Muon makes of the gradients of hidden matrices and keeps until the step, whole, in the weights' type."""
    return sum(p.numel() for p in hidden_matrices(net)) if optimizer == "muon" else 0


def _count(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters() if p.requires_grad)


def _adamw(net: nn.Module) -> int:
    """A first and a second moment."""
    return 2 * _count(net)


def _adafactor(net: nn.Module) -> int:
    """Shazeer & Stern 2018: sums over the last two axes of a matrix, or of each of a kernel's; of vectors the second moment."""
    total = 0
    for p in net.parameters():
        if p.requires_grad:
            total += math.prod(p.shape[:-2]) * (p.shape[-2] + p.shape[-1]) if p.ndim > 1 else p.numel()
    return total


def _muon(net: nn.Module) -> int:
    """Jordan et al. 2024: one momentum of hidden matrices, and AdamW's moments of the rest."""
    return 2 * _count(net) - sum(p.numel() for p in hidden_matrices(net))


_NUMBERS: dict[str, Callable[[nn.Module], int]] = {"adamw": _adamw, "adafactor": _adafactor, "muon": _muon}
