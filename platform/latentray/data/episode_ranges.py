"""The ranges of a data set's actions and vectors: measured once, and kept beside it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from latentray.checkpoint import store
from latentray.conditioning.observations import Range
from latentray.data import episodes, members
from latentray.data.episodes import Episode
from latentray.data.shards import IndexedShards
from latentray.errors import DataError, DigestMismatch, SampleRejected

NAME = "ranges.json"
"""Beside the splits of a data set: the training split's digest and the ranges found in it."""


def of_sets(sets: Sequence[IndexedShards], *, skip_damaged: bool = False) -> dict[str, Range]:
    """`episodes.ranges` of all data sets together. Every episode is read where it was not done before.

    Raises DataError as `episodes.ranges`, and for an episode that cannot be read unless those are skipped.
    """
    found = [_of_set(one, skip_damaged=skip_damaged) for one in sets]
    for one, where in zip(found[1:], sets[1:], strict=True):
        if {name: value.low.shape for name, value in one.items()} != {n: v.low.shape for n, v in found[0].items()}:
            raise DataError(
                "Its actions or observations are not those of the first data set.",
                where=where.uri,
                mend="Mix data sets of one robot.",
            )
    total = found[0]
    for one in found[1:]:
        total = {name: value.merged(one[name]) for name, value in total.items()}
    return total


def readable(opened: IndexedShards, *, skip_damaged: bool = False) -> Iterator[Episode]:
    """The episodes of a data set, in its order. Raises DataError for one that cannot be used, unless those are skipped."""
    for x in range(opened.count):
        try:
            yield episodes.read_episode(members.decode_sample(opened.read(x)))
        except (DataError, DigestMismatch, SampleRejected) as error:
            if skip_damaged:
                continue
            raise DataError(
                f"The episode {opened.key(x)!r} cannot be used: {error.what}",
                where=opened.uri,
                mend="Build the data set without it, or skip such episodes (damage.policy=skip).",
            ) from None


def _of_set(opened: IndexedShards, *, skip_damaged: bool) -> dict[str, Range]:
    beside = store.join(store.parent(opened.uri), NAME)
    kept = store.read_json(beside) if store.exists(beside) else {}
    if isinstance(kept, dict) and kept.get("digest") == opened.digest:
        return _from_json(kept["ranges"])
    found = episodes.ranges(readable(opened, skip_damaged=skip_damaged))
    with contextlib.suppress(OSError):  # a data set that nobody may write to is measured again by each who reads it
        store.write_json(beside, {"digest": opened.digest, "ranges": {n: one.to_json() for n, one in found.items()}})
    return found


def _from_json(value: Mapping[str, Any]) -> dict[str, Range]:
    return {name: Range.from_json(one) for name, one in value.items()}
