"""Enlarging a feature map: nearest-neighbour copies and a convolution, in one where only the result counts."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from latentray.models.layers import like


class Upsample(nn.Module):
    """Nearest-neighbour by two, or to the height and width given, then a 3x3 convolution.

    Of the nine pixels that the convolution sees only four differ: each of the four places that a pixel is copied to has a
    2x2 convolution of its own, with sums of the same weights (Shi et al. 2016, section 2). On a CPU these are taken where no
    gradient is wanted, for 4/9 of the work.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self._folded: tuple[Tensor, int, list[Tensor]] | None = None

    def forward(self, x_BCHW: Tensor, size: torch.Size | None = None) -> Tensor:
        twice = size is None or tuple(size) == (2 * x_BCHW.shape[-2], 2 * x_BCHW.shape[-1])
        if not twice:
            return self.conv(F.interpolate(x_BCHW, size=size, mode="nearest"))
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or x_BCHW.device.type != "cpu":
            return self.conv(F.interpolate(x_BCHW, scale_factor=2.0, mode="nearest"))
        return self.by_parts(x_BCHW)

    def by_parts(self, x_BCHW: Tensor) -> Tensor:
        """The same by four convolutions, one for each parity of row and column."""
        height, width = x_BCHW.shape[-2:]
        out = like(x_BCHW, 2 * height, 2 * width)
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


def _is_same(kept: Tensor, weight: Tensor) -> bool:
    return kept.data_ptr() == weight.data_ptr() and kept.dtype == weight.dtype and kept.stride() == weight.stride()


def _folded(weight: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Three taps on copied pixels as two taps on the pixels themselves: of the first copy, of the second."""
    before, here, after = weight.split(1, dim)
    return torch.cat([before, here + after], dim), torch.cat([before + here, after], dim)
