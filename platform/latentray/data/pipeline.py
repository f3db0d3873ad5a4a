"""From indexed data sets to the samples of a rank: a `webdataset.DataPipeline` whose first stage follows the order.

Stages: ordered source (raw WebDataset samples) -> decode by the members table -> arrays -> the part of a step. Loader
workers split by slot: each makes its part of every step, and the parts are joined in order, so any number of workers
gives the same numbers, and reading ahead needs no saved loader state.
"""

from __future__ import annotations

import collections
import concurrent.futures
import functools
import itertools
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, Generic, Protocol, TypeVar

import torch
import webdataset
from torch.utils.data import DataLoader, get_worker_info

from latentray.data import members
from latentray.data.blocks import BlockCache
from latentray.data.damage import DAMAGED, damaged
from latentray.data.index import ShardEntry
from latentray.data.ordering import Order, Step, require_divides
from latentray.errors import DataError, LatentrayError, SampleRejected, StorageFailed
from latentray.records import Traffic

READ_AHEAD = 4
"""Steps whose remote samples are fetched before they are wanted."""

_FETCHERS = 8

Sample = dict[str, Any]
Part = dict[str, Any]
"""A worker's part of one step. Its tensors travel as NumPy arrays or as safetensors bytes, through a pipe: torch's own
way takes shared memory, of which a container has 64 MB."""


class Readable(Protocol):
    """Samples by position: IndexedShards, or what is made of them."""

    uri: str
    blocks: BlockCache

    @property
    def count(self) -> int: ...

    @property
    def is_remote(self) -> bool: ...

    def read(self, x: int) -> Sample: ...

    def load(self, x: int) -> None: ...

    def key(self, x: int) -> str: ...

    def locate(self, x: int) -> tuple[ShardEntry, int, int]: ...


Readables = TypeVar("Readables", bound=Readable, covariant=True)


class Turns(Protocol):
    """What an order says to those who make batches."""

    @property
    def seed(self) -> int: ...

    @property
    def batches(self) -> tuple[int, ...]:
        """Samples in a global batch of each bucket."""


class Source(Protocol):
    """A first stage: raw samples with `__id__`, `__step__`, `__bucket__` and `__traffic__`, of one rank and loader worker."""

    skip_damaged: bool

    @property
    def order(self) -> Turns: ...

    @property
    def is_local(self) -> bool:
        """Whether a forked process can read it."""

    @property
    def most_workers(self) -> int:
        """Loader workers of a rank that have something to do in each step."""

    def __call__(self) -> Iterator[Sample]: ...


class OrderedSource(Generic[Readables]):
    """First stage: the raw WebDataset samples of this rank's (and this loader worker's) slots, step after step.

    Each carries `__id__` (SampleId), `__step__` and `__bucket__`. It ends before `last_step`, or never where that is None.
    With `skip_damaged`, a sample that cannot be read keeps its place (`damage.py`).

    Raises DataError where order and data sets differ in size, ConfigError where `world` does not divide the global batch.
    """

    def __init__(
        self,
        sets: Sequence[Readables],
        order: Order,
        *,
        rank: int = 0,
        world: int = 1,
        first_step: int = 0,
        last_step: int | None = None,
        skip_damaged: bool = False,
        read_ahead: int = READ_AHEAD,
    ):
        for opened, ordered in zip(sets, order.sets, strict=True):
            if sum(ordered.counts) != opened.count:
                raise DataError(
                    f"The order is of {sum(ordered.counts)} samples; the data set has {opened.count}.",
                    where=opened.uri,
                    mend="Use one data set.",
                )
        for batch in order.batches:
            require_divides(batch, world)
        self.sets, self.order, self.rank, self.world = tuple(sets), order, rank, world
        self.steps, self.skip_damaged, self.read_ahead = (first_step, last_step), skip_damaged, read_ahead

    def __call__(self) -> Iterator[Sample]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        for step, part, traffic in self._loaded(self.parts(worker, workers)):
            about: Sample = {"__step__": step, "__bucket__": part.bucket, "__traffic__": traffic}
            for sample_id in part.ids:
                yield self._read(self.sets[sample_id.dataset], sample_id.index, about | {"__id__": sample_id})

    @property
    def is_local(self) -> bool:
        """Whether every shard lies on this machine's disks."""
        return not any(one.is_remote for one in self.sets)

    @property
    def most_workers(self) -> int:
        """Loader workers that have a slot in each step."""
        return min(self.order.batches) // self.world

    def parts(self, worker: int, workers: int) -> Iterator[tuple[int, Step]]:
        """The slots of one of this rank's loader workers, step after step."""
        begin, end = self.steps
        for step in itertools.count(begin) if end is None else range(begin, end):
            yield step, self.order.part(step, self.rank * workers + worker, self.world * workers)

    def _loaded(self, parts: Iterator[tuple[int, Step]]) -> Iterator[tuple[int, Step, Traffic]]:
        """Parts whose remote samples are in this node's cache, those of the next steps being fetched meanwhile."""
        if self.is_local:
            yield from ((step, part, Traffic()) for step, part in parts)
            return
        with concurrent.futures.ThreadPoolExecutor(_FETCHERS) as pool:
            waiting: collections.deque[tuple[int, Step, list[concurrent.futures.Future[None]]]] = collections.deque()
            for step, part in parts:
                loads = [pool.submit(self.sets[one.dataset].load, one.index) for one in part.ids]
                waiting.append((step, part, loads))
                if len(waiting) > self.read_ahead:
                    yield self._arrived(*waiting.popleft())
            while waiting:
                yield self._arrived(*waiting.popleft())

    def _arrived(
        self, step: int, part: Step, loads: list[concurrent.futures.Future[None]]
    ) -> tuple[int, Step, Traffic]:
        began = time.perf_counter()
        concurrent.futures.wait(loads)
        stalled = time.perf_counter() - began
        for failed in (load.exception() for load in loads):
            if isinstance(failed, StorageFailed):  # damage is found, and counted, where the sample is read
                raise failed
        return step, part, sum((one.blocks.traffic() for one in self.sets), Traffic(stalled_s=stalled))

    def _read(self, shards: Readable, x: int, about: Sample) -> Sample:
        try:
            return shards.read(x) | about
        except LatentrayError as error:
            sample = about | {"__key__": shards.key(x), "__url__": shards.locate(x)[0].name}
            if not self.skip_damaged:
                raise refused(error, sample) from None
            return damaged(error, sample)


def refused(error: LatentrayError, sample: Sample) -> LatentrayError:
    """What is raised for a sample where damage is not skipped: a rejected one says what to do about it."""
    if not isinstance(error, SampleRejected):
        return error
    return DataError(
        f"The sample {sample['__key__']!r} cannot be used: {error.what}",
        where=str(sample["__url__"]),
        mend="Build the data set without it, or skip such samples (damage.policy=skip).",
    )


def raw_pipeline(
    source: Source, *stages: Callable[[Iterable], Iterator], as_bytes: Collection[str] = ()
) -> webdataset.DataPipeline:
    """A WebDataset pipeline of ordered, safely decoded samples, to which any WebDataset stage may be added.

    Members whose extension is in `as_bytes` are left to a later stage.
    """
    decoded = functools.partial(_decoded, skip_damaged=source.skip_damaged, as_bytes=as_bytes)
    return webdataset.DataPipeline(source, webdataset.map(decoded), *stages)


def _decoded(sample: Sample, *, skip_damaged: bool, as_bytes: Collection[str]) -> Sample:
    if DAMAGED in sample:
        return sample
    try:
        return members.decode_sample(sample, as_bytes=as_bytes)
    except LatentrayError as error:
        if not skip_damaged:
            raise
        return damaged(error, sample)


def common(parts: list[Part]) -> dict[str, Any]:
    """What batches of every kind hold: ids, damage, and the weight of each sample."""
    found = [one for part in parts for one in part["damaged"]]
    weights = torch.tensor([0.0 if one else 1.0 for one in found])
    ids = [i for part in parts for i in part["ids"]]
    traffic = sum((part["traffic"] for part in parts), Traffic())
    return {"ids": ids, "weight_B": weights, "damaged": [one for one in found if one is not None], "traffic": traffic}


def parts_of(
    source: Source, to_part: Callable[[list[Sample]], Part], workers: int, *, as_bytes: Collection[str] = ()
) -> Iterator[list[Part]]:
    """The parts of each step, in slot order: one where this process reads, else one per loader worker."""
    pipeline = raw_pipeline(source, functools.partial(_by_step, to_part=to_part), as_bytes=as_bytes)
    workers = min(workers, source.most_workers)
    if workers == 0:
        yield from ([_raised(part)] for part in pipeline)
        return
    # A forked child cannot use S3 clients that its parent opened; a fresh process can, and starts slower.
    start = "fork" if source.is_local else "spawn"
    loader = iter(DataLoader(pipeline, batch_size=None, num_workers=workers, multiprocessing_context=start))
    try:
        while parts := list(itertools.islice(loader, workers)):
            yield [_raised(part) for part in parts]
    finally:
        del (
            loader
        )  # ends its processes: kept by a traceback, it would be finalised in processes forked later, and hang them


def _raised(part: Part | LatentrayError) -> Part:
    if isinstance(part, LatentrayError):
        raise part
    return part


def _by_step(samples: Iterable[Sample], *, to_part: Callable[[list[Sample]], Part]) -> Iterator[Part | LatentrayError]:
    """Last stage: the samples of one step as one part. An error of ours passes as a value, so that it arrives whole."""
    try:
        for _, group in itertools.groupby(samples, key=lambda sample: sample["__step__"]):
            yield to_part(list(group))
    except LatentrayError as error:
        yield error


def places(samples: list[Sample]) -> Part:
    """`ids`; `damaged`: None, or the damage, of each sample; `traffic` of the step."""
    return {
        "ids": [sample["__id__"] for sample in samples],
        "damaged": [sample.get(DAMAGED) for sample in samples],
        "traffic": samples[0].get("__traffic__", Traffic()) if samples else Traffic(),
    }


def usable(samples: list[Sample]) -> Iterator[tuple[int, Sample]]:
    return ((row, sample) for row, sample in enumerate(samples) if DAMAGED not in sample)
