"""The *moving shapes* set: clips of one shape that moves along an axis and bounces off the borders, with a true caption.

Clip i of a split is a pure function of (seed, split, i), so any worker can draw any part of it. The shapes, colours and
the combinations left out of training are those of the *shapes* set.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np

from latentray.data import clips, shards, synthetic
from latentray.data.synthetic import BACKGROUNDS, COLORS, SHAPES, SIZE, SPLITS, Kind
from latentray.randomness import Purpose, mix

FRAMES = 16
FPS = 8.0
SIDE = (14.0, 24.0)
"""Least and greatest side of a shape's bounding box, in pixels: smaller than a picture's, for room to move."""
SPEED = (1.0, 3.0)
"""Least and greatest speed, in pixels per frame."""

DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
"""Word -> sign of x and y; y points down."""

_CLIPS = 1
"""The stream of draws beside that of the pictures of equal split and index."""
_CONTRAST = 32
"""Least difference from the background, summed over the colours, that counts as shape: noise of a network is below it."""
_STILL = 0.25
"""Pixels per frame."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Moving:
    """What a clip shows."""

    kind: Kind
    direction: str
    """At its beginning, and for the first half at least."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Motion:
    """What was measured in a clip."""

    direction: str
    """One of DIRECTIONS, or `still`."""
    speed: float
    """Pixels per frame."""


def moving_of(split: str, index: int) -> Moving:
    """What clip `index` of a split shows: kinds take turns, and a kind's directions do."""
    kinds = SPLITS[split].kinds
    turn, number = divmod(index, len(kinds))
    return Moving(kind=kinds[number], direction=list(DIRECTIONS)[(number + turn) % len(DIRECTIONS)])


def caption(moving: Moving) -> str:
    """`a red circle on a white background moving right`."""
    return f"{synthetic.caption(moving.kind)} moving {moving.direction}"


def path(start: float, velocity: float, room: float, frames: int) -> np.ndarray:
    """Places in [0, room] at frames 0, 1, ...: constant velocity, reflected at both ends, float64 (frames,).

    Reflection is the triangle wave of period 2 room: room - |room - (start + velocity t mod 2 room)|.
    """
    return room - np.abs(room - (start + velocity * np.arange(frames)) % (2 * room))


def draw(moving: Moving, seed: int, index: int, *, split: str = "train", frames: int = FRAMES) -> np.ndarray:
    """Clip `index` of a split: uint8 (frames, 64, 64, 3) RGB, the shape wholly inside, of random place, size and speed.

    Its first half (frames // 2 steps) is before any bounce; longer clips are slower where that needs it.
    """
    key = mix(seed, Purpose.DRAWING, SPLITS[split].number, index, _CLIPS)
    u_side, u_speed, u_along, u_across = ((mix(key, i) >> 11) * 2.0**-53 for i in range(4))
    side = SIDE[0] + (SIDE[1] - SIDE[0]) * u_side
    room, half = SIZE - side, max(frames // 2, 1)
    fastest = min(SPEED[1], room / half)
    slowest = min(SPEED[0], fastest)
    speed = slowest + (fastest - slowest) * u_speed
    sign_x, sign_y = DIRECTIONS[moving.direction]
    free = u_along * (room - speed * half)  # room left behind the shape and ahead of its first half
    along = path(free if sign_x + sign_y > 0 else room - free, (sign_x + sign_y) * speed, room, frames)
    across = np.full(frames, u_across * room)
    left_T, top_T = (along, across) if sign_x else (across, along)
    back, front = np.array(BACKGROUNDS[moving.kind.background]), np.array(COLORS[moving.kind.color])
    coverage_THW = np.stack([SHAPES[moving.kind.shape](x, y, side) for x, y in zip(left_T, top_T, strict=True)])
    return np.rint(back + coverage_THW[..., None] * (front - back)).astype(np.uint8)


def motion_of(frames_THWC: np.ndarray) -> Motion:
    """The motion of the one shape in a clip, uint8 (T, H, W, 3): where it goes first, and its median speed.

    The background is the median colour, the shape what differs from it, its place the centre of mass. The axis is the one
    of more movement; the direction is that of the median step of the first half.
    """
    x = frames_THWC.astype(np.float32)
    background = np.median(x[:, ::2, ::2], axis=(0, 1, 2))  # a quarter of the pixels says it as well
    difference_THW = np.abs(x - background).sum(axis=-1)
    weight_THW = np.where(difference_THW > _CONTRAST, difference_THW, 0)
    mass_T = weight_THW.sum(axis=(1, 2))
    if len(x) < 2 or not mass_T.all():
        return Motion(direction="still", speed=0.0)
    centre_T2 = np.stack(
        [
            (weight_THW.sum(axis=1) @ np.arange(x.shape[2])) / mass_T,
            (weight_THW.sum(axis=2) @ np.arange(x.shape[1])) / mass_T,
        ],
        axis=1,
    )
    step_T2 = np.diff(centre_T2, axis=0)
    axis = int(np.abs(step_T2).sum(axis=0).argmax())
    speed = float(np.median(np.abs(step_T2[:, axis])))
    if speed < _STILL:
        return Motion(direction="still", speed=speed)
    first = np.median(step_T2[: max(len(x) // 2, 1), axis])
    return Motion(direction=(("left", "right"), ("up", "down"))[axis][int(first > 0)], speed=speed)


def samples(
    split: str, *, seed: int, first: int = 0, count: int, frames: int = FRAMES, fps: float = FPS, form: str = "frames"
) -> Iterator[shards.Sample]:
    """Clips `first` ... `first + count - 1` of a split, to be written; `form` is one of `clips.FORMS`."""
    for number in range(first, first + count):
        moving = moving_of(split, number)
        pixels_THWC = draw(moving, seed, number, split=split, frames=frames)
        about = dataclasses.asdict(moving.kind) | {
            "direction": moving.direction,
            "source": f"moving_shapes/{split}/{number}",
        }
        yield clips.clip_sample(f"{number:09d}", pixels_THWC, fps, [caption(moving)], form=form, about=about)
