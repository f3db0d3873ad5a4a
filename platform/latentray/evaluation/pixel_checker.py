"""Reads colour, shape and background of a *shapes* picture from its pixels, without any network.

The background is the border's plain colour, the colour is the foreground's median. Pixels nearer to the latter are the
shape: blur and anti-aliasing leave that outline where it was. It is the circle, square or upright triangle whose ideal
form, of the same area and centroid, overlaps it best.
Whatever is in doubt is None: a blank or noise is called neither.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from latentray.data.synthetic import BACKGROUNDS, COLORS, Kind

BORDER = 2
"""Width in pixels of the frame that tells the background."""

MAX_BORDER_SPREAD = 40.0
"""Median RGB distance of the frame's pixels from their median, above which there is no plain background."""

MAX_BACKGROUND_DISTANCE = 60.0
"""RGB distance from the nearest background, above which it is none of them (they are 196 or more apart)."""

MIN_CONTRAST = 36.0
"""RGB distance from the background that makes a foreground pixel (purple on gray, the nearest pair, is 95 away)."""

MIN_AREA = 50.0
"""Least area of a shape in pixels."""

MAX_COLOR_DISTANCE = 65.0
"""RGB distance from the nearest colour, above which it is none of them (yellow and orange are 71 apart)."""

MAX_COLOR_SPREAD = 45.0
"""Median RGB distance of the inner pixels from their median, above which the shape has no one colour."""

MIN_OVERLAP = 0.80
"""Least intersection over union with the ideal shape of equal area and centroid; below it is no shape. A circle and a
square of one area overlap by 0.83, a triangle and either of them by 0.72 or less."""

MIN_LEAD = 0.015
"""How much better than the second best the overlap must be, else the shape is in doubt."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reading:
    """What a picture shows; None where it shows none of the known, or more than one."""

    color: str | None
    shape: str | None
    background: str | None


NOTHING = Reading(color=None, shape=None, background=None)


def read(pixels_HWC: np.ndarray) -> Reading:
    """Read one picture, uint8 (H, W, 3) RGB."""
    pixels = pixels_HWC.astype(np.float64)
    frame = np.ones(pixels.shape[:2], dtype=bool)
    frame[BORDER:-BORDER, BORDER:-BORDER] = False
    back = np.median(pixels[frame], axis=0)
    if np.median(np.linalg.norm(pixels[frame] - back, axis=1)) > MAX_BORDER_SPREAD:
        return NOTHING
    background = _nearest(back, BACKGROUNDS, MAX_BACKGROUND_DISTANCE)
    nothing = dataclasses.replace(NOTHING, background=background)

    contrast = np.linalg.norm(pixels - back, axis=2)
    inner = _eroded(contrast > MIN_CONTRAST)
    if inner.sum() < MIN_AREA / 4:
        return nothing
    core = inner & (contrast >= np.median(contrast[inner]))  # of a blurred shape, the part that is not mixed
    front = np.median(pixels[core], axis=0)
    axis = front - back
    mask = (pixels - back) @ axis > 0.5 * (axis @ axis)  # nearer to the foreground: where edges are half covered
    inner = _eroded(mask)
    if not inner.any() or np.median(np.linalg.norm(pixels[inner] - front, axis=1)) > MAX_COLOR_SPREAD:
        return nothing
    shape = _shape(mask)
    return Reading(color=_nearest(front, COLORS, MAX_COLOR_DISTANCE), shape=shape, background=background)


def accuracy(pictures: Sequence[np.ndarray], kinds: Sequence[Kind]) -> dict[str, float]:
    """Share of pictures, each uint8 (H, W, 3), whose `color`, `shape` and `background` read as their kind says."""
    if len(pictures) != len(kinds) or not len(kinds):
        raise ValueError(f"{len(pictures)} pictures for {len(kinds)} kinds")
    readings = [read(picture) for picture in pictures]
    return {
        field.name: float(
            np.mean([getattr(r, field.name) == getattr(k, field.name) for r, k in zip(readings, kinds, strict=True)])
        )
        for field in dataclasses.fields(Reading)
    }


def _nearest(color: np.ndarray, table: Mapping[str, tuple[int, int, int]], limit: float) -> str | None:
    distances = {name: float(np.linalg.norm(color - np.array(rgb))) for name, rgb in table.items()}
    name = min(distances, key=distances.__getitem__)
    return name if distances[name] <= limit else None


def _eroded(mask: np.ndarray) -> np.ndarray:
    """Pixels whose four neighbours are in the mask too: off the blended edge."""
    padded = np.pad(mask, 1)
    return mask & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]


def _shape(mask_HW: np.ndarray) -> str | None:
    """The ideal shape that overlaps best, of the mask's own area and centroid: corners that a blur cut off cost a little
    overlap, where they would move a bounding box by much."""
    area = float(mask_HW.sum())
    if area < MIN_AREA:
        return None
    y, x = np.nonzero(mask_HW)
    overlaps = {}
    for name, ideal in _IDEALS.items():
        template = ideal(*_grid(mask_HW.shape, x.mean(), y.mean()), area)
        overlaps[name] = float((mask_HW & template).sum() / (mask_HW | template).sum())
    best, second = sorted(overlaps, key=overlaps.__getitem__, reverse=True)[:2]
    sure = overlaps[best] >= MIN_OVERLAP and overlaps[best] - overlaps[second] >= MIN_LEAD
    return best if sure else None


def _grid(shape: tuple[int, int], x: float, y: float) -> tuple[np.ndarray, np.ndarray]:
    """Pixel coordinates relative to a point, (1, W) and (H, 1)."""
    return np.arange(shape[1])[None] - x, np.arange(shape[0])[:, None] - y


def _circle(x: np.ndarray, y: np.ndarray, area: float) -> np.ndarray:
    return x**2 + y**2 <= area / np.pi


def _square(x: np.ndarray, y: np.ndarray, area: float) -> np.ndarray:
    return np.maximum(np.abs(x), np.abs(y)) <= np.sqrt(area) / 2


def _triangle(x: np.ndarray, y: np.ndarray, area: float) -> np.ndarray:
    side = np.sqrt(2 * area)  # as wide as high; the centroid lies a third of the height above the base
    down = y + 2 * side / 3
    return (down >= 0) & (down <= side) & (np.abs(x) <= down / 2)


_IDEALS: Mapping[str, Callable] = {"circle": _circle, "square": _square, "triangle": _triangle}
