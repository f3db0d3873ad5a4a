"""Layers over time for clips: a convolution and an attention over the frames of each pixel, both the identity at first.

Their last projections begin as zero (as ControlNet's and AnimateDiff's do; Zhang et al. 2023, section 3.1), so that a
picture's network with these layers in between draws each frame as it did, bit for bit, and every gradient of its own
weights is what it was.

A feature map is (B T, C, H, W), the frames of a clip one after another; `positions_BT` says which clip has which frames.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from latentray.models.attention import Attention, FeedForward
from latentray.models.embeddings import sinusoidal_embedding
from latentray.models.layers import group_norm

_EPS = 1e-5
_SPAN = 3
"""Frames that a temporal convolution sees at once."""
_SEQUENCES = 65_535
"""Sequences in one attention: CUDA's fused kernels count them in 16 bits, and a clip has one for each of its pixels."""


def _zero(layer: nn.Linear | nn.Conv2d) -> nn.Module:
    nn.init.zeros_(layer.weight)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return layer


class TemporalConvolution(nn.Module):
    """GroupNorm, SiLU, convolution over three frames, twice, around an identity (Blattmann et al. 2023, figure 4).

    Groups are normalised over a whole clip. Beyond its ends lie zeros.
    """

    def __init__(self, channels: int, *, groups: int) -> None:
        super().__init__()
        kernel, padding = (_SPAN, 1), (_SPAN // 2, 0)
        self.norm1 = group_norm(channels, groups, eps=_EPS)
        self.conv1 = nn.Conv2d(channels, channels, kernel, padding=padding)
        self.norm2 = group_norm(channels, groups, eps=_EPS)
        self.conv2 = _zero(nn.Conv2d(channels, channels, kernel, padding=padding))

    def forward(self, x_NCHW: Tensor, positions_BT: Tensor) -> Tensor:
        # As a picture of T rows and H W columns: in channels_last memory a view.
        h = x_NCHW.unflatten(0, positions_BT.shape).flatten(3).transpose(1, 2)
        h = self.conv1(self.norm1(h, silu=True))
        h = self.conv2(self.norm2(h, silu=True))
        return x_NCHW + h.transpose(1, 2).unflatten(-1, x_NCHW.shape[-2:]).flatten(0, 1)


class TemporalAttention(nn.Module):
    """Each pixel's frames attend to one another, then a feed-forward, around an identity (Guo et al. 2023, section 4.2).

    Frames are told apart by sines and cosines of their positions: any numbers, each clip its own.
    """

    def __init__(self, channels: int, *, heads: int, groups: int) -> None:
        super().__init__()
        self.norm = group_norm(channels, groups, eps=_EPS)
        self.proj_in = nn.Linear(channels, channels)
        self.norm1, self.attn = nn.LayerNorm(channels), Attention(channels, heads=heads)
        self.norm2, self.ff = nn.LayerNorm(channels), FeedForward(channels)
        self.proj_out = _zero(nn.Linear(channels, channels))

    def forward(self, x_NCHW: Tensor, positions_BT: Tensor) -> Tensor:
        (clips, frames), size = positions_BT.shape, x_NCHW.shape[-2:]
        h = self.norm(x_NCHW).unflatten(0, (clips, frames)).flatten(3).permute(0, 3, 1, 2)  # (B, H W, T, C)
        place_BTC = sinusoidal_embedding(positions_BT, h.shape[-1]).to(h.dtype)
        h = (self.proj_in(h) + place_BTC[:, None]).flatten(0, 1)
        h = h + torch.cat([self.attn(part) for part in self.norm1(h).split(_SEQUENCES)])
        h = h.unflatten(0, (clips, -1)).flatten(1, 2)
        h = self.proj_out(h + self.ff(self.norm2(h)))
        return x_NCHW + h.unflatten(1, (-1, frames)).permute(0, 2, 3, 1).unflatten(-1, size).flatten(0, 1)
