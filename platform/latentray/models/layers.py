"""Building blocks that autoencoder, U-Net and discriminator share."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from latentray.errors import ConfigError
from latentray.models.fused_norm import silu_of_norm

_FAST_FROM = 1024
"""Pixels from which torch's own GroupNorm in channels_last is vectorised."""


class GroupNorm(nn.GroupNorm):
    """torch's, by another way where its own is slow: small bf16 maps in channels_last on a CPU, without gradients."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or not _slow_to_normalise(x_BCHW):
            return super().forward(x_BCHW)
        weight, bias = self.weight.float(), self.bias.float()
        out = torch.empty_like(x_BCHW)
        for row, x_1CHW in zip(out.split(1), x_BCHW.split(1), strict=True):  # its float32 copy stays in the cache
            row.copy_(F.group_norm(x_1CHW.float(), self.num_groups, weight, bias, self.eps))
        return out


def _slow_to_normalise(x_BCHW: Tensor) -> bool:
    if x_BCHW.device.type != "cpu" or x_BCHW.dtype != torch.bfloat16 or x_BCHW.shape[-2:].numel() >= _FAST_FROM:
        return False
    return not x_BCHW.is_contiguous() and x_BCHW.is_contiguous(memory_format=torch.channels_last)


def group_norm(channels: int, groups: int, *, eps: float) -> GroupNorm:
    """GroupNorm that refuses channels the groups do not divide, at construction."""
    if channels % groups:
        raise ConfigError(
            f"{channels} channels do not divide into {groups} groups.",
            where="groups",
            mend="Choose channels as multiples of it.",
        )
    return GroupNorm(groups, channels, eps=eps)


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
        h = self.conv1(silu_of_norm(self.norm1, x_BCHW))
        if self.time is not None:
            assert time_BD is not None
            h = h + self.time(F.silu(time_BD))[:, :, None, None]
        h = self.conv2(silu_of_norm(self.norm2, h, inplace=True))
        return self.skip(x_BCHW) + h


class Upsample(nn.Module):
    """Nearest-neighbour by two, or to the height and width given, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x_BCHW: Tensor, size: torch.Size | None = None) -> Tensor:
        factor = 2.0 if size is None else None
        return self.conv(F.interpolate(x_BCHW, size=size, scale_factor=factor, mode="nearest"))


class Downsample(nn.Module):
    """3x3 convolution of stride two. `asymmetric` pads right and below only, as Stable Diffusion's autoencoder does."""

    def __init__(self, channels: int, *, asymmetric: bool) -> None:
        super().__init__()
        self.asymmetric = asymmetric
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=0 if asymmetric else 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.conv(F.pad(x_BCHW, (0, 1, 0, 1)) if self.asymmetric else x_BCHW)
