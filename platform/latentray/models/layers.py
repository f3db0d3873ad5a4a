"""Building blocks that autoencoder, U-Net and discriminator share."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from latentray.errors import ConfigError
from latentray.models import fused

_FAST_FROM = 1024
"""Pixels from which torch's own GroupNorm in channels_last is vectorised."""


class GroupNorm(nn.GroupNorm):
    """torch's, with SiLU behind it where asked, and by other ways where its own is slow: bf16 in channels_last on a CPU."""

    def forward(
        self, x_BCHW: Tensor, *, silu: bool = False, add_BC: Tensor | None = None, inplace: bool = False
    ) -> Tensor:
        """norm(x + add), and SiLU of it.

        Args:
            add_BC: added to all pixels of a sample's channel.
            inplace: x may be overwritten, where no gradient is wanted.
        """
        if fused.normalises(x_BCHW, self.weight):
            return fused.group_norm(
                x_BCHW, self.weight, self.bias, add_BC, groups=self.num_groups, eps=self.eps, silu=silu, inplace=inplace
            )
        y = self._plain(x_BCHW if add_BC is None else x_BCHW + add_BC[:, :, None, None])
        return F.silu(y, inplace=not torch.is_grad_enabled()) if silu else y

    def _plain(self, x_BCHW: Tensor) -> Tensor:
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
        overwrites: without gradients its input may be overwritten.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        groups: int,
        eps: float,
        time_width: int | None = None,
        overwrites: bool = False,
    ) -> None:
        super().__init__()
        self.norm1 = group_norm(in_channels, groups, eps=eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time = nn.Linear(time_width, out_channels) if time_width is not None else None
        self.norm2 = group_norm(out_channels, groups, eps=eps)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.skip = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()
        self.overwrites = overwrites or in_channels != out_channels

    def forward(self, x_BCHW: Tensor, time_BD: Tensor | None = None) -> Tensor:
        add_BC = None
        if self.time is not None:
            assert time_BD is not None
            add_BC = self.time(F.silu(time_BD))
        h = self.norm1(x_BCHW, silu=True)
        h = self.norm2(self.conv1(h), silu=True, add_BC=add_BC, inplace=True)
        return _added(self.skip(x_BCHW), self.conv2, h, inplace=self.overwrites)


class Downsample(nn.Module):
    """3x3 convolution of stride two. `asymmetric` pads right and below only, as Stable Diffusion's autoencoder does."""

    def __init__(self, channels: int, *, asymmetric: bool) -> None:
        super().__init__()
        self.asymmetric = asymmetric
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=0 if asymmetric else 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.conv(_padded(x_BCHW) if self.asymmetric else x_BCHW)


def laid_out(x_BCHW: Tensor) -> Tensor:
    """In the memory format that all that follows takes over: on a CPU bfloat16 with channels last, where norms are fast so."""
    if x_BCHW.device.type != "cpu" or x_BCHW.dtype != torch.bfloat16 or torch.compiler.is_compiling():
        return x_BCHW
    if torch.is_grad_enabled() and not fused.available():
        return x_BCHW
    return x_BCHW.contiguous(memory_format=torch.channels_last)


def like(x_BCHW: Tensor, height: int, width: int) -> Tensor:
    """An empty map of another size, in the same memory format."""
    last = not x_BCHW.is_contiguous() and x_BCHW.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if last else torch.contiguous_format
    shape = (*x_BCHW.shape[:2], height, width)
    return torch.empty(shape, dtype=x_BCHW.dtype, device=x_BCHW.device, memory_format=layout)


def _padded(x_BCHW: Tensor) -> Tensor:
    """With a row below and a column to the right of zeros."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return F.pad(x_BCHW, (0, 1, 0, 1))
    height, width = x_BCHW.shape[-2:]
    padded = like(x_BCHW, height + 1, width + 1)  # torch's own fills all of it with zeros first
    padded[..., :height, :width] = x_BCHW
    padded[..., height, :] = 0
    padded[..., width] = 0
    return padded


def _added(skip_BCHW: Tensor, conv: nn.Conv2d, h_BCHW: Tensor, *, inplace: bool) -> Tensor:
    """skip + conv(h): where oneDNN can, into the memory of `skip`, while the convolution's result is still at hand."""
    fits = fused.is_map(skip_BCHW) and fused.is_map(h_BCHW) and conv.weight.dtype == h_BCHW.dtype
    if not (inplace and fits) or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return skip_BCHW + conv(h_BCHW)
    ones = [1, 1]
    return torch.ops.mkldnn._convolution_pointwise_.binary(
        skip_BCHW, h_BCHW, conv.weight, conv.bias, ones, ones, ones, 1, "add", 1.0, None, [], None
    )  # fmt: skip
