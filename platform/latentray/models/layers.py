"""Building blocks that autoencoder, U-Net and discriminator share."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from latentray.errors import ConfigError


def group_norm(channels: int, groups: int, *, eps: float) -> nn.GroupNorm:
    """GroupNorm that refuses channels the groups do not divide, at construction."""
    if channels % groups:
        raise ConfigError(
            f"{channels} channels do not divide into {groups} groups.",
            where="groups",
            mend="Choose channels as multiples of it.",
        )
    return nn.GroupNorm(groups, channels, eps=eps)


def sinusoidal_embedding(t_B: Tensor, width: int, *, max_period: float = 10_000.0) -> Tensor:
    """(B,) timesteps -> (B, width): cosines, then sines, of t at geometric frequencies (Vaswani et al. 2017).

    Computed in float32 whatever the network's dtype: bf16 cannot tell t = 997 from 998.
    """
    half = width // 2
    frequencies = torch.exp(-math.log(max_period) * torch.arange(half, dtype=torch.float32, device=t_B.device) / half)
    angles = t_B.float()[:, None] * frequencies[None]
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class ResBlock(nn.Module):
    """GroupNorm, SiLU, 3x3 convolution, twice, around an identity or 1x1 skip; a time embedding is added between.

    Args:
        time_width: width of the time embedding, or None (autoencoder).
    """

    def __init__(
        self, in_channels: int, out_channels: int, *, groups: int, eps: float, time_width: int | None = None
    ) -> None:
        super().__init__()
        self.norm1 = group_norm(in_channels, groups, eps=eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time = nn.Linear(time_width, out_channels) if time_width is not None else None
        self.norm2 = group_norm(out_channels, groups, eps=eps)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.skip = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x_BCHW: Tensor, time_BD: Tensor | None = None) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x_BCHW)))
        if self.time is not None:
            assert time_BD is not None
            h = h + self.time(F.silu(time_BD))[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return self.skip(x_BCHW) + h


class Upsample(nn.Module):
    """Nearest-neighbour by two, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.conv(F.interpolate(x_BCHW, scale_factor=2.0, mode="nearest"))


class Downsample(nn.Module):
    """3x3 convolution of stride two. `asymmetric` pads right and below only, as Stable Diffusion's autoencoder does."""

    def __init__(self, channels: int, *, asymmetric: bool) -> None:
        super().__init__()
        self.asymmetric = asymmetric
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=0 if asymmetric else 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.conv(F.pad(x_BCHW, (0, 1, 0, 1)) if self.asymmetric else x_BCHW)
