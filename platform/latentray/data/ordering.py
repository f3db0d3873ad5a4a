"""The order of samples: a pure function of (seed, data sets, step), whatever the number of ranks and workers.

A step is one global batch. With buckets each batch is of one bucket, with a mixture each slot is of one data set; both
take turns by exact quotas, and each (data set, bucket) is read along an endless line of its own (`lines.py`). Nothing is
stored but the number of the next step: any step, at any world size, is reached in no time.

The slots of a batch are sorted by stream, and ranks take contiguous slices of them: a rank reads its own streams only.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from latentray.checkpoint import store
from latentray.data.lines import Ints, Line, Reading
from latentray.data.patterns import Proportional, Schedule
from latentray.errors import ConfigError, FingerprintMismatch
from latentray.randomness import Purpose, mix
from latentray.records import SampleId

VERSION = 2
"""Of the algorithm; part of the fingerprint."""

FULL_SHUFFLE = Reading()
"""Of every epoch: what local disks allow."""

_PLAN_STEPS = 1024
"""Batches in a period of a mixture's buckets, and, of slots, batches in a period of its data sets."""
_BUCKETS, _SLOTS = "buckets", "slots"


class SampleSet(Protocol):
    """The samples of one data set, as the order sees them."""

    @property
    def counts(self) -> tuple[int, ...]:
        """Samples in each bucket; one number where there are no buckets."""

    @property
    def identity(self) -> Mapping[str, Any]:
        """What must not change under a cursor."""

    def index(self, bucket: int, ordinals: Ints) -> Ints:
        """Numbers within a bucket -> positions in the data set's canonical order."""


@dataclasses.dataclass(frozen=True)
class Whole:
    """A data set without buckets."""

    n: int
    digest: str = ""
    """Of its index."""

    @property
    def counts(self) -> tuple[int, ...]:
        return (self.n,)

    @property
    def identity(self) -> Mapping[str, Any]:
        return {"index": self.digest, "samples": self.n}

    def index(self, bucket: int, ordinals: Ints) -> Ints:
        return ordinals


@dataclasses.dataclass(frozen=True, kw_only=True)
class Segment:
    """From which step on a mixture has which weights, and how far each of its lines was read by then."""

    first_step: int
    weights: tuple[float, ...]
    """Share of each data set in the samples drawn."""
    positions: tuple[tuple[int, ...], ...]
    """Ranks consumed of each (data set, bucket)."""
    samples: int
    """Samples consumed before `first_step`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cursor:
    """The next step that was not consumed. The trainer saves it in the same checkpoint as the weights."""

    version: int
    fingerprint: str
    epoch: int
    step: int
    segments: tuple[Segment, ...] = ()
    """Of a mixture: its weights so far."""
    damaged: int = 0
    """Samples found damaged before, as the trainer counts them."""

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Cursor:
        segments = tuple(
            Segment(**one | {"weights": tuple(one["weights"]), "positions": tuple(map(tuple, one["positions"]))})
            for one in values.get("segments", ())
        )
        return cls(**values | {"segments": segments})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """One global batch, or a slice of it."""

    bucket: int
    ids: list[SampleId]


@dataclasses.dataclass(frozen=True)
class Order:
    """The order of one data set, or of a mixture of several, in global batches.

    Raises ConfigError for an empty data set or bucket, a batch that has no sample, streams that do not divide it, a weight
    that is not positive, or a drop mode that would have no step.
    """

    sets: tuple[SampleSet, ...]
    seed: int
    batches: tuple[int, ...]
    """Samples in a global batch of each bucket."""
    reading: Reading = FULL_SHUFFLE
    segments: tuple[Segment, ...] = ()
    """Of a mixture."""

    @classmethod
    def of(cls, n: int, seed: int, global_batch: int, *, digest: str = "", reading: Reading = FULL_SHUFFLE) -> Order:
        """The order of one data set of `n` samples without buckets."""
        return cls((Whole(n, digest),), seed, (global_batch,), reading)

    @classmethod
    def mixture(
        cls,
        sets: Sequence[SampleSet],
        weights: Sequence[float],
        seed: int,
        batches: Sequence[int],
        reading: Reading = FULL_SHUFFLE,
    ) -> Order:
        """Data sets that are drawn from in proportion to `weights` (of samples), each along its own line."""
        none = tuple((0,) * len(batches) for _ in sets)
        first = Segment(first_step=0, weights=_normal(weights), positions=none, samples=0)
        return cls(tuple(sets), seed, tuple(batches), reading, (first,))

    def __post_init__(self) -> None:
        for batch in self.batches:
            if batch < 1:
                raise ConfigError(
                    "A batch has at least one sample.", where="global_batch_size", mend="Set it to 1 or more."
                )
        for number, one in enumerate(self.sets):
            if not sum(one.counts):
                raise ConfigError(
                    "The data set has no samples.", where=f"data[{number}]", mend="Give a data set that has some."
                )
        if self.segments:
            return
        for count, batch in zip(self.sets[0].counts, self.batches, strict=True):
            if self.reading.streams and batch % self.reading.streams:
                raise ConfigError(
                    f"{self.reading.streams} streams do not divide a global batch of {batch}.",
                    where="order.streams",
                    mend="Use a divisor of global_batch_size, or null for one stream per slot.",
                )
            if self.reading.drop_remainder and 0 < count < batch:
                raise ConfigError(
                    f"An epoch would have no step: the global batch is {batch}, the data {count} samples.",
                    where="global_batch_size",
                    mend=f"Set it to {count} or less, or keep the remainder (order.drop_remainder=false).",
                )

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_made"}

    # ---- what there is at a step

    def step(self, t: int) -> Step:
        """Global step t."""
        bucket, k = self._batch(t)
        return Step(bucket=bucket, ids=self._slots(t, bucket, k, 0, self.batches[bucket]))

    def part(self, t: int, part: int, parts: int) -> Step:
        """Slice `part` of `parts` of step t: what a rank, or one loader worker of a rank, takes."""
        bucket, k = self._batch(t)
        batch = self.batches[bucket]
        return Step(bucket=bucket, ids=self._slots(t, bucket, k, batch * part // parts, batch * (part + 1) // parts))

    def batch_size(self, t: int) -> int:
        """Samples in the global batch of step t."""
        return self.batches[self._batch(t)[0]]

    def samples_before(self, t: int) -> int:
        """Samples in all steps before t."""
        segment = self._segment(t)
        base, t = (segment.samples, t - segment.first_step) if segment else (0, t)
        if len(self.batches) == 1:
            return base + t * self.batches[0]
        counts = self._bucket_turns(segment).counts(t)
        return base + sum(count * batch for count, batch in zip(counts, self.batches, strict=True))

    def epoch_of(self, t: int) -> int:
        """The epoch of step t: of its first sample, or, in a mixture, of the data set that was gone through least."""
        if self.segments:
            return int(min(self.epochs_before(t)))
        if len(self.batches) == 1:
            return t * self.batches[0] // self._line(0, 0).per_epoch
        return self._bucket_turns(None).period_of(t)

    def epochs_before(self, t: int) -> list[float]:
        """How often each data set was gone through before step t."""
        if not self.segments:
            per_epoch = sum(self._line(0, b).per_epoch for b in range(len(self.batches)) if self.sets[0].counts[b])
            return [self.samples_before(t) / per_epoch]
        read = self._positions(t)
        return [sum(ranks) / sum(one.counts) for ranks, one in zip(read, self.sets, strict=True)]

    @property
    def dropped_per_epoch(self) -> int:
        """Samples that an epoch leaves out, other ones each time; 0 unless the remainder is dropped."""
        if self.segments:
            return 0
        lines = [self._line(0, b) for b in range(len(self.batches)) if self.sets[0].counts[b]]
        return sum(line.n - line.per_epoch for line in lines)

    def steps_in(self, epochs: float) -> int:
        """Whole steps in so many epochs of the data set, or of all data sets of a mixture together."""
        return self.steps_to(epochs * (sum(sum(one.counts) for one in self.sets) - self.dropped_per_epoch))

    def steps_to(self, samples: float) -> int:
        """Whole steps in so many samples."""
        if len(self.batches) == 1:
            return int(samples // self.batches[0])
        low, high = 0, 1
        while self.samples_before(high) <= samples:
            low, high = high, high * 2
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.samples_before(middle) <= samples else (low, middle)
        return low

    # ---- resuming

    @property
    def fingerprint(self) -> str:
        """What must be equal for a cursor to mean the same. A mixture's weights are not in it: they may change."""
        return store.digest_of(
            {
                "algorithm": VERSION,
                "sets": [dict(one.identity) for one in self.sets],
                "seed": self.seed,
                "batches": self.batches,
                "reading": dataclasses.asdict(self.reading),
                "mixture": bool(self.segments),
            }
        )

    def cursor(self, t: int, *, damaged: int = 0) -> Cursor:
        """The cursor of step t, the next one to consume."""
        return Cursor(
            version=VERSION,
            fingerprint=self.fingerprint,
            epoch=self.epoch_of(t),
            step=t,
            segments=self.segments,
            damaged=damaged,
        )

    def resume(self, cursor: Cursor) -> Order:
        """This order as it goes on at a cursor; its step is where. Weights that differ hold from there on.

        Raises FingerprintMismatch where the cursor belongs to another order.
        """
        if cursor.version != VERSION or cursor.fingerprint != self.fingerprint:
            raise FingerprintMismatch(
                "The checkpoint's place in the data belongs to another order: data, seed, batch or reading differ.",
                where="data",
                mend="Resume with the settings the run began with, or begin a new run.",
            )
        if not self.segments:
            return self
        wanted, so_far = self.segments[-1].weights, dataclasses.replace(self, segments=cursor.segments)
        if so_far.segments[-1].weights == wanted:
            return so_far
        new = Segment(
            first_step=cursor.step,
            weights=wanted,
            positions=so_far._positions(cursor.step),
            samples=so_far.samples_before(cursor.step),
        )
        return dataclasses.replace(so_far, segments=(*so_far.segments, new))

    # ---- how it is done

    def _segment(self, t: int) -> Segment | None:
        return next((one for one in reversed(self.segments) if one.first_step <= t), None)

    def _batch(self, t: int) -> tuple[int, int]:
        """The bucket of step t, and how many batches of that bucket its segment had before."""
        segment = self._segment(t)
        since = t - segment.first_step if segment else t
        return (0, since) if len(self.batches) == 1 else self._bucket_turns(segment).turn(since)

    def _slots(self, t: int, bucket: int, k: int, first: int, last: int) -> list[SampleId]:
        """Slots [first, last) of batch k of a bucket."""
        batch = self.batches[bucket]
        segment = self._segment(t)
        if segment is None:
            streams = self._line(0, bucket).streams
            stream, row = np.divmod(np.arange(first, last, dtype=np.int64), batch // streams)
            return self._ids(0, bucket, k * batch + row * streams + stream)
        whose, own = self._slot_turns(segment, bucket).stretch(k * batch, (k + 1) * batch)
        places = np.empty(batch)
        for number, _ in enumerate(self.sets):
            mine = whose == number
            own[mine] += segment.positions[number][bucket]
            streams = self._line(number, bucket).streams
            places[mine] = (own[mine] % streams + 0.5) / streams
        chosen = np.argsort(places, kind="stable")[first:last]
        found: list[SampleId] = [None] * len(chosen)  # type: ignore[list-item]
        for number in np.unique(whose[chosen]).tolist():
            at = np.flatnonzero(whose[chosen] == number)
            for i, one in zip(at.tolist(), self._ids(number, bucket, own[chosen[at]]), strict=True):
                found[i] = one
        return found

    def _ids(self, dataset: int, bucket: int, ranks: Ints) -> list[SampleId]:
        epochs, ordinals = self._line(dataset, bucket).at(ranks)
        indices = self.sets[dataset].index(bucket, ordinals)
        return [
            SampleId(epoch=epoch, dataset=dataset, index=index)
            for epoch, index in zip(epochs.tolist(), indices.tolist(), strict=True)
        ]

    @functools.cached_property
    def _made(self) -> dict[Any, Any]:
        """Lines and schedules, made when they are first wanted."""
        return {}

    def _line(self, dataset: int, bucket: int) -> Line:
        found = self._made.get((dataset, bucket))
        if found is None:
            found = self._made[dataset, bucket] = self._new_line(dataset, bucket)
        return found

    def _new_line(self, dataset: int, bucket: int) -> Line:
        batch = self.batches[bucket]
        streams = self.reading.streams or batch
        if self.segments:  # about as many as its slots in a batch, so that a stream stays with its rank
            shares = self._shares(self.segments[0], bucket)
            streams = max(1, round(streams * shares[dataset] / sum(shares)))
        return Line(
            n=self.sets[dataset].counts[bucket],
            key=mix(self.seed, Purpose.ORDER, dataset, bucket),
            streams=streams,
            batch=batch,
            reading=self.reading if not self.segments else dataclasses.replace(self.reading, drop_remainder=False),
        )

    def _shares(self, segment: Segment, bucket: int) -> list[float]:
        """How often a sample of each data set falls into this bucket: w_d n_db / n_d."""
        return [
            weight * one.counts[bucket] / sum(one.counts)
            for weight, one in zip(segment.weights, self.sets, strict=True)
        ]

    def _bucket_turns(self, segment: Segment | None) -> Schedule:
        """Which bucket each batch of a segment is of."""
        first = segment.first_step if segment else None
        if (_BUCKETS, first) not in self._made:
            self._made[_BUCKETS, first] = self._new_bucket_turns(segment)
        return self._made[_BUCKETS, first]

    def _new_bucket_turns(self, segment: Segment | None) -> Schedule:
        key = mix(self.seed, Purpose.BUCKET_TURNS, segment.first_step if segment else 0)
        if segment is None:
            lines = tuple(self._line(0, b) if n else None for b, n in enumerate(self.sets[0].counts))
            return Schedule(_Epochs(lines), key)
        rates = [sum(self._shares(segment, b)) / batch for b, batch in enumerate(self.batches)]
        return Schedule(Proportional.of(rates, _PLAN_STEPS), key)

    def _slot_turns(self, segment: Segment, bucket: int) -> Schedule:
        """Which data set each slot of a segment's batches of a bucket is of."""
        at = (_SLOTS, segment.first_step, bucket)
        if at not in self._made:
            self._made[at] = self._new_slot_turns(segment, bucket)
        return self._made[at]

    def _new_slot_turns(self, segment: Segment, bucket: int) -> Schedule:
        key = mix(self.seed, Purpose.SLOT_TURNS, bucket, segment.first_step)
        return Schedule(Proportional.of(self._shares(segment, bucket), self.batches[bucket]), key)

    def _positions(self, t: int) -> tuple[tuple[int, ...], ...]:
        """Ranks consumed of each (data set, bucket) before step t of a mixture."""
        segment = self._segment(t)
        assert segment is not None
        since = t - segment.first_step
        batches = [since] if len(self.batches) == 1 else self._bucket_turns(segment).counts(since)
        drawn = [
            self._slot_turns(segment, b).counts(k * self.batches[b]) if k else [0] * len(self.sets)
            for b, k in enumerate(batches)
        ]
        return tuple(
            tuple(had + drawn[b][number] for b, had in enumerate(segment.positions[number]))
            for number in range(len(self.sets))
        )


@dataclasses.dataclass(frozen=True)
class _Epochs:
    """Quotas of the buckets of one data set: in each epoch, as many batches as its line has."""

    lines: tuple[Line | None, ...]

    @property
    def parties(self) -> int:
        return len(self.lines)

    def before(self, party: int, period: int) -> int:
        line = self.lines[party]
        return line.ranks_before(period) // line.batch if line else 0

    def total_before(self, period: int) -> int:
        return sum(self.before(party, period) for party in range(self.parties))


def _normal(weights: Sequence[float]) -> tuple[float, ...]:
    for number, weight in enumerate(weights):
        if not weight > 0:
            raise ConfigError(
                f"A weight of {weight!r} would never draw from the data set.",
                where=f"mixture[{number}].weight",
                mend="Give a positive weight, or leave the data set out.",
            )
    return tuple(weight / sum(weights) for weight in weights)


def require_divides(global_batch: int, world: int) -> None:
    """Raise ConfigError unless every rank gets an equal slice of the global batch, naming the worlds that would."""
    if world < 1 or global_batch % world:
        divisors = [d for d in range(1, global_batch + 1) if global_batch % d == 0]
        raise ConfigError(
            f"{world} workers do not divide a global batch of {global_batch}.",
            where="global_batch_size",
            mend=f"Use a number of workers among {', '.join(map(str, divisors))}, or another global_batch_size.",
        )
