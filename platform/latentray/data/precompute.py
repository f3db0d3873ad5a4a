"""The job that encodes pictures or clips, and captions, once: a Ray Data graph whose rows are parts of shards.

Tasks read and decode; a pool of actors encodes, and writes the finished records of each part; the driver has a shard
assembled, by another task, once all its parts are there. So cheap machines decode while the expensive ones encode, no more
pictures wait than the object store has room for, and what passes the driver is names.

A job that is run again skips the shards that are committed and the parts that are written, and does the rest; its result has
the same bytes. A finished store never changes: a data set that grew gets a new one, with `reuse` of the old.
"""

from __future__ import annotations

import collections
import contextlib
import json
import logging
import os
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa

from latentray.checkpoint import store
from latentray.config.precompute_latents import PrecomputeLatents
from latentray.data import latent_commit, latent_estimate, latent_job, latent_parts, latent_plan, latent_shards
from latentray.data.damage import require_few
from latentray.data.latent_encoder import Encoder
from latentray.data.latent_job import ShardWork
from latentray.data.latent_parts import Job
from latentray.data.latent_plan import Gathering, Part
from latentray.errors import ConfigError, LatentrayError
from latentray.reporting.progress import tracked

_BLOCKS = 4096
_BYTES_PER_PIXEL = 8
"""Of memory, for a picture on its way: its file, RGB, and what it is resized to."""
_ASSEMBLING = 8
_WELL_FILLED = 0.75
"""Share of a batch; of less an estimate tells."""
_WRITING = 3
"""Calls in an encoder at a time: one encodes, the others write."""
Arrival = tuple[tuple[int, int], int, str, list[str]]
"""A written part: its (split, shard), its number, its file's name, and the keys of the samples it left out."""


def precompute(config: PrecomputeLatents) -> list[str]:
    """Encode every split of the data set and return the URIs of the latents; none where only an estimate was asked for.

    Raises InputMissing, DigestMismatch, FingerprintMismatch, AlreadyExists, EnvironmentRefused or ConfigError before Ray
    starts; DataError, with nothing committed, where more pictures are damaged than `damage` allows.
    """
    if config.estimate:
        with store.staging() as scratch:
            _print_estimate(config, latent_job.plan(config, scratch))
        return []
    plan = latent_job.plan(config)
    latent_commit.begin(plan)
    if plan.unfinished:
        if plan.work:
            done = _run(config, plan.job, plan.work)
            collections.deque(tracked(done, len(plan.work), "encoding shards"), maxlen=0)
        latent_commit.commit(config, plan)
    for out in plan.outs:
        print(f"Latents: {out}")
        print(f"Next: python -m jobs.train stage=diffusion latents={out}", flush=True)
    return [one.uri for stores in plan.stores for one in stores]


def check(config: PrecomputeLatents) -> None:
    """Raise as `precompute` does before Ray starts, with nothing written."""
    with store.staging() as scratch:
        latent_job.plan(config, scratch)


def _print_estimate(config: PrecomputeLatents, plan: latent_job.Plan) -> None:
    left = [part for one in plan.work for part in one.left]
    new = [part for part in left if not len(part.older)]
    records = sum(len(part.units) for part in left)
    if not new:
        print("Nothing is left to encode.")
        return
    found = latent_estimate.estimate(
        latent_estimate.measure(plan.job, new),
        samples=records // len(plan.job.variants),
        records=records,
        copied=sum(len(part.older) for part in left),
        encoders=config.actors[1],
        epochs=config.epochs,
        price_per_hour=config.price_per_hour,
        storage_price=config.storage_price,
    )
    fill = latent_plan.fill(new, plan.job.frames, plan.job.batch_size)
    print("\n".join(found.lines()))
    if fill < _WELL_FILLED:
        print(f"Batches are {fill:.0%} full, the rest is padding: a smaller batch_size, or larger shards, save time.")
    print(json.dumps(found.to_json()), flush=True)


def _run(config: PrecomputeLatents, job: Job, work: Sequence[ShardWork]) -> Iterator[ShardWork]:
    """Encode what is left of each shard on Ray, and commit it; the shards as they finish."""
    from latentray.data import cluster

    cluster.connect(config.address)
    allowed = config.damage.max_bad_fraction if job.skip_damaged else 0.0
    rejected: set[str] = set()
    assembly = _Assembly(job, most=max(_ASSEMBLING, 2 * config.actors[1]), cores=_cores(config))
    by_place = {(one.split, one.shard): one for one in work}
    gathering = Gathering({place: one.parts for place, one in by_place.items()})
    there: Iterator[Arrival] = (
        (place, number, name, []) for place, one in by_place.items() for number, name in sorted(one.written.items())
    )
    left = [part for one in work for part in one.left]
    for arrivals in (there, _encoded(config, job, left) if left else ()):
        for place, number, name, keys in arrivals:
            rejected |= {f"{place[0]}/{key}" for key in keys}
            require_few(len(rejected), samples=job.samples, allowed=allowed)
            names = gathering.arrived(place, number, name)
            if names is not None:
                assembly.start(by_place[place], names)
            yield from assembly.finished()
    yield from assembly.finished(wait=True)


class _Assembly:
    """Shards that are being assembled, by Ray tasks: so many at a time."""

    def __init__(self, job: Job, *, most: int, cores: float) -> None:
        import ray

        self._job, self._most = ray.put(job), most
        self._assemble = ray.remote(num_cpus=cores, max_retries=5)(latent_shards.assemble)
        self._running: dict[Any, ShardWork] = {}

    def start(self, shard: ShardWork, parts: list[str]) -> None:
        self._running[self._assemble.remote(self._job, shard.split, shard.name, parts)] = shard

    def finished(self, *, wait: bool = False) -> Iterator[ShardWork]:
        """The shards that are done by now; with `wait` all of them. It waits too while too many are running."""
        import ray

        while self._running:
            patience = None if wait or len(self._running) > self._most else 0
            done, _ = ray.wait(list(self._running), num_returns=1, timeout=patience)
            if not done:
                return
            with _as_raised():
                ray.get(done)
            yield self._running.pop(done[0])


def _encoded(config: PrecomputeLatents, job: Job, parts: Sequence[Part]) -> Iterator[Arrival]:
    """Read, encode and write parts on Ray, in whatever order."""
    import ray
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)  # after Ray Data's import, which sets its own
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.raise_original_map_exception = True  # an error of ours arrives as itself
    have = ray.cluster_resources()
    pixels = job.part_bytes
    _require_room(have, pixels)
    gpus = 1 if config.device != "cpu" and have.get("GPU", 0) >= 1 else 0
    most = min(config.actors[1], len(parts))
    if _is_own(config):  # a cluster that is given may grow; here an encoder too many would leave no core to decode
        most = max(min(most, int(have["GPU"] if gpus else have["CPU"] - 1)), 1)
    cores = _cores(config)
    before, context.target_max_block_size = context.target_max_block_size, max(pixels, 1 << 20)
    try:
        read = ray.data.from_arrow(_tables(parts)).map_batches(
            _read,
            fn_kwargs={"job": job},
            batch_size=1,
            batch_format="pyarrow",
            num_cpus=cores,
            memory=min(_BYTES_PER_PIXEL * job.max_pixels + 2 * pixels, int(have.get("memory", 4 << 30) / 4)),
        )
        written = read.map_batches(
            _EncoderActor,
            fn_constructor_args=(job,),
            batch_size=1,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(
                min_size=min(config.actors[0] if gpus else fewest_encoders(have.get("CPU", 1), config.actors[0]), most),
                max_size=most,
                max_concurrent_calls_per_actor=_WRITING,
                max_tasks_in_flight_per_actor=_WRITING + 1,
                enable_true_multi_threading=True,
            ),
            num_cpus=0 if gpus else cores,
            num_gpus=gpus,
        )
    finally:
        context.target_max_block_size = before
    with _as_raised():
        for row in written.iter_rows():
            yield (row["split"], row["shard"]), row["number"], row["name"], json.loads(row["rejected"])


@contextlib.contextmanager
def _as_raised() -> Iterator[None]:
    """Ray hands on an error of ours inside one of its own, whose message is a traceback; here it is itself again."""
    try:
        yield
    except LatentrayError as error:
        raise getattr(error, "cause", error) from None


def _is_own(config: PrecomputeLatents) -> bool:
    """True where the cluster was started for this job, and will not grow."""
    return not (config.address or os.environ.get("RAY_ADDRESS"))


def _cores(config: PrecomputeLatents) -> float:
    """Cores of a task, and of an encoder without a GPU: half a core each where else no core were left to decode."""
    import ray

    return cores_each(ray.cluster_resources().get("CPU", 1), config.actors[0])


def cores_each(cores: float, encoders: int) -> float:
    """What each task and each of so many encoders asks for of so many cores, so that one reader runs beside them."""
    return 1 if cores >= encoders + 1 else 0.5


def fewest_encoders(cores: float, encoders: int) -> int:
    """How many of the encoders that are wanted at least can run, with a reader beside them."""
    return max(min(encoders, int(cores / cores_each(cores, encoders)) - 1), 1)


def _require_room(have: dict[str, float], part_bytes: int) -> None:
    room = have.get("object_store_memory", 0)
    if room and 2 * part_bytes > room:
        raise ConfigError(
            f"A batch of pictures takes {part_bytes / 2**20:.0f} MiB; the cluster's object store holds "
            f"{room / 2**20:.0f} MiB.",
            where="batch_size",
            mend="Lower batch_size, or give the cluster a larger object store.",
        )


def _tables(parts: Sequence[Part]) -> list[pa.Table]:
    """One row for each part, in at most `_BLOCKS` tables: what is read one after another is of the same shards."""
    size = -(-len(parts) // _BLOCKS)
    return [pa.Table.from_pylist([part.to_row() for part in parts[i : i + size]]) for i in range(0, len(parts), size)]


def _read(table: pa.Table, *, job: Job) -> pa.Table:
    part = Part.from_row(table.to_pylist()[0], stores=job.stores)
    return latent_parts.read_part(job, part).to_table()


class _EncoderActor:
    """Encodes parts one at a time, and writes one while the next is encoded."""

    def __init__(self, job: Job) -> None:
        self._job, self._encoder = job, Encoder(job)
        self._encoding = threading.Lock()

    def __call__(self, table: pa.Table) -> pa.Table:
        parcel = latent_parts.Parcel.from_table(table)
        with self._encoding:
            parcel = self._encoder.encode(parcel)
        place = {name: parcel.about[name] for name in ("split", "shard", "number")}
        keys = json.dumps([one["key"] for one in parcel.about["rejected"]])
        return pa.Table.from_pylist([place | {"name": latent_shards.write_part(self._job, parcel), "rejected": keys}])
