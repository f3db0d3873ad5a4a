"""Which sizes a model draws."""

from __future__ import annotations

import re

from latentray.errors import RequestRefused
from serving.messages import ModelInfo
from serving.refusals import shown

SMALLEST, LARGEST = 0.5, 2.0
"""Sides allowed, in multiples of the model's own; far from its training size a model repeats objects."""
_SIZE = re.compile(r"([1-9]\d{0,4})x([1-9]\d{0,4})")


def size_of(size: str | None, info: ModelInfo) -> tuple[int, int]:
    """(width, height) in pixels of a `size` field; the model's own where it is left out or `auto`."""
    if size is None or size == "auto":
        return info.size, info.size
    match = _SIZE.fullmatch(size)
    if match is None:
        raise RequestRefused(
            f"Invalid size {shown(size)}: give '<width>x<height>', as in '{info.size}x{info.size}', or 'auto'.",
            param="size",
        )
    width, height = int(match[1]), int(match[2])
    if not drawable(width, height, info):
        raise RequestRefused(f"Invalid size {shown(size)}: {bounds_of(info)}.", param="size")
    return width, height


def drawable(width: int, height: int, info: ModelInfo) -> bool:
    """Whether the model draws pictures of so many pixels."""
    low, high = _sides(info)
    return all(low <= side <= high and side % info.downsampling == 0 for side in (width, height))


def bounds_of(info: ModelInfo) -> str:
    """What is drawable, in words."""
    low, high = _sides(info)
    return f"width and height must be multiples of {info.downsampling} between {low} and {high}"


def _sides(info: ModelInfo) -> tuple[int, int]:
    step = info.downsampling
    return -(-int(info.size * SMALLEST) // step) * step, int(info.size * LARGEST) // step * step
