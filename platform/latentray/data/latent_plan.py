"""What is to be encoded, cut into parts: pure functions from an index to the work of each shard.

A picture is encoded as one or more variants. Variant `2 k + f` is its k-th cut, mirrored where f is 1; the number means the
same whatever else is stored. A unit is one variant of one picture, the grain in which latents are reused; a part is a batch
of units of one shard, the grain of work; a shard is the grain of commit.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from latentray.data.transforms import SizeConditioning, covering_size, mirrored, resized_crop
from latentray.randomness import Purpose, mix

Ints = npt.NDArray[np.int64]
VARIANTS = 64
"""Variant numbers are below this: a unit is `row * VARIANTS + variant`."""


def variants(crops: int, flips: bool) -> tuple[int, ...]:
    """The variant numbers of `crops` cuts, with `flips` each mirrored too."""
    return tuple(2 * crop + flip for crop in range(crops) for flip in ((0, 1) if flips else (0,)))


def units_of(rows: range, numbers: Sequence[int]) -> Ints:
    """The units of consecutive rows of a data set, in canonical order: by row, then variant."""
    each = np.arange(rows.start, rows.stop, dtype=np.int64)[:, None] * VARIANTS + np.asarray(numbers, np.int64)
    return each.reshape(-1)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Part:
    """Units of one shard that travel together."""

    split: int
    shard: int
    number: int
    """Within its shard."""
    units: Ints
    older: Ints
    """(units, sizes): where older stores hold these units; (0, sizes) for units to be encoded."""

    def to_row(self) -> dict[str, Any]:
        """A row of an Arrow table."""
        place = {"split": self.split, "shard": self.shard, "number": self.number}
        return place | {"units": self.units.tobytes(), "older": self.older.tobytes()}

    @classmethod
    def from_row(cls, row: Mapping[str, Any], *, sizes: int) -> Part:
        units, older = (np.frombuffer(row[name], np.int64) for name in ("units", "older"))
        place = {name: row[name] for name in ("split", "shard", "number")}
        return cls(**place, units=units, older=older.reshape(-1, sizes))


def parts_of(split: int, shard: int, units: Ints, older: Ints, batch: int) -> list[Part]:
    """The parts of a shard: units to be encoded in full batches, and those that older stores hold apart from them.

    `older` is (units, sizes), the row of each unit in the older store of each size, -1 where it is in none. There is always
    a part, so that a shard without samples is committed like the others.
    """
    held = (older >= 0).all(axis=1)
    cuts = [
        (units[chosen][i : i + batch], older[chosen][i : i + batch] if reuse else older[:0])
        for reuse, chosen in ((False, ~held), (True, held))
        for i in range(0, int(chosen.sum()), batch)
    ]
    return [
        Part(split=split, shard=shard, number=number, units=chosen, older=rows)
        for number, (chosen, rows) in enumerate(cuts or [(units, older)])
    ]


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
class Square:
    """One variant of a picture at one size."""

    pixels: npt.NDArray[np.uint8]
    """(size, size, 3)."""
    conditioning: SizeConditioning


def squares(
    pixels_HWC: npt.NDArray[np.uint8], original: tuple[int, int], size: int, numbers: Sequence[int], digest: bytes
) -> list[Square]:
    """The variants of a picture at one size: its shorter side resized to `size`, then cut.

    Cut 0 is the centre, as `decode.to_square` takes it. Where further cuts lie is drawn from the picture's sha256, so that it
    is the same in every data set. A square picture has one cut only: its others are equal.

    Args:
        pixels_HWC: the picture, decoded at any scale that covers `size`.
        original: its (height, width) in the file.
        numbers: variant numbers.
    """
    width = covering_size(original, size, size)[1]
    word = int.from_bytes(digest[:8], "big")
    found = []
    for number in numbers:
        crop, flip = divmod(number, 2)
        y, x = (mix(Purpose.CROP, word, crop, axis) * 2.0**-64 for axis in (0, 1))
        cut, top_left = resized_crop(
            pixels_HWC, size, size, crop="random" if crop else "centre", u=(y, x), original_size=original
        )
        if flip:
            cut, top_left = mirrored(cut, top_left, width)
        about = SizeConditioning(original_size=original, crop_top_left=top_left, target_size=(size, size))
        found.append(Square(pixels=cut, conditioning=about))
    return found
