"""The classifier of noisy latents: a U-Net's downward half, and a pooling (Dhariwal & Nichol 2021, section 4).

The half is this package's own, so time is added to a residual block's features, where the paper's scales and shifts them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from latentray.config.denoiser import DenoiserConfig
from latentray.models.attention import Attention, attend
from latentray.models.embeddings import sinusoidal_embedding
from latentray.models.layers import group_norm
from latentray.models.unet import DownwardHalf

_EPS = 1e-5


class NoisyClassifier(DownwardHalf):
    """logits = net(x_t, t).

    forward(x_BChw, t_B) -> (B, classes): their softmax is p(class | x_t). `t` is that of the denoiser's schedule: 0 ... T-1 for a
    discrete one, 1000 t for flows. h and w are any. A context, which every denoiser's call has, is ignored.
    """

    def __init__(self, config: DenoiserConfig) -> None:
        super().__init__(config)
        assert config.family == "classifier" and config.classes is not None
        width = config.channels[-1]
        self.norm_out = group_norm(width, config.groups, eps=_EPS)
        heads = config.heads_at(len(config.channels) - 1)
        self.pool: nn.Module = AttentionPool(width, heads=heads) if config.pool == "attention" else MeanPool()
        self.head = nn.Linear(width, config.classes)

    def forward(self, x_BChw: Tensor, t_B: Tensor, context_BLD: Tensor | None = None) -> Tensor:
        h, _ = self._descended(x_BChw, self._noise_level(t_B, x_BChw.dtype))
        return self.head(self.pool(self.norm_out(h, silu=True, inplace=True)))


class MeanPool(nn.Module):
    """(B,C,h,w) -> (B,C)."""

    def forward(self, x_BChw: Tensor) -> Tensor:
        return x_BChw.mean(dim=(2, 3))


class AttentionPool(nn.Module):
    """(B,C,h,w) -> (B,C): what the mean of all pixels attends to among itself and them (Radford et al. 2021, section 2.4).

    Each pixel is told its row and column by sinusoids, so that any size is taken; CLIP learns a vector for each place.

    Args:
        width: C, a multiple of 4 and of `heads`.
    """

    def __init__(self, width: int, *, heads: int) -> None:
        super().__init__()
        self.width = width
        self.attn = Attention(width, heads=heads, bias=True, output=False)

    def forward(self, x_BChw: Tensor) -> Tensor:
        rows, columns = x_BChw.shape[-2:]
        tokens = x_BChw.flatten(2).transpose(1, 2)
        mean = tokens.mean(dim=1, keepdim=True)
        tokens = tokens + self._places(rows, columns, x_BChw.device).to(x_BChw.dtype)
        attended_BH1D = attend(*self.attn.project(mean, torch.cat([mean, tokens], dim=1)))
        return attended_BH1D.flatten(1)

    def _places(self, rows: int, columns: int, device: torch.device) -> Tensor:
        """(h w, C) float32: half of the channels tell the row, half the column."""
        row, column = (
            sinusoidal_embedding(torch.arange(count, device=device), self.width // 2) for count in (rows, columns)
        )
        grid = [row[:, None].expand(-1, columns, -1), column[None].expand(rows, -1, -1)]
        return torch.cat(grid, dim=-1).flatten(0, 1)
