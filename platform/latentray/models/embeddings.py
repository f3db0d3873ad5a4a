"""What joins a network beside its latent and text tokens: time, pooled text, sizes, class labels, positions."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from latentray.errors import ConfigError

_LABEL_STD = 0.02


def sinusoidal_embedding(t_B: Tensor, width: int, *, max_period: float = 10_000.0) -> Tensor:
    """(...) numbers -> (..., width): cosines, then sines, of t at geometric frequencies (Vaswani et al. 2017).

    Computed in float32 whatever the network's dtype: bf16 cannot tell t = 997 from 998.
    """
    half = width // 2
    frequencies = torch.exp(-math.log(max_period) * torch.arange(half, dtype=torch.float32, device=t_B.device) / half)
    angles = t_B.float()[..., None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def grid_positions(width: int, grid: int, base: int, *, max_period: float = 10_000.0) -> Tensor:
    """(grid, grid, width) float32: sines and cosines of a token's column, then of its row (Peebles & Xie 2023).

    Coordinates run over [0, base) whatever the grid, so that a finer grid lies within the coarse one's range.
    """
    place = (torch.arange(grid, dtype=torch.float32) / (grid / base)).double()
    frequencies = 1.0 / max_period ** (torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    angles = torch.outer(place, frequencies)
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)
    columns, rows = waves[None].expand(grid, -1, -1), waves[:, None].expand(-1, grid, -1)
    return torch.cat([columns, rows], dim=-1).float()


def required(value: Tensor | None, name: str) -> Tensor:
    """The condition itself. Raises ConfigError where the network reads it and did not get it."""
    if value is None:
        raise ConfigError(
            f"The network reads {name}, and got none.", where=name, mend="Give it with each call of the network."
        )
    return value


class Perceptron(nn.Module):
    """Linear, SiLU, Linear: how every embedding is brought to the width that it is added at."""

    def __init__(self, in_width: int, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(in_width, width), nn.Linear(width, width)

    def forward(self, x_BD: Tensor) -> Tensor:
        return self.second(F.silu(self.first(x_BD)))


class AddedConditions(nn.Module):
    """Pooled text and the size numbers' Fourier features, side by side, as one vector (Podell et al. 2023, section 2.2).

    Args:
        pooled_width: width of the pooled text embedding; None for none.
        size_numbers: how many numbers say the size; 0 for none.
        size_width: width of the Fourier features of each.
        width: width of the result.
    """

    def __init__(self, *, pooled_width: int | None, size_numbers: int, size_width: int, width: int) -> None:
        super().__init__()
        self.reads_pooled, self.size_numbers, self.size_width = pooled_width is not None, size_numbers, size_width
        self.project = Perceptron((pooled_width or 0) + size_numbers * size_width, width)

    def forward(self, pooled_BD: Tensor | None, size_BN: Tensor | None, dtype: torch.dtype) -> Tensor:
        parts = []
        if self.reads_pooled:
            parts.append(required(pooled_BD, "pooled").to(dtype))
        if self.size_numbers:
            size = required(size_BN, "size")
            if size.shape[-1] != self.size_numbers:
                raise ConfigError(
                    f"The network reads {self.size_numbers} size numbers, and got {size.shape[-1]}.",
                    where="size",
                    mend="Pass as many as denoiser.size_numbers says.",
                )
            parts.append(sinusoidal_embedding(size, self.size_width).flatten(1).to(dtype))
        return self.project(torch.cat(parts, dim=1))


class ClassEmbedding(nn.Embedding):
    """A vector per class, and one for the null class, whose label is the number of classes (Ho & Salimans 2022)."""

    def __init__(self, classes: int, width: int) -> None:
        super().__init__(classes + 1, width)
        nn.init.normal_(self.weight, std=_LABEL_STD)
