"""Building blocks of autoencoders: those of U-Nets without a time embedding, and by faster ways where no gradient is wanted."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from latentray.models.fused_norm import fits, silu_of_norm
from latentray.models.layers import group_norm

_EPS = 1e-6


class ResBlock(nn.Module):
    """GroupNorm, SiLU, 3x3 convolution, twice, around an identity or 1x1 skip. Without gradients its input may be overwritten."""

    def __init__(self, in_channels: int, out_channels: int, *, groups: int) -> None:
        super().__init__()
        self.norm1 = group_norm(in_channels, groups, eps=_EPS)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = group_norm(out_channels, groups, eps=_EPS)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.skip = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x_BCHW: Tensor) -> Tensor:
        h = self.conv1(silu_of_norm(self.norm1, x_BCHW))
        return _onto(self.skip(x_BCHW), self.conv2, silu_of_norm(self.norm2, h, inplace=True))


class Downsample(nn.Module):
    """3x3 convolution of stride two, padded right and below only, as in Stable Diffusion's autoencoder."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self.conv(F.pad(x_BCHW, (0, 1, 0, 1)))
        height, width = x_BCHW.shape[-2:]
        padded = _like(x_BCHW, height + 1, width + 1)  # torch's own fills all of it with zeros first
        padded[..., :height, :width] = x_BCHW
        padded[..., height, :] = 0
        padded[..., width] = 0
        return self.conv(padded)


class Upsample(nn.Module):
    """Nearest-neighbour by two, then a 3x3 convolution.

    Of the nine pixels that the convolution sees only four differ: each of the four places that a pixel is copied to has a
    2x2 convolution of its own, with sums of the same weights (Shi et al. 2016, section 2). On a CPU these are taken, for
    4/9 of the work.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self._folded: tuple[Tensor, int, list[Tensor]] | None = None

    def forward(self, x_BCHW: Tensor) -> Tensor:
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or x_BCHW.device.type != "cpu":
            return self.conv(F.interpolate(x_BCHW, scale_factor=2.0, mode="nearest"))
        return self.by_parts(x_BCHW)

    def by_parts(self, x_BCHW: Tensor) -> Tensor:
        """The same by four convolutions, one for each parity of row and column."""
        height, width = x_BCHW.shape[-2:]
        out = _like(x_BCHW, 2 * height, 2 * width)
        for number, weight in enumerate(self._weights()):
            row, column = divmod(number, 2)
            part = F.conv2d(x_BCHW, weight, self.conv.bias, padding=1)  # of odd places the first is one too early
            out[..., row::2, column::2] = part[..., row : row + height, column : column + width]
        return out

    def _weights(self) -> list[Tensor]:
        """2x2 kernels of the four places, kept as long as the weight is the same."""
        weight = self.conv.weight
        version = 0 if weight.is_inference() else weight._version
        # The weight that was folded is held, so that no other can come to lie at its address.
        if self._folded is None or not _is_same(self._folded[0], weight) or self._folded[1] != version:
            rows = _folded(weight.float(), 2)
            made = [both for row in rows for both in _folded(row, 3)]
            layout = torch.contiguous_format if weight.is_contiguous() else torch.channels_last
            self._folded = (
                weight.data,
                version,
                [one.to(weight.dtype).contiguous(memory_format=layout) for one in made],
            )
        return self._folded[2]


def laid_out(x_BCHW: Tensor) -> Tensor:
    """In the memory format that all that follows takes over: channels last where convolutions in bfloat16 are fastest so."""
    if torch.is_grad_enabled() or x_BCHW.dtype != torch.bfloat16:
        return x_BCHW
    return x_BCHW.contiguous(memory_format=torch.channels_last)


def _onto(skip_BCHW: Tensor, conv: nn.Conv2d, h_BCHW: Tensor) -> Tensor:
    """skip + conv(h): where oneDNN can, into the memory of `skip`, while the convolution's result is still at hand."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or not (fits(skip_BCHW) and fits(h_BCHW)):
        return skip_BCHW + conv(h_BCHW)
    ones = [1, 1]
    return torch.ops.mkldnn._convolution_pointwise_.binary(
        skip_BCHW, h_BCHW, conv.weight, conv.bias, ones, ones, ones, 1, "add", 1.0, None, [], None
    )  # fmt: skip


def _like(x_BCHW: Tensor, height: int, width: int) -> Tensor:
    """An empty map of another size, in the same memory format."""
    last = not x_BCHW.is_contiguous() and x_BCHW.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if last else torch.contiguous_format
    shape = (*x_BCHW.shape[:2], height, width)
    return torch.empty(shape, dtype=x_BCHW.dtype, device=x_BCHW.device, memory_format=layout)


def _is_same(kept: Tensor, weight: Tensor) -> bool:
    return kept.data_ptr() == weight.data_ptr() and kept.dtype == weight.dtype and kept.stride() == weight.stride()


def _folded(weight: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Three taps on copied pixels as two taps on the pixels themselves: of the first copy, of the second."""
    before, here, after = weight.split(1, dim)
    return torch.cat([before, here + after], dim), torch.cat([before + here, after], dim)
