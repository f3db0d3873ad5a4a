"""What a run reads: its data sets, their order, and what becomes of damaged samples."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
import torch.distributed as dist

from latentray.checkpoint import store
from latentray.config.train import Train
from latentray.data import buckets, latents
from latentray.data.buckets import Bucket, Bucketed
from latentray.data.damage import require_few
from latentray.data.episode_batches import EpisodeWindows
from latentray.data.episodes import Horizon
from latentray.data.lines import Reading
from latentray.data.ordering import Cursor, Order, SampleSet, Whole
from latentray.data.pipeline import OrderedSource
from latentray.data.shards import IndexedShards
from latentray.errors import ConfigError
from latentray.records import Batch, Traffic
from latentray.tracking import names

Shape = tuple[int, int]
"""(height, width), pixels."""
_CHUNK_BYTES = 8 << 20


def uris(config: Train) -> list[str]:
    """The training splits of a run's data sets, in the mixture's order."""
    one = config.latents if config.reads_latents else config.data
    named = [ingredient.uri for ingredient in config.mixture.of] or [one or ""]
    return [store.join(store.absolute(uri), "train") for uri in named]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Feed:
    """The opened data sets of a run and their order."""

    sets: tuple[IndexedShards, ...]
    windows: tuple[EpisodeWindows, ...] = ()
    """Of episodes: each set's windows are its samples."""
    order: Order
    buckets: tuple[Bucket, ...]
    """What batches are of; none where all have one shape."""
    shapes: tuple[Shape, ...]
    """Of each bucket, or of all batches."""
    skip_damaged: bool
    read_ahead: int

    @classmethod
    def open(cls, config: Train, *, encoded_by: Sequence[str] = ()) -> Feed:
        """Open a run's data sets.

        Args:
            encoded_by: fingerprints of what encodes pictures online: a cursor holds with these encoders only, as that of
                stored latents does.

        Raises as IndexedShards.open, and ConfigError where order and data do not fit.
        """
        fetch, kind = config.fetch, latents.KIND if config.reads_latents else "dataset"
        sets = tuple(
            IndexedShards.open(uri, kind=kind, cache_bytes=fetch.cache_bytes, budget_s=fetch.budget_s)
            for uri in uris(config)
        )
        windows = _windows(config, sets) if config.reads_episodes else ()
        shapes = [(config.size, config.size)] if config.reads_pictures else []
        shapes += stored_shapes(sets) if config.reads_latents else []
        buckets = _buckets(config, shapes)
        return cls(
            sets=sets,
            windows=windows,
            order=_order(config, sets, windows or sets, buckets, encoded_by),
            buckets=buckets,
            shapes=tuple((one.height, one.width) for one in buckets) or tuple(shapes),
            skip_damaged=config.damage.policy == "skip",
            read_ahead=fetch.read_ahead,
        )

    @property
    def inputs(self) -> dict[str, str]:
        """Digests of the data sets, for lineage: `dataset` or `latents`, numbered in a mixture."""
        role = self.sets[0].manifest.kind
        names = [role] if len(self.sets) == 1 else [f"{role}.{number}" for number in range(len(self.sets))]
        return {name: one.manifest.digest for name, one in zip(names, self.sets, strict=True)}

    @property
    def samples(self) -> int:
        """Samples in all data sets."""
        return sum(one.count for one in self.windows or self.sets)

    def resumed(self, cursor: Cursor) -> Feed:
        """This feed as it goes on at a cursor; FingerprintMismatch where it belongs to other data or settings."""
        return dataclasses.replace(self, order=self.order.resume(cursor))

    def source(self, *, rank: int, world: int, first_step: int, last_step: int) -> OrderedSource:
        """The samples of one rank in steps [first_step, last_step)."""
        return OrderedSource(
            self.windows or self.sets,
            self.order,
            rank=rank,
            world=world,
            first_step=first_step,
            last_step=last_step,
            skip_damaged=self.skip_damaged,
            read_ahead=self.read_ahead,
        )


class Ledger:
    """Counts what reading met: damaged samples, each printed where it is found, and the traffic of remote shards."""

    def __init__(self, feed: Feed, *, allowed: float, device: torch.device, damaged_before: int = 0) -> None:
        self.samples, self.allowed, self.device = feed.samples, allowed, device
        self._before, self._damaged, self._traffic = damaged_before, 0, Traffic()

    def note(self, batch: Batch) -> None:
        """Take in what this rank's slice of a batch met."""
        self._damaged += len(batch.damaged)
        self._traffic += batch.traffic
        for one in batch.damaged:
            print(f"damaged: {one.key} in {one.shard} ({one.reason}): {one.what}", flush=True)

    def damaged(self, seen: int) -> int:
        """Damaged samples since the run began, on all ranks, after so many `seen`. Collective.

        Raises DataError above what is allowed of the data sets, or of the samples seen: each epoch meets the same ones again.
        """
        total = self._before + int(self._sum([self._damaged])[0])
        require_few(total, samples=max(self.samples, seen), allowed=self.allowed)
        return total

    def figures(self, seen: int) -> dict[str, float]:
        """What is logged, summed over all ranks, since the worker began. Collective; raises as `damaged`."""
        traffic = self._traffic
        sums = self._sum([traffic.fetched_bytes, traffic.cached_bytes, traffic.retries, traffic.stalled_s])
        keys = (
            names.DATA_FETCHED_BYTES,
            names.DATA_CACHED_BYTES,
            names.DATA_FETCH_RETRIES,
            names.DATA_STALL_SECONDS,
        )
        return {names.DATA_DAMAGED_SAMPLES: self.damaged(seen)} | dict(zip(keys, sums, strict=True))

    def _sum(self, values: list[float]) -> list[float]:
        totals = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(totals)
        return totals.tolist()


def stored_shapes(sets: Sequence[IndexedShards]) -> list[Shape]:
    """The shapes that stores of latents hold between them, ascending: those of their buckets, or the square of each."""
    described = [latents.describe(one.uri, one.manifest) for one in sets]
    return sorted({shape for one in described for shape in one.buckets or ((one.size, one.size),)})


def _buckets(config: Train, stored: Sequence[Shape]) -> tuple[Bucket, ...]:
    """Of pictures as the settings say; of stored latents those of their shapes, the largest in batches of the usual size."""
    wanted = config.buckets
    if wanted.sizes:
        return buckets.table(
            wanted.sizes,
            step=wanted.step,
            max_aspect=wanted.max_aspect,
            pixel_budget=config.global_batch_size * config.size**2,
            multiple=wanted.multiple,
        )
    if len(stored) <= 1:
        return ()
    largest = max(height * width for height, width in stored)
    return buckets.table_of(stored, pixel_budget=config.global_batch_size * largest, multiple=wanted.multiple)


def _windows(config: Train, sets: Sequence[IndexedShards]) -> tuple[EpisodeWindows, ...]:
    net = config.denoiser
    horizon = Horizon(observations=net.observation_steps, actions=net.action_steps)
    return tuple(EpisodeWindows(one, horizon) for one in sets)


def _order(
    config: Train,
    sets: Sequence[IndexedShards],
    samples: Sequence[IndexedShards | EpisodeWindows],
    shapes: tuple[Bucket, ...],
    encoded_by: Sequence[str],
) -> Order:
    wanted = config.order
    if shapes and wanted.streams:
        raise ConfigError(
            "With buckets each batch size has its own streams.", where="order.streams", mend="Leave it null."
        )
    reading = Reading(
        chunk=wanted.chunk or _chunk(sets),
        depth=wanted.depth,
        streams=wanted.streams,
        drop_remainder=wanted.drop_remainder,
    )
    batches = tuple(one.batch for one in shapes) or (config.global_batch_size,)
    placing = buckets.assign if config.reads_pictures else buckets.exact
    digests = [store.digest_of([one.digest, *encoded_by]) if encoded_by else one.digest for one in samples]
    members: list[SampleSet] = [
        Bucketed(one.index, digest, shapes, placing) if shapes else Whole(each.count, digest)
        for one, each, digest in zip(sets, samples, digests, strict=True)
    ]
    if len(members) == 1:
        return Order((members[0],), config.seed, batches, reading)
    weights = [one.weight for one in config.mixture.of]
    if config.mixture.by == "epochs":
        weights = [weight * one.count for weight, one in zip(weights, samples, strict=True)]
    return Order.mixture(members, weights, config.seed, batches, reading)


def _chunk(sets: Sequence[IndexedShards]) -> int:
    """Samples that are read together: one from local disks, several MiB of them where a request has a latency."""
    if not any(one.is_remote for one in sets):
        return 1
    mean = sum(entry.bytes for one in sets for entry in one.shards) / sum(one.count for one in sets)
    return max(1, round(_CHUNK_BYTES / mean))
