"""Shards as a stream, for sets that have no index: a first look at them, or training where exactness is not asked for.

A reader is one loader worker of one rank. In each epoch the shards are dealt anew among the readers, by a permutation of
(seed, epoch); a reader goes through its shards one after the other, its samples through a shuffle buffer, and then on to
the next epoch. It reads a shard by ranges of some MiB, from front to back, and nothing is unpacked to a disk.

What is exact: an epoch's shards are dealt to readers without overlap or rest, so all readers together see each sample once
in it; ranks take equal numbers of steps, without end or up to a step that is given; damage is never silent: a damaged
sample, and a damaged tar, keep a place with weight 0 and are counted once an epoch.

What is not: readers whose shards hold less are in their next epoch sooner, so a number of steps is an epoch only where
readers divide the shards and the batch, and shards are equal; the order depends on the number of readers; how many samples
lie behind the damage in a tar cannot be known, nor that a whole tar was replaced by another, unless its sha256 is given;
and after a resume an epoch begins anew (`StreamPlace`): its samples come at least once. `build_shards` adopts a set where
it lies and gives it the index that exactness needs (`ordering.py`).
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import numpy as np
from torch.utils.data import get_worker_info
from webdataset import shardlists

from latentray.checkpoint import store
from latentray.data import members, stretches, tars
from latentray.data.blocks import BlockCache
from latentray.data.damage import DAMAGED, damaged
from latentray.data.ordering import require_divides
from latentray.data.permutation import chi
from latentray.data.picture_batches import picture_batches
from latentray.data.pipeline import Sample
from latentray.data.shards import CACHE_BYTES
from latentray.data.transforms import Augment
from latentray.errors import ConfigError, DataError, InputMissing, SampleRejected, UnsafeMember
from latentray.randomness import Purpose, mix
from latentray.records import PictureBatch, SampleId, Traffic

SHUFFLE = 1000
SHUFFLE_BYTES = 256 << 20
_SHARD_BITS = 32
"""A sample's index is its shard's number, and in so many bits its number there."""
_SHARDS, _PICKS = range(2)
"""What a key is for."""
_GRACE = 10
"""Damaged samples that end no run: a share of few samples says nothing."""
_LOST = frozenset({tars.DAMAGED, "missing", "digest", "members"})
"""Reasons of damage that cost the rest of a tar."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StreamPlace:
    """How far a run came; small, and the same at any number of ranks.

    A resumed run goes through `epoch` from its beginning, in another order than before, so that a run that is interrupted
    often does not see the first shards only.
    """

    epoch: int = 0
    """The first that is not complete."""
    steps: int = 0
    """Steps consumed."""

    def after(self, batch: PictureBatch) -> StreamPlace:
        """The place of one rank behind its next batch."""
        return StreamPlace(epoch=min(one.epoch for one in batch.ids), steps=self.steps + 1)

    @classmethod
    def least(cls, ranks: Sequence[StreamPlace]) -> StreamPlace:
        """Of all ranks: with another, what a slower rank had not read yet would not come again."""
        return cls(epoch=min(one.epoch for one in ranks), steps=min(one.steps for one in ranks))

    def to_dict(self) -> dict[str, int]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> StreamPlace:
        return cls(**values)


def stream_batches(
    uris: Sequence[str],
    *,
    seed: int,
    global_batch: int,
    shape: tuple[int, int],
    augment: Augment,
    place: StreamPlace | None = None,
    last_step: int | None = None,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
    shuffle: int = SHUFFLE,
    shuffle_bytes: int = SHUFFLE_BYTES,
    sha256: Mapping[str, str] | None = None,
    skip_damaged: bool = False,
    max_bad_fraction: float = 0.001,
    cache_bytes: int = CACHE_BYTES,
    budget_s: float = 120.0,
) -> Iterator[PictureBatch]:
    """One PictureBatch per step, with a rank's slice, from `place.steps` on. An id's `index` is shard x 2^32 + number there.

    Args:
        uris: tars (local, s3://, http(s)://), folders of them, or patterns with braces, `laion/{00000..00099}.tar`.
        shape: (height, width) of the pictures.
        last_step: it ends before that step; None never ends.
        workers: loader processes; no more than there are shards for. 0 reads in this one.
        shuffle, shuffle_bytes: the most that each reader's shuffle buffer holds, in samples and in bytes.
        sha256: of shards, by URI, where it is known: such a shard is hashed before any of its samples is taken.
        max_bad_fraction: with `skip_damaged`, the most of a rank's samples, and of all tars, that may be damaged. A damaged
            tar counts whole, since what lies behind the damage is unknown.
        cache_bytes, budget_s: as for IndexedShards.

    Raises InputMissing where there are no shards, ConfigError where ranks do not divide the batch or outnumber the shards,
    UnsafeMember for a `pipe:` URL or a member that could run code; then DataError for damage, naming the shard, unless it is
    skipped, and where too much is damaged; StorageFailed where a shard could not be read within the budget.
    """
    source = StreamSource(
        expand(uris),
        ShardOrder(seed=seed, batches=(global_batch,), place=place or StreamPlace()),
        rank=rank,
        world=world,
        last_step=last_step,
        shuffle=(shuffle, shuffle_bytes),
        sha256={store.absolute(uri): digest for uri, digest in (sha256 or {}).items()},
        skip_damaged=skip_damaged,
        blocks=BlockCache(store.cache_dir() / "blocks", capacity_bytes=cache_bytes, budget_s=budget_s),
    )
    toll = _Toll(len(source.uris), max_bad_fraction)
    made = picture_batches(source, shapes=[shape], augment=augment, workers=workers)
    return map(toll.noted, made)


def expand(uris: Sequence[str]) -> list[str]:
    """The tars that are meant, in the order they are named; those of a folder by name.

    Raises UnsafeMember for a URL that would run a shell, InputMissing where there are none, ConfigError for one named twice.
    """
    found: list[str] = []
    for uri in uris:
        members.check_url(uri)
        named = shardlists.expand_urls(uri)
        if len(named) == 1 and not uri.endswith(".tar"):
            where = store.absolute(uri)
            named = [store.join(where, name) for name in store.list_files(where) if name.endswith(".tar")]
        for one in named:
            members.check_url(one)
        found += map(store.absolute, named)
    if not found:
        raise InputMissing(
            "There are no shards.", where=", ".join(uris), mend="Give .tar files, a folder of them, or a pattern."
        )
    if twice := [one for one, count in collections.Counter(found).items() if count > 1]:
        raise ConfigError("A shard is named twice.", where=twice[0], mend="Name it once.")
    return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardOrder:
    """Which reader goes through which shards, in which order: a pure function of (seed, epoch) and the place resumed from."""

    seed: int
    batches: tuple[int, ...]
    """Samples in a global batch: of one shape."""
    place: StreamPlace = StreamPlace()

    def of(self, epoch: int, shards: int, reader: int, readers: int) -> list[int]:
        """The shards of one of the readers in an epoch."""
        key = self._key(_SHARDS, epoch)
        return chi(np.arange(reader, shards, readers), shards, key).astype(int).tolist()

    def shuffled(self, samples: Iterator[Sample], epoch: int, reader: int, most: tuple[int, int]) -> Iterator[Sample]:
        """Samples through a buffer of at most so many, and so many bytes; what comes out is drawn from all it holds."""
        key = self._key(_PICKS, epoch, reader)
        held: list[Sample] = []
        size = picks = 0

        def picked() -> Sample:
            at = mix(key, picks) % len(held)
            held[at], held[-1] = held[-1], held[at]
            return held.pop()

        for sample in samples:
            held.append(sample)
            size += _size_of(sample)
            while len(held) > most[0] or size > most[1]:
                out = picked()
                picks += 1
                size -= _size_of(out)
                yield out
        while held:
            out = picked()
            picks += 1
            yield out

    def _key(self, what: int, epoch: int, *words: int) -> int:
        resumed = self.place.steps if epoch == self.place.epoch else 0
        return mix(self.seed, Purpose.ORDER, what, epoch, resumed, *words)


class StreamSource:
    """First stage: the raw WebDataset samples of this rank's (and this loader worker's) shards, without end.

    Each carries what an OrderedSource's carries, so that all later stages are the same. Raises as `stream_batches`.
    """

    def __init__(
        self,
        uris: Sequence[str],
        order: ShardOrder,
        *,
        rank: int,
        world: int,
        last_step: int | None,
        shuffle: tuple[int, int],
        sha256: Mapping[str, str],
        skip_damaged: bool,
        blocks: BlockCache,
    ) -> None:
        require_divides(order.batches[0], world)
        if world > len(uris):
            raise ConfigError(
                f"{len(uris)} shards are too few for {world} ranks.",
                where="data",
                mend="Use fewer ranks, or give the set an index (build_shards): then ranks share shards.",
            )
        if min(shuffle) < 1:
            raise ConfigError(
                "A shuffle buffer holds at least one sample.", where="shuffle", mend="Set it to 1 or more."
            )
        self.uris, self.order, self.rank, self.world = tuple(uris), order, rank, world
        self.last_step, self.shuffle, self.sha256 = last_step, shuffle, dict(sha256)
        self.skip_damaged, self.blocks = skip_damaged, blocks

    @property
    def is_local(self) -> bool:
        """Whether every shard lies on this machine's disks."""
        return not any(map(store.is_remote, self.uris))

    @property
    def most_workers(self) -> int:
        """Loader workers that have a slot in each step, and a shard in each epoch."""
        return min(self.order.batches[0], len(self.uris)) // self.world

    def __call__(self) -> Iterator[Sample]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        reader, readers = self.rank * workers + worker, self.world * workers
        batch = self.order.batches[0]
        slots = batch * (reader + 1) // readers - batch * reader // readers
        samples = self._samples(reader, readers)
        first = self.order.place.steps
        for step in itertools.count(first) if self.last_step is None else range(first, self.last_step):
            for row, sample in enumerate(itertools.islice(samples, slots)):
                traffic = Traffic() if row else self.blocks.traffic()  # a step's is that of its first sample
                yield sample | {"__step__": step, "__traffic__": traffic}

    def _samples(self, reader: int, readers: int) -> Iterator[Sample]:
        for epoch in itertools.count(self.order.place.epoch):
            sound = 0
            mine = self.order.of(epoch, len(self.uris), reader, readers)
            through = itertools.chain.from_iterable(self._shard(number, epoch) for number in mine)
            for sample in self.order.shuffled(through, epoch, reader, self.shuffle):
                sound += DAMAGED not in sample
                yield sample
            if not sound:
                raise DataError(
                    f"Of the {len(mine)} shards of a reader none holds a sample that can be read.",
                    where=self.uris[mine[0]],
                    mend="Restore the shards, or name others.",
                )

    def _shard(self, number: int, epoch: int) -> Iterator[Sample]:
        uri, count = self.uris[number], 0

        def about(key: str) -> Sample:
            one = SampleId(epoch=epoch, dataset=0, index=(number << _SHARD_BITS) + count)
            return {
                "__key__": key,
                "__url__": uri,
                "__id__": one,
                "__step__": 0,
                "__bucket__": 0,
                "__traffic__": Traffic(),
            }

        try:
            with stretches.opened(uri, self.blocks) as tar:
                self._require_digest(uri, tar)
                for group in tars.samples(cast(tars.Buffer, tar), shard=uri, skipped=collections.Counter()):
                    yield self._read(tar, group, about(group.key))
                    count += 1
        except UnsafeMember:
            raise
        except (SampleRejected, DataError) as error:
            reason = error.reason if isinstance(error, SampleRejected) else "members"
            what = f"{error.what} {count} samples were read before; what follows is lost."
            if not self.skip_damaged:
                raise DataError(
                    what, where=uri, mend="Restore the shard, or skip damage (damage.policy=skip)."
                ) from None
            yield damaged(SampleRejected(reason, what, where=uri), about(""))

    def _read(self, tar: stretches.Tar, group: tars.Grouped, about: Sample) -> Sample:
        if group.length > self.shuffle[1]:
            error = SampleRejected(
                "too_many_bytes",
                f"The sample {group.key!r} has {group.length} bytes; the shuffle buffer holds {self.shuffle[1]}.",
                where=about["__url__"],
            )
            if not self.skip_damaged:
                raise ConfigError(error.what, where=error.where, mend="Raise shuffle_bytes, or leave the sample out.")
            return damaged(error, about)
        data = tar[group.offset : group.offset + group.length]
        contents = {
            extension: data[begin - group.offset : begin - group.offset + size]
            for extension, (begin, size) in group.places.items()
        }
        return about | contents

    def _require_digest(self, uri: str, tar: stretches.Tar) -> None:
        if uri in self.sha256 and (found := tar.sha256()) != self.sha256[uri]:
            raise SampleRejected(
                "digest", f"The shard's sha256 is {found[:12]}, not {self.sha256[uri][:12]}.", where=uri
            )


def _size_of(sample: Sample) -> int:
    return sum(len(value) for name, value in sample.items() if not name.startswith("__"))


class _Toll:
    """Counts what one rank met, and ends the run where too much is damaged."""

    def __init__(self, shards: int, allowed: float) -> None:
        self._shards, self._allowed = shards, allowed
        self._samples = self._damaged = 0
        self._lost: set[str] = set()

    def noted(self, batch: PictureBatch) -> PictureBatch:
        """The same batch. Raises DataError."""
        lost = [one for one in batch.damaged if one.reason in _LOST and not one.key]
        self._lost |= {one.shard for one in lost}
        self._samples += len(batch.ids) - len(lost)
        self._damaged += len(batch.damaged) - len(lost)
        few = self._damaged <= self._allowed * self._samples + _GRACE
        if not few or len(self._lost) > self._allowed * self._shards:
            raise DataError(
                f"{self._damaged} of {self._samples} samples and {len(self._lost)} of {self._shards} tars are damaged; "
                f"damage.max_bad_fraction is {self._allowed:g}.",
                where=", ".join(sorted(self._lost)) or "damage.max_bad_fraction",
                mend="Restore the shards, or raise damage.max_bad_fraction.",
            )
        return batch
