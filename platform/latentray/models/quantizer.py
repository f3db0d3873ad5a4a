"""Vector quantisation: the nearest vector of a codebook in place of each latent pixel (van den Oord et al. 2017).

K vectors of width D, the latent's channels. How the codebook is learnt stands in `training/codebook.py`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_AT_ONCE = 2**22
"""Distances computed at a time: 16 MiB in float32."""


class Quantizer(nn.Module):
    """(B,D,h,w) -> the nearest vectors of the codebook, (B,D,h,w); by Euclid's distance, the first of equals."""

    codebook_KD: Tensor

    def __init__(self, codes: int, width: int) -> None:
        super().__init__()
        self.register_buffer("codebook_KD", torch.empty(codes, width).uniform_(-1 / codes, 1 / codes))

    def nearest(self, z_BDhw: Tensor) -> Tensor:
        """Number of the nearest vector at each pixel, int64 (B,1,h,w)."""
        kind = z_BDhw.device.type
        exact = contextlib.nullcontext() if kind == "meta" else torch.autocast(kind, enabled=False)
        with torch.no_grad(), exact:
            codebook = self.codebook_KD.float()
            half_squares = 0.5 * codebook.square().sum(1)
            z_ND = z_BDhw.detach().float().movedim(1, -1).flatten(0, -2)
            found = [
                # |z - e|^2 = |z|^2 - 2 (z e - |e|^2 / 2), of which only the bracket differs between vectors e
                torch.addmm(half_squares, some, codebook.T, alpha=-1).argmin(1)
                for some in z_ND.split(max(_AT_ONCE // len(codebook), 1))
            ]
            return torch.cat(found).reshape(len(z_BDhw), 1, *z_BDhw.shape[2:])

    def lookup(self, codes_B1hw: Tensor) -> Tensor:
        """The vectors of these numbers, (B,D,h,w), in the codebook's own type."""
        return F.embedding(codes_B1hw[:, 0], self.codebook_KD).movedim(-1, 1)

    def forward(self, z_BDhw: Tensor) -> Tensor:
        return self.lookup(self.nearest(z_BDhw)).to(z_BDhw.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Quantizer:
        """As every module's, but the codebook stays at float32 or more: nearby vectors round to one in bfloat16."""
        kept = self.codebook_KD
        super()._apply(fn, recurse)
        if self.codebook_KD.dtype.itemsize < kept.dtype.itemsize:
            self.codebook_KD = kept.to(self.codebook_KD.device)
        return self


def perplexity(counts_K: Tensor) -> Tensor:
    """exp of the entropy of how often each vector is used, float64: 1 where it is always the same, K where all are alike."""
    shares_K = counts_K.double() / counts_K.double().sum().clamp_min(1e-300)
    return torch.special.entr(shares_K).sum().exp()
