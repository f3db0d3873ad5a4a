"""Sequences that take turns by exact quotas: which bucket the next batch is of, which data set the next slot is of."""

from __future__ import annotations

import bisect
import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from latentray.data.permutation import mixed

Ints = npt.NDArray[np.int64]
_KEPT = 4


@dataclasses.dataclass(frozen=True)
class Turns:
    """Who has each turn of a period, and the how-manieth of its own it is."""

    who: npt.NDArray[np.uint8]
    nth: npt.NDArray[np.int32]


def turns(counts: Sequence[int], key: int) -> Turns:
    """A sequence in which party p has `counts[p]` turns, evenly spread: the i-th at about (i + phase) / counts[p].

    In any stretch of it each party has its share to within one turn and a half.
    """
    when = [
        (np.arange(count) + float(mixed(key, party)) * 2.0**-64) / max(count, 1) for party, count in enumerate(counts)
    ]
    who = np.repeat(np.arange(len(counts), dtype=np.uint8), counts)[np.argsort(np.concatenate(when), kind="stable")]
    nth = np.empty(len(who), dtype=np.int32)
    for party, count in enumerate(counts):
        nth[who == party] = np.arange(count, dtype=np.int32)
    return Turns(who, nth)


class Quotas(Protocol):
    """How many turns of each party lie before a period; it never falls from one period to the next."""

    @property
    def parties(self) -> int: ...

    def before(self, party: int, period: int) -> int: ...

    def total_before(self, period: int) -> int: ...


@dataclasses.dataclass(frozen=True)
class Proportional:
    """Quotas by fixed shares, in periods of `length` turns.

    They are differences of rounded-down cumulated shares: they add up to the period exactly, and never drift.
    """

    edges: tuple[float, ...]
    length: int

    @classmethod
    def of(cls, shares: Sequence[float], length: int) -> Proportional:
        """Shares in any unit; a period is as many times `length` as the least of them needs for a turn."""
        total = sum(shares)
        inner = [edge / total for edge in itertools.accumulate(shares)][:-1]
        least = min(share for share in shares if share) / total
        return cls((0.0, *inner, 1.0), length * math.ceil(1 / (least * length)))

    @property
    def parties(self) -> int:
        return len(self.edges) - 1

    def before(self, party: int, period: int) -> int:
        turns_before = period * self.length
        return int(self.edges[party + 1] * turns_before) - int(self.edges[party] * turns_before)

    def total_before(self, period: int) -> int:
        return period * self.length


@dataclasses.dataclass(frozen=True)
class Schedule:
    """An endless sequence of turns in periods."""

    quotas: Quotas
    key: int

    @property
    def parties(self) -> int:
        return self.quotas.parties

    def before(self, party: int, period: int) -> int:
        return self.quotas.before(party, period)

    def turn(self, t: int) -> tuple[int, int]:
        """Whose turn t is, and how many of its own lie before it."""
        period = self.period_of(t)
        found = self._turns(period)
        at = t - self._start(period)
        who = int(found.who[at])
        return who, self.before(who, period) + int(found.nth[at])

    def stretch(self, first: int, last: int) -> tuple[Ints, Ints]:
        """Turns [first, last): whose each is, and how many of its own lie before it."""
        whose, own = [], []
        while first < last:
            period = self.period_of(first)
            start, found = self._start(period), self._turns(period)
            part = slice(first - start, min(last - start, len(found.who)))
            who = found.who[part].astype(np.int64)
            before = np.array([self.before(party, period) for party in range(self.parties)], dtype=np.int64)
            whose.append(who)
            own.append(before[who] + found.nth[part])
            first = start + len(found.who)
        return np.concatenate(whose), np.concatenate(own)

    def counts(self, t: int) -> list[int]:
        """How many turns each party has had before turn t."""
        period = self.period_of(t)
        had = np.bincount(self._turns(period).who[: t - self._start(period)], minlength=self.parties)
        return [self.before(party, period) + int(had[party]) for party in range(self.parties)]

    def period_of(self, t: int) -> int:
        """The last period that begins at or before turn t: one that is not empty."""
        high = 1
        while self._start(high) <= t:
            high *= 2
        return bisect.bisect_right(range(high // 2, high), t, key=self._start) - 1 + high // 2

    def _start(self, period: int) -> int:
        return self.quotas.total_before(period)

    @functools.cached_property
    def _recent(self) -> dict[int, Turns]:
        return {}

    def _turns(self, period: int) -> Turns:
        found = self._recent.get(period)
        if found is None:
            if len(self._recent) >= _KEPT:
                self._recent.clear()
            counts = [self.before(party, period + 1) - self.before(party, period) for party in range(self.parties)]
            found = self._recent[period] = turns(counts, int(mixed(self.key, period)))
        return found
