"""What is to be encoded, cut into parts: pure functions from an index to the work of each shard.

A picture, or a clip, is encoded as one or more variants. Variant `2 k + f` is its k-th cut, mirrored where f is 1; the
number means the same whatever else is stored. A unit is one variant of one picture, the grain in which latents are reused;
a part is a batch of units of one shard and one shape, the grain of work; a shard is the grain of commit.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from latentray.data import buckets
from latentray.data.transforms import SizeConditioning, covering_size, mirrored, resized_crop
from latentray.errors import ConfigError
from latentray.randomness import Purpose, mix

Ints = npt.NDArray[np.int64]
Shape = tuple[int, int]
"""(height, width), pixels."""
VARIANTS = 64
"""Variant numbers are below this: a unit is `row * VARIANTS + variant`."""
_MOST_BUCKETS = 256


def variants(crops: int, flips: bool) -> tuple[int, ...]:
    """The variant numbers of `crops` cuts, with `flips` each mirrored too."""
    return tuple(2 * crop + flip for crop in range(crops) for flip in ((0, 1) if flips else (0,)))


def units_of(rows: range, numbers: Sequence[int]) -> Ints:
    """The units of consecutive rows of a data set, in canonical order: by row, then variant."""
    each = np.arange(rows.start, rows.stop, dtype=np.int64)[:, None] * VARIANTS + np.asarray(numbers, np.int64)
    return each.reshape(-1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shapes:
    """The shapes that pictures are cut to, of the buckets of several resolutions."""

    table: tuple[buckets.Bucket, ...]

    @classmethod
    def of(cls, sizes: Sequence[int], *, step: int, max_aspect: float) -> Shapes:
        """Raises ConfigError for more than 256 buckets."""
        table = tuple(
            buckets.Bucket(size=size, height=height, width=width, batch=1)
            for size in sizes
            for height, width in buckets.shapes(size, step=step, max_aspect=max_aspect)
        )
        if len(table) > _MOST_BUCKETS:
            raise ConfigError(
                f"{len(table)} buckets are more than {_MOST_BUCKETS}.",
                where="buckets.step",
                mend="Raise buckets.step or name fewer sizes.",
            )
        return cls(table=table)

    @property
    def all(self) -> tuple[Shape, ...]:
        """Each shape once, ascending: two resolutions may share one."""
        return tuple(sorted({(one.height, one.width) for one in self.table}))

    def assign(self, width_N: npt.ArrayLike, height_N: npt.ArrayLike) -> Ints:
        """(N,): the number in `all` of each picture's shape."""
        place = {shape: number for number, shape in enumerate(self.all)}
        numbers = np.array([place[one.height, one.width] for one in self.table], np.int64)
        return numbers[buckets.assign(width_N, height_N, self.table)]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Part:
    """Units of one shard and one shape that travel together."""

    split: int
    shard: int
    number: int
    """Within its shard."""
    bucket: int
    """The number of their shape; 0 where all have one."""
    units: Ints
    older: Ints
    """(units, stores): where older stores hold these units; (0, stores) for units to be encoded."""

    def to_row(self) -> dict[str, Any]:
        """A row of an Arrow table."""
        place = {"split": self.split, "shard": self.shard, "number": self.number, "bucket": self.bucket}
        return place | {"units": self.units.tobytes(), "older": self.older.tobytes()}

    @classmethod
    def from_row(cls, row: Mapping[str, Any], *, stores: int) -> Part:
        units, older = (np.frombuffer(row[name], np.int64) for name in ("units", "older"))
        place = {name: row[name] for name in ("split", "shard", "number", "bucket")}
        return cls(**place, units=units, older=older.reshape(-1, stores))


def parts_of(split: int, shard: int, units: Ints, bucket: Ints, older: Ints, batch: int) -> list[Part]:
    """The parts of a shard: units to be encoded in full batches of one shape, and those that older stores hold apart.

    There is always a part, so that a shard without samples is committed like the others.

    Args:
        bucket: (units,), the number of each unit's shape.
        older: (units, stores), the row of each unit in the older store of each, -1 where it is in none.
        batch: the most units of a part.
    """
    held = (older >= 0).all(axis=1)
    cuts = []
    for reuse in (False, True):
        for number in np.unique(bucket[held == reuse]).tolist():
            chosen = np.flatnonzero((held == reuse) & (bucket == number))
            cuts += [(number, reuse, chosen[i : i + batch]) for i in range(0, len(chosen), batch)]
    empty = np.empty(0, np.int64)
    return [
        Part(
            split=split,
            shard=shard,
            number=number,
            bucket=of,
            units=units[chosen],
            older=older[chosen if reuse else empty],
        )
        for number, (of, reuse, chosen) in enumerate(cuts or [(0, False, empty)])
    ]


def fill(parts: Sequence[Part], frames: int, batch: int) -> float:
    """The share of what is encoded that is no padding: units of so many frames, in batches of so many frames."""
    counts = np.array([len(part.units) * frames for part in parts], np.int64)
    return float(counts.sum() / max((-(-counts // batch) * batch).sum(), 1))


class Gathering:
    """Which parts each shard still waits for. Pure bookkeeping: what comes twice, after a retry, counts once."""

    def __init__(self, wanted: Mapping[tuple[int, int], int]) -> None:
        """`wanted`: the number of parts of each (split, shard)."""
        self._wanted = dict(wanted)
        self._names: dict[tuple[int, int], dict[int, str]] = collections.defaultdict(dict)

    def arrived(self, shard: tuple[int, int], number: int, name: str) -> list[str] | None:
        """Take in a part's file name; the names of all parts of its shard once none is missing, and only then."""
        if shard not in self._wanted:
            return None
        names = self._names[shard]
        names[number] = name
        if len(names) < self._wanted[shard]:
            return None
        del self._wanted[shard], self._names[shard]
        return [names[i] for i in sorted(names)]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Cut:
    """One variant of a picture or clip at one shape."""

    pixels: npt.NDArray[np.uint8]
    """(height, width, 3); of a clip (T, height, width, 3)."""
    conditioning: SizeConditioning
    begin: float = 0.0
    """Of a clip: its first frame's time in the whole, in seconds."""


def cut(pixels: npt.NDArray[np.uint8], original: Shape, shape: Shape, number: int, digest: bytes) -> Cut:
    """A variant at one shape: resized to just cover it, then cut, all frames alike.

    Cut 0 is the centre, as `decode.to_size` takes it. Where further cuts lie is drawn from the file's sha256, so that it is
    the same in every data set. Where nothing is too long there is one cut only: the others are equal.

    Args:
        pixels: (H, W, 3) or (T, H, W, 3), decoded at any scale that covers `shape`.
        original: its (height, width) in the file.
        number: of the variant.
    """
    height, width = shape
    crop, flip = divmod(number, 2)
    name = "random" if crop else "centre"
    u = (_draw(digest, crop, 0), _draw(digest, crop, 1))
    done = []
    for frame in pixels if pixels.ndim == 4 else pixels[None]:
        one, top_left = resized_crop(frame, height, width, crop=name, u=u, original_size=original)
        if flip:
            one, top_left = mirrored(one, top_left, covering_size(original, height, width)[1])
        done.append(one)
    about = SizeConditioning(original_size=original, crop_top_left=top_left, target_size=shape)
    return Cut(pixels=np.stack(done) if pixels.ndim == 4 else done[0], conditioning=about)


def start(number: int, digest: bytes) -> float:
    """Where among its possible starts a variant of a clip begins, in [0, 1): cut 0 with the first, others as drawn."""
    crop = number // 2
    return _draw(digest, crop, 2) if crop else 0.0


def _draw(digest: bytes, crop: int, axis: int) -> float:
    """In [0, 1): for y, x and time."""
    return (mix(Purpose.CROP, int.from_bytes(digest[:8], "big"), crop, axis) >> 11) * 2.0**-53
