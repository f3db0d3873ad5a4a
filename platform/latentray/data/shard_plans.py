"""Which sample goes to which shard: pure functions of what the survey found.

Order is the input's: parts in order, a part's samples in order. Of equal input, settings and seed the plans are equal.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from latentray.checkpoint import store
from latentray.config.build_shards import BuildShards
from latentray.data import duplicates, shards
from latentray.data.parts import Part
from latentray.data.survey import Reject, Survey

SAMPLE_BYTES = 6 << 10
"""What a sample takes beside its picture: captions, tar blocks, index row; a drawn picture too."""

_LEAST_VALIDATION = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Piece:
    """The samples of a shard that lie in one part."""

    part: Part
    rows: list[int]
    """Their rows in the part, ascending."""
    places: list[tuple[int, int, int]] = dataclasses.field(default_factory=list)
    """Of a tar's: offset, length and CRC-32C."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardPlan:
    """One output shard: what a worker needs to pack it."""

    split: str
    uri: str
    """The data set's URI."""
    name: str
    """The tar's name."""
    first: int
    """Position of the first sample in its split: samples are keyed by it."""
    pieces: list[Piece] = dataclasses.field(default_factory=list)
    """Samples to read; empty where they are drawn."""
    drawn: int = 0
    """How many to draw instead."""

    @property
    def count(self) -> int:
        return self.drawn or sum(len(piece.rows) for piece in self.pieces)

    @classmethod
    def of(cls, values: dict[str, Any]) -> ShardPlan:
        """The inverse of `dataclasses.asdict`, through JSON."""
        pieces = [piece | {"part": Part.of(piece["part"])} for piece in values["pieces"]]
        return cls(**values | {"pieces": [Piece(**piece) for piece in pieces]})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Taken:
    """The samples that go on, of all parts in order, and what became of the others."""

    table: pa.Table
    """The surveys' columns, and `part`."""
    split_bound: float
    """A sample whose draw lies below is held for validation."""
    rejected: list[Reject]
    filtered: dict[str, int]
    """Reason -> samples, of the whole input."""
    examples: list[tuple[str, str]]
    skipped: dict[str, int]

    def column(self, name: str) -> npt.NDArray[Any]:
        return self.table[name].combine_chunks().to_numpy(zero_copy_only=False)

    def rows_of(self, split: str) -> npt.NDArray[np.int64]:
        return np.flatnonzero((self.column("draw") < self.split_bound) == (split == "validation"))


def take(surveys: Sequence[Survey], config: BuildShards) -> Taken:
    """Join the surveys of all parts, in the parts' order, and leave out duplicates."""
    surveys = sorted(surveys, key=lambda one: one.part)
    numbers = [pa.array(np.full(len(one.table), one.part, np.int32)) for one in surveys]
    tables = [one.table.append_column("part", number) for one, number in zip(surveys, numbers, strict=True)]
    table = pa.concat_tables(tables).combine_chunks()
    filtered: collections.Counter[str] = collections.Counter()
    skipped: collections.Counter[str] = collections.Counter()
    for one in surveys:
        filtered.update(one.filtered)
        skipped.update(one.skipped)
    repeated = _repeated(table, config)
    if repeated.any():
        filtered[f"{config.duplicates}_duplicate"] = int(repeated.sum())
    table = table.filter(pa.array(~repeated))
    draws = table["draw"].to_numpy()
    return Taken(
        table=table,
        split_bound=split_bound(draws, config.validation_fraction),
        rejected=_with_estimates(surveys),
        filtered=dict(sorted(filtered.items())),
        examples=[example for one in surveys for example in one.examples],
        skipped=dict(sorted(skipped.items())),
    )


def _repeated(table: pa.Table, config: BuildShards) -> npt.NDArray[np.bool_]:
    if config.duplicates == "none" or not len(table):
        return np.zeros(len(table), bool)
    if config.duplicates == "exact":
        digests = table["digest"].combine_chunks()
        joined = np.frombuffer(digests.buffers()[1], np.uint8)[digests.offset * 16 : (digests.offset + len(table)) * 16]
        return duplicates.exact(joined.reshape(-1, 16))
    look, *colour = (table[name].to_numpy() for name in ("look", "red", "green", "blue"))
    return duplicates.near(look, np.stack(colour, axis=1), config.near_distance)


def _with_estimates(surveys: Sequence[Survey]) -> list[Reject]:
    """All rejects; a tar that is damaged counts as what it lacks of the median of whole tars: what it held cannot be known."""
    seen = {one.part: _samples_of(one) for one in surveys}
    cut = {one.part for one in surveys if any("samples" in reject for reject in one.rejected)}
    whole = [count for part, count in seen.items() if part not in cut]
    usual = int(np.median(whole)) if whole else 0
    found = []
    for one in surveys:
        for reject in one.rejected:
            if "samples" in reject:
                lacking = usual - seen[one.part] if whole else reject["samples"]
                reject = reject | {"samples": max(1, lacking)}
            found.append(reject)
    return found


def _samples_of(one: Survey) -> int:
    whole_rejects = sum("samples" not in reject for reject in one.rejected)
    return len(one.table) + whole_rejects + sum(one.filtered.values())


def split_bound(draw_N: npt.NDArray[np.float64], fraction: float) -> float:
    """The draw below which a sample is held for validation: a picture stays where it is when others come or go.

    With a positive fraction and two or more draws, both splits get at least one; of a small folder a tenth is kept, up to
    eight, for FID wants several.
    """
    distinct, bound = np.unique(draw_N), fraction
    if fraction > 0 and len(distinct) > 1:
        least = min(max(len(distinct) // 10, 1), _LEAST_VALIDATION)
        bound = max(bound, float(np.nextafter(distinct[least - 1], 2.0)))
    return min(bound, float(distinct[-1])) if len(distinct) else bound


def stretches(bytes_N: npt.NDArray[np.int64], *, most: int, most_bytes: int) -> Iterator[range]:
    """Positions in order, cut greedily: at most `most` a stretch, and at most `most_bytes` unless one sample alone is larger."""
    ends = np.cumsum(bytes_N)
    begin = 0
    while begin < len(ends):
        before = int(ends[begin - 1]) if begin else 0
        fits = int(np.searchsorted(ends, before + most_bytes, side="right"))
        end = min(max(fits, begin + 1), begin + most)
        yield range(begin, end)
        begin = end


def plan_drawn(config: BuildShards, uri: str, split: str, n: int) -> Iterator[ShardPlan]:
    """The shards of a drawn split."""
    for number, first in enumerate(range(0, n, config.samples_per_shard)):
        drawn = min(config.samples_per_shard, n - first)
        yield ShardPlan(
            split=split, uri=store.join(uri, split), name=shards.shard_name(number), first=first, drawn=drawn
        )


def plan_split(config: BuildShards, uri: str, split: str, taken: Taken, parts: Sequence[Part]) -> Iterator[ShardPlan]:
    """The shards of a split of the samples that were taken."""
    rows = taken.rows_of(split)
    columns = {name: taken.column(name)[rows] for name in ("part", "row", "bytes")}
    places = [taken.column(name)[rows] for name in ("offset", "length", "crc32c") if name in taken.table.column_names]
    limits = {"most": config.samples_per_shard, "most_bytes": config.shard_bytes}
    for number, stretch in enumerate(stretches(columns["bytes"], **limits)):
        here = slice(stretch.start, stretch.stop)
        cut = np.flatnonzero(np.diff(columns["part"][here])) + 1
        edges = [0, *cut.tolist(), len(stretch)]
        pieces = []
        for begin, end in itertools.pairwise(edges):
            within = slice(stretch.start + begin, stretch.start + end)
            part, row_numbers = parts[columns["part"][within.start]].narrowed(columns["row"][within].tolist())
            of_tar = list(zip(*(values[within].tolist() for values in places), strict=True))
            pieces.append(Piece(part=part, rows=row_numbers, places=of_tar))
        yield ShardPlan(
            split=split,
            uri=store.join(uri, split),
            name=shards.shard_name(number),
            first=stretch.start,
            pieces=pieces,
        )
