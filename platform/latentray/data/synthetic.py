"""The *shapes* set: 64x64 pictures of one anti-aliased shape, with a caption that says all there is to see.

Picture i of a split is a pure function of (seed, split, i), so any worker can draw any part of it. Three of the 54
combinations are left out of training, to see whether a model composes what it saw apart.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from latentray.randomness import Purpose, mix

SIZE = 64
"""Height and width in pixels."""

SIDE = (22.0, 44.0)
"""Least and greatest side of a shape's bounding box, in pixels."""

COLORS = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 80, 220),
    "yellow": (240, 210, 40),
    "purple": (150, 60, 190),
    "orange": (245, 140, 30),
}
BACKGROUNDS = {"white": (245, 245, 245), "black": (15, 15, 15), "gray": (128, 128, 128)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kind:
    """One combination of colour, shape and background."""

    color: str
    shape: str
    background: str


def _circle(left: float, top: float, side: float) -> np.ndarray:
    radius = side / 2
    x, y = _centres()
    return np.clip(radius + 0.5 - np.hypot(x - (left + radius), y - (top + radius)), 0, 1)


def _square(left: float, top: float, side: float) -> np.ndarray:
    pixel = np.arange(SIZE)  # exact: the overlap of [i, i+1] and the side, per axis
    across = np.clip(np.minimum(pixel + 1, left + side) - np.maximum(pixel, left), 0, 1)
    down = np.clip(np.minimum(pixel + 1, top + side) - np.maximum(pixel, top), 0, 1)
    return down[:, None] * across[None, :]


def _triangle(left: float, top: float, side: float) -> np.ndarray:
    x, y = _centres()
    from_axis = np.abs(x - (left + side / 2))
    slanted = (from_axis - (y - top) / 2) * (2 / np.sqrt(5))  # signed distance to the two equal sides (slope 2)
    return np.clip(0.5 - np.maximum(slanted, y - (top + side)), 0, 1)


SHAPES = {"circle": _circle, "square": _square, "triangle": _triangle}
"""Name -> coverage(left, top, side), float (64, 64) in [0, 1]: the share of each pixel that the shape covers."""

KINDS = tuple(Kind(color=c, shape=s, background=b) for c in COLORS for s in SHAPES for b in BACKGROUNDS)
"""All 54 combinations."""

UNSEEN = (
    Kind(color="red", shape="triangle", background="black"),
    Kind(color="blue", shape="square", background="white"),
    Kind(color="orange", shape="circle", background="gray"),
)
"""Left out of training; distinct colours, shapes and backgrounds."""

SEEN = tuple(kind for kind in KINDS if kind not in UNSEEN)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Split:
    """A part of the set; its kinds take turns, so they are balanced to within one picture."""

    number: int
    """The split's own stream of random draws."""
    kinds: tuple[Kind, ...]
    default_n: int


SPLITS = {
    "train": Split(number=0, kinds=SEEN, default_n=10200),
    "validation": Split(number=1, kinds=KINDS, default_n=432),
}


def kind_of(split: str, index: int) -> Kind:
    """The kind of picture `index` of a split."""
    kinds = SPLITS[split].kinds
    return kinds[index % len(kinds)]


def caption(kind: Kind) -> str:
    """`a red circle on a white background`: one template for all kinds, `a orange ...` included."""
    return f"a {kind.color} {kind.shape} on a {kind.background} background"


def draw(kind: Kind, seed: int, index: int, *, split: str = "train") -> np.ndarray:
    """Picture `index` of a split: uint8 (64, 64, 3) RGB, the shape wholly inside at a random place and size."""
    key = mix(seed, Purpose.DRAWING, SPLITS[split].number, index)
    u_side, u_left, u_top = ((mix(key, i) >> 11) * 2.0**-53 for i in range(3))
    side = SIDE[0] + (SIDE[1] - SIDE[0]) * u_side
    coverage = SHAPES[kind.shape](u_left * (SIZE - side), u_top * (SIZE - side), side)
    back, front = np.array(BACKGROUNDS[kind.background]), np.array(COLORS[kind.color])
    return np.rint(back + coverage[:, :, None] * (front - back)).astype(np.uint8)


@functools.cache
def _centres() -> tuple[np.ndarray, np.ndarray]:
    """x (1, 64) and y (64, 1) of the pixel centres."""
    centre = np.arange(SIZE) + 0.5
    return centre[None, :], centre[:, None]
