"""What a denoiser is told beside noise level and text tokens: pooled text, and SDXL's sizes (Podell et al. 2023, section 2.2)."""

from __future__ import annotations

import torch
from torch import Tensor

from latentray.config.denoiser import DenoiserConfig
from latentray.records import TextEmbedding

AESTHETIC_SCORE = 6.0
"""SDXL's refiner reads a score in the last of its five numbers; this is what it is asked for where nobody gives one."""


def conditions(config: DenoiserConfig, text: TextEmbedding, size_B6: Tensor | None) -> dict[str, Tensor]:
    """The keyword arguments of the network's call, by what it reads.

    Args:
        size_B6: original height and width, top and left of the crop, target height and width, in pixels.
    """
    found = {"pooled": text.pooled_BD} if "pooled" in config.reads else {}
    if "size" in config.reads:
        assert size_B6 is not None, "refused before the run"
        found["size"] = _numbers(size_B6, config.size_numbers)
    return found


def size_of(height: int, width: int) -> list[float]:
    """The six numbers of a picture that is drawn whole, at its own size."""
    return [height, width, 0, 0, height, width]


def _numbers(size_B6: Tensor, count: int) -> Tensor:
    if count == 5:
        return torch.cat([size_B6[:, :4], torch.full_like(size_B6[:, :1], AESTHETIC_SCORE)], dim=1)
    return size_B6[:, :count]
