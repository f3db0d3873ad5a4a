"""Aspect-ratio buckets: pictures of like shape share a batch, so that little is cut (NovelAI 2022; SDXL, section 2.3).

A bucket is a shape and the size of its global batch. A sample's bucket follows from the width and height in the index:
no picture is opened, and nothing is scanned. Pictures are cut to the shape that fits them best (`assign`); stored latents
have one already (`exact`).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from latentray.data.index import Index
from latentray.data.lines import Ints
from latentray.errors import ConfigError, DataError

_MOST = 256
"""A bucket's number is a byte."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bucket:
    """Pictures of one shape."""

    size: int
    """Resolution: the side of the square that has as many pixels, or somewhat more."""
    height: int
    width: int
    """Pixels."""
    batch: int
    """Samples in its global batch."""


def shapes(size: int, *, step: int, max_aspect: float) -> list[tuple[int, int]]:
    """(height, width) of all buckets at one resolution: multiples of `step`, at most size^2 pixels, as wide as fits.

    For size 1024, step 64 and aspect 4 these are SDXL's (appendix I lists forty of them, by a slightly other rule).
    """
    found = set()
    for short in range(step, size + 1, step):
        long = size * size // short // step * step
        if long / short <= max_aspect:
            found |= {(short, long), (long, short)}
    return sorted(found)


def table(
    sizes: Sequence[int], *, step: int, max_aspect: float, pixel_budget: int, multiple: int
) -> tuple[Bucket, ...]:
    """Buckets of several resolutions whose global batches have about equally many pixels, so that steps take equal time.

    Args:
        sizes: side of the square of each resolution, in pixels.
        step: what heights and widths are multiples of.
        pixel_budget: most pixels in a global batch.
        multiple: what the batch size is rounded down to: workers divide it.

    Raises ConfigError where the budget holds fewer than `multiple` of the largest pictures.
    """
    made = []
    for size in sizes:
        if size % step:
            raise ConfigError(f"{size} is no multiple of {step}.", where="buckets.sizes", mend="Change one of them.")
        made += [
            _bucket(size, shape, pixel_budget, multiple) for shape in shapes(size, step=step, max_aspect=max_aspect)
        ]
    return _few(made)


def table_of(shapes: Sequence[tuple[int, int]], *, pixel_budget: int, multiple: int) -> tuple[Bucket, ...]:
    """Buckets of given shapes, (height, width): those of stored latents. Otherwise as `table`."""
    sides = [math.isqrt(height * width - 1) + 1 for height, width in shapes]
    return _few([_bucket(side, shape, pixel_budget, multiple) for side, shape in zip(sides, shapes, strict=True)])


def _bucket(size: int, shape: tuple[int, int], pixel_budget: int, multiple: int) -> Bucket:
    height, width = shape
    batch = pixel_budget // (height * width) // multiple * multiple
    if batch < 1:
        raise ConfigError(
            f"{pixel_budget} pixels, the most in a global batch, hold fewer than {multiple} pictures of {width}x{height}.",
            where="buckets.multiple",
            mend="Lower it, or raise global_batch_size.",
        )
    return Bucket(size=size, height=height, width=width, batch=batch)


def _few(made: Sequence[Bucket]) -> tuple[Bucket, ...]:
    if len(made) > _MOST:
        raise ConfigError(
            f"{len(made)} buckets are more than {_MOST}.",
            where="buckets.step",
            mend="Raise buckets.step or name fewer sizes.",
        )
    return tuple(made)


Placing = Callable[[npt.ArrayLike, npt.ArrayLike, Sequence[Bucket]], npt.NDArray[np.uint8]]
"""Widths and heights, (N,) each -> the number of each sample's bucket, (N,)."""


def assign(width_N: npt.ArrayLike, height_N: npt.ArrayLike, buckets: Sequence[Bucket]) -> npt.NDArray[np.uint8]:
    """The bucket of each picture, (N,): of the greatest resolution it fills (else the least), the nearest aspect ratio.

    Nearness is in the logarithm: 2:1 is as far from the square as 1:2.
    """
    pixels = np.asarray(width_N, np.int64) * np.asarray(height_N, np.int64)
    aspect = np.log(np.asarray(width_N, np.float64) / np.asarray(height_N, np.float64))
    by_size: dict[int, list[int]] = {}
    for number, one in enumerate(buckets):
        by_size.setdefault(one.size, []).append(number)
    chosen = np.zeros(len(pixels), np.uint8)
    for place, (size, numbers) in enumerate(sorted(by_size.items())):
        own = np.log([buckets[number].width / buckets[number].height for number in numbers])
        order = np.argsort(own, kind="stable")
        edges = (own[order][1:] + own[order][:-1]) / 2
        mine = np.ones(len(pixels), bool) if place == 0 else pixels >= size * size
        chosen[mine] = np.asarray(numbers)[order][np.searchsorted(edges, aspect[mine])]
    return chosen


def exact(width_N: npt.ArrayLike, height_N: npt.ArrayLike, buckets: Sequence[Bucket]) -> npt.NDArray[np.uint8]:
    """The bucket of each sample, (N,): that of its very shape. Raises DataError for a shape that has none."""
    width, height = np.asarray(width_N, np.int64), np.asarray(height_N, np.int64)
    known = np.array([(one.height << 32) + one.width for one in buckets], np.int64)
    order = np.argsort(known)
    asked = (height << 32) + width
    chosen = order[np.searchsorted(known[order], asked).clip(max=len(known) - 1)]
    missing = np.flatnonzero(known[chosen] != asked)
    if len(missing):
        one = f"{width[missing[0]]}x{height[missing[0]]}"
        raise DataError(
            f"{len(missing)} latents have shapes that their store does not name, {one} among them.",
            where="buckets of the store's manifest",
            mend="Precompute the latents again.",
        )
    return chosen.astype(np.uint8)


class Bucketed:
    """The samples of a data set, by bucket: what an Order reads along. Raises DataError for an index without sizes."""

    def __init__(self, opened: Index, digest: str, buckets: Sequence[Bucket], placing: Placing = assign):
        self.buckets = tuple(buckets)
        self._digest = digest
        if not {"width", "height"} <= set(opened.table.column_names):
            raise DataError(
                "The index does not say how large the pictures are.",
                where=str(opened.path),
                mend="Build the data set again.",
            )
        self._bucket = placing(opened.numbers("width"), opened.numbers("height"), self.buckets)
        self._first = opened.first
        shard = np.repeat(np.arange(len(opened.shards)), np.diff(opened.first))
        counts = np.bincount(shard * len(self.buckets) + self._bucket, minlength=len(opened.shards) * len(self.buckets))
        self._before = np.zeros((len(opened.shards) + 1, len(self.buckets)), np.int64)
        np.cumsum(counts.reshape(-1, len(self.buckets)), axis=0, out=self._before[1:])

    @property
    def counts(self) -> tuple[int, ...]:
        return tuple(self._before[-1].tolist())

    @property
    def identity(self) -> Mapping[str, Any]:
        return {"index": self._digest, "buckets": [dataclasses.asdict(one) for one in self.buckets]}

    def index(self, bucket: int, ordinals: Ints) -> Ints:
        """Numbers within a bucket -> positions in the data set: two look-ups, by shard, then within it."""
        shards = np.searchsorted(self._before[:, bucket], ordinals, side="right") - 1
        within = ordinals - self._before[shards, bucket]
        return np.array(
            [self._rows(int(s), bucket)[i] for s, i in zip(shards, within, strict=True)], dtype=np.int64
        ).reshape(-1)

    @functools.lru_cache(maxsize=4096)  # noqa: B019  (it lives as long as its process)
    def _rows(self, shard: int, bucket: int) -> Ints:
        first, last = self._first[shard], self._first[shard + 1]
        return np.flatnonzero(self._bucket[first:last] == bucket) + first
