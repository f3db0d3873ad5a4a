"""The order of samples: a pure function of (seed, epoch), whatever the number of ranks and workers.

Positions run on one infinite line; epoch e is a keyed pseudo-random bijection of [0, n), computed per position, so that
no permutation is ever stored and any step is reached in no time. Global step k is positions [k B, (k+1) B); ranks take
contiguous slices of it.

carry mode (default): epochs join without a seam, each sample exactly once per epoch; a batch may hold two epochs.
drop mode: an epoch has floor(n / B) steps and leaves out n mod B samples, other ones each time.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from latentray.checkpoint import store
from latentray.errors import ConfigError, FingerprintMismatch
from latentray.randomness import Purpose, mix
from latentray.records import SampleId

Words: TypeAlias = npt.NDArray[np.uint64]

VERSION = 1
"""Of the algorithm; part of the fingerprint."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cursor:
    """The next step that was not consumed. The trainer saves it in the same checkpoint as the weights."""

    version: int
    fingerprint: str
    epoch: int
    step: int

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Cursor:
        return cls(**values)


@dataclasses.dataclass(frozen=True)
class Order:
    """The order of one data set of `n` samples in global batches."""

    n: int
    seed: int
    global_batch: int
    drop_remainder: bool = False
    dataset: int = 0
    """Number of the data set in the run's mixture."""

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ConfigError("The data set has no samples.", where="data", mend="Give a data set that has some.")
        if self.global_batch < 1:
            raise ConfigError(
                "A batch has at least one sample.", where="global_batch_size", mend="Set it to 1 or more."
            )
        if self.drop_remainder and self.n < self.global_batch:
            raise ConfigError(
                f"An epoch would have no step: the global batch is {self.global_batch}, the data set {self.n} samples.",
                where="global_batch_size",
                mend=f"Set it to {self.n} or less, or keep the remainder.",
            )

    @property
    def samples_per_epoch(self) -> int:
        """n; in drop mode the whole batches of it."""
        return self.n - self.n % self.global_batch if self.drop_remainder else self.n

    def steps_in(self, epochs: float) -> int:
        """Whole steps in so many epochs."""
        return math.floor(self.samples_per_epoch * epochs / self.global_batch)

    def epoch_of(self, step: int) -> int:
        """The epoch of a step's first sample."""
        return step * self.global_batch // self.samples_per_epoch

    def sample(self, position: int) -> SampleId:
        """The sample at a position of the line."""
        return self._samples(position, position + 1)[0]

    def step(self, k: int) -> list[SampleId]:
        """Global step k: `global_batch` samples."""
        return self._samples(k * self.global_batch, (k + 1) * self.global_batch)

    def share(self, k: int, rank: int, world: int) -> list[SampleId]:
        """The contiguous slice of step k that a rank takes; ConfigError where `world` does not divide the batch."""
        require_divides(self.global_batch, world)
        return self.slots(k, self.global_batch * rank // world, self.global_batch * (rank + 1) // world)

    def slots(self, k: int, first: int, last: int) -> list[SampleId]:
        """Slots [first, last) of step k."""
        start = k * self.global_batch
        return self._samples(start + first, start + last)

    def fingerprint(self, index_digest: str) -> str:
        """What must be equal for a cursor to mean the same: algorithm, data, seed, batch, mode."""
        return store.digest_of(
            {
                "algorithm": VERSION,
                "index": index_digest,
                "seed": self.seed,
                "global_batch": self.global_batch,
                "drop_remainder": self.drop_remainder,
                "dataset": self.dataset,
            }
        )

    def cursor(self, step: int, index_digest: str) -> Cursor:
        """The cursor of `step`, the next one to consume."""
        return Cursor(version=VERSION, fingerprint=self.fingerprint(index_digest), epoch=self.epoch_of(step), step=step)

    def resume(self, cursor: Cursor, index_digest: str) -> int:
        """The step a cursor stands at. Raises FingerprintMismatch where it belongs to another order."""
        if cursor.version != VERSION or cursor.fingerprint != self.fingerprint(index_digest):
            raise FingerprintMismatch(
                "The checkpoint's place in the data belongs to another order: data set, seed or global batch differ.",
                where="data",
                mend="Resume with the settings the run began with, or begin a new run.",
            )
        return cursor.step

    def _samples(self, first: int, last: int) -> list[SampleId]:
        per_epoch = self.samples_per_epoch
        found: list[SampleId] = []
        while first < last:
            epoch, u = divmod(first, per_epoch)
            take = min(last - first, per_epoch - u)
            index = chi(np.arange(u, u + take, dtype=np.uint64), self.n, self._key(epoch))
            found += [SampleId(epoch=epoch, dataset=self.dataset, index=x) for x in index.tolist()]
            first += take
        return found

    def _key(self, epoch: int) -> int:
        return mix(self.seed, Purpose.ORDER, self.dataset, epoch)


def require_divides(global_batch: int, world: int) -> None:
    """Raise ConfigError unless every rank gets an equal slice of the global batch, naming the worlds that would."""
    if world < 1 or global_batch % world:
        divisors = [d for d in range(1, global_batch + 1) if global_batch % d == 0]
        raise ConfigError(
            f"{world} workers do not divide a global batch of {global_batch}.",
            where="global_batch_size",
            mend=f"Use a number of workers among {', '.join(map(str, divisors))}, or another global_batch_size.",
        )


def chi(u: Words, n: int, key: int) -> Words:
    """A keyed bijection of [0, n), elementwise: uint64 (K,) -> uint64 (K,).

    An alternating Feistel network on Z_a x Z_b with a = ceil(sqrt n), a b >= n (Black & Rogaway 2002, "Ciphers with
    arbitrary finite domains"), rounds by splitmix64; values that leave [0, n) walk the cycle until they are back.
    """
    a = math.isqrt(n - 1) + 1
    b = -(-n // a)
    rounds = _round_keys(key, 10 if n < 256 else 6)
    x = _feistel(np.asarray(u, dtype=np.uint64), a, b, rounds)
    while (outside := x >= n).any():
        x[outside] = _feistel(x[outside], a, b, rounds)
    return x


@functools.lru_cache(maxsize=64)
def _round_keys(key: int, rounds: int) -> tuple[np.uint64, ...]:
    return tuple(np.uint64(mix(key, r)) for r in range(rounds))


def _feistel(x: Words, a: int, b: int, rounds: tuple[np.uint64, ...]) -> Words:
    size_a, size_b = np.uint64(a), np.uint64(b)
    left: Words = x // size_b
    right: Words = x % size_b
    for number, key in enumerate(rounds):
        if number % 2 == 0:
            left = (left + _hash(right, key) % size_a) % size_a
        else:
            right = (right + _hash(left, key) % size_b) % size_b
    return left * size_b + right


def _hash(x: Words, key: np.uint64) -> Words:
    """splitmix64's finaliser of key + x golden; uint64 arithmetic wraps around."""
    x = x * np.uint64(0x9E3779B97F4A7C15) + key
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
