"""Guidance: from several network outputs to the one a sampler's row uses."""

from __future__ import annotations

from torch import Tensor


def classifier_free(unconditional: Tensor, conditional: Tensor, scale_B: Tensor) -> Tensor:
    """y_u + g (y_c - y_u) per row (Ho & Salimans 2022, equation 6, with g = 1 + w)."""
    g = scale_B.view(-1, *([1] * (conditional.ndim - 1))).to(conditional.dtype)
    return unconditional + g * (conditional - unconditional)
