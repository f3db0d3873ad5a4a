"""Guidance: from several network outputs to the one a sampler's row uses."""

from __future__ import annotations

import torch
from torch import Tensor

from latentray.config.bounds import check_guidance as check

__all__ = ["check", "classifier_free", "rescale", "within"]


def classifier_free(unconditional: Tensor, conditional: Tensor, scale_B: Tensor) -> Tensor:
    """y_u + g (y_c - y_u) per row (Ho & Salimans 2022, equation 6, with g = 1 + w)."""
    g = _wide(scale_B, conditional)
    return unconditional + g * (conditional - unconditional)


def rescale(guided: Tensor, conditional: Tensor, share_B: Tensor) -> Tensor:
    """Give the guided output the conditional one's standard deviation, by a share per row (Lin et al. 2024, equations 15-16).

    Strong guidance widens the output and so oversaturates; share 0 changes nothing, the paper uses 0.7.
    """
    dims = tuple(range(1, guided.ndim))
    ratio = conditional.std(dim=dims, keepdim=True) / guided.std(dim=dims, keepdim=True).clamp(min=1e-12)
    phi = _wide(share_B, guided)
    return guided * (phi * ratio + (1 - phi))


def within(scale_B: Tensor, noise_to_signal_B: Tensor, low_B: Tensor, high_B: Tensor) -> Tensor:
    """The scale where sigma/alpha lies in (low, high], 1 elsewhere (Kynkaanniemi et al. 2024, equation 5).

    Guidance harms at high noise, where it narrows what is drawn, and is idle at low noise.
    """
    inside = (noise_to_signal_B > low_B) & (noise_to_signal_B <= high_B)
    return torch.where(inside, scale_B, torch.ones_like(scale_B))


def _wide(values_B: Tensor, like: Tensor) -> Tensor:
    return values_B.view(-1, *([1] * (like.ndim - 1))).to(like.dtype)
