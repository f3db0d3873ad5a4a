"""The endless order of one source: rank r of a source of n samples is sample x of epoch e, in closed form.

The line of epoch e is a bijection of [0, n) in chunks of q neighbours; the lines of all epochs follow each other. C streams
read segments of it side by side: rank r is row r // C of stream r % C. Within a stream a convolutional interleaver mixes
M chunks at a time, so that a reader that fetches whole chunks holds few of them, while a batch, one row or some rows of
all streams, is spread over the whole data set. With q = 1 every epoch is a full shuffle and nothing is interleaved.

carry: the lines join without a seam, each sample exactly once per epoch; a row may hold samples of two epochs.
drop: an epoch is the whole batches in n samples; which samples are left out differs each time.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import numpy.typing as npt

from latentray.data.permutation import chi, mixed

Ints = npt.NDArray[np.int64]
_SHIFT, _CHUNKS, _ROWS, _WITHIN = range(4)
"""What a key of an epoch is for."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reading:
    """How samples are grouped for reading; part of the order, so chosen when a run begins."""

    chunk: int = 1
    """q: neighbours that are fetched together. 1 for local disks: a full shuffle."""
    depth: int = 16
    """M: chunks that a stream holds at a time."""
    streams: int | None = None
    """C: streams read side by side; null for one per slot of the global batch."""
    drop_remainder: bool = False
    """Leave out what does not fill an epoch's last batch, instead of carrying it into the next."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Line:
    """The order of one source."""

    n: int
    key: int
    streams: int
    """C."""
    batch: int
    """What an epoch is a multiple of in drop mode: the samples of a global batch, a multiple of the streams."""
    reading: Reading

    @functools.cached_property
    def chunk(self) -> int:
        """q as it is used: a stream's epoch has at least eight chunks, or they hold one sample each."""
        return max(1, min(self.reading.chunk, (self.n // self.streams) // 8))

    @property
    def per_epoch(self) -> int:
        """Samples of an epoch: n; in drop mode the whole batches of it."""
        return self.n - self.n % self.batch if self.reading.drop_remainder else self.n

    def ranks_before(self, epoch: int) -> int:
        """How many ranks belong to rows of earlier epochs."""
        return self.per_epoch * epoch // self.streams * self.streams

    def at(self, rank: npt.ArrayLike) -> tuple[Ints, Ints]:
        """Ranks (K,) -> the epoch and the sample of each, int64 (K,)."""
        ranks = np.asarray(rank, dtype=np.int64)
        row, stream = np.divmod(ranks, self.streams)
        row_epoch = ((row + 1) * self.streams - 1) // self.per_epoch
        epochs, samples = np.empty_like(ranks), np.empty_like(ranks)
        for epoch in np.unique(row_epoch).tolist():
            here = row_epoch == epoch
            place = self._place(epoch, row[here], stream[here])
            epochs[here], u = np.divmod(place, self.n)
            samples[here] = self._sample(epochs[here], u)
        return epochs, samples

    def _place(self, epoch: int, row: Ints, stream: Ints) -> Ints:
        """Where on the joined lines the rows of an epoch stand."""
        first = self.ranks_before(epoch)
        rows = (self.ranks_before(epoch + 1) - first) // self.streams
        start = epoch * self.n if self.reading.drop_remainder else first
        i = row - first // self.streams
        q, chunks = self.chunk, rows // self.chunk
        if q == 1:
            return start + stream * rows + i
        whole = i < chunks * q
        turned = (i + stream * q // self.streams) % max(chunks * q, 1)
        r = turned // q
        j = chi(turned % q, q, mixed(self.key, epoch, _ROWS, stream, r)).astype(np.int64)
        k = (r - j * self.reading.depth // q) % max(chunks, 1)
        within = chi(j, q, mixed(self.key, epoch, _WITHIN, stream, k)).astype(np.int64)
        return start + stream * rows + np.where(whole, k * q + within, i)

    def _sample(self, epoch: Ints, u: Ints) -> Ints:
        """The sample at place u of each epoch's own line: whole chunks permuted, the short one last, all turned by rho."""
        q, full = self.chunk, self.n // self.chunk
        found = u.copy()
        for one in np.unique(epoch).tolist():
            here = (epoch == one) & (u < full * q)
            slot, within = np.divmod(u[here], q)
            chunk = chi(slot, full, int(mixed(self.key, one, _CHUNKS))).astype(np.int64)
            found[here] = chunk * q + within
            turn = int(mixed(self.key, one, _SHIFT)) % self.n if q > 1 else 0
            mine = epoch == one
            found[mine] = (found[mine] + turn) % self.n
        return found
