"""The job that packs pictures with captions into indexed data sets: a Ray Data graph of one row per shard.

The driver lists the input and plans the shards; a worker packs a shard, uploads it and returns its index rows; the
driver writes the index, the list of rejects and, last, the manifest. A shard's name and bytes follow from its plan
alone, so a retried task writes the same shard again.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import io
import json
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from latentray.checkpoint import manifest, store
from latentray.config import compose
from latentray.config.build_shards import BuildShards
from latentray.data import decode, shards, sources, synthetic
from latentray.errors import DataError, SampleRejected
from latentray.randomness import Purpose, mix
from latentray.reporting.progress import tracked

REJECTED = "rejected.jsonl"
_PER_SAMPLE_BYTES = 6 << 10  # captions, tar blocks, index row; a drawn picture too
_SPARE_BYTES = 16 << 20
_LEAST_VALIDATION = 8


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
    entries: list[sources.Entry]
    """Pictures to read; empty where they are drawn."""
    drawn: int = 0
    """How many to draw instead."""
    seed: int = 0
    max_pixels: int = decode.MAX_PIXELS

    @property
    def count(self) -> int:
        return self.drawn or len(self.entries)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Packed:
    """What became of a plan: the shard (None where every sample was rejected), and the rejects with their reasons."""

    split: str
    result: shards.ShardResult | None
    rejected: list[dict[str, str]]


def build(config: BuildShards) -> list[str]:
    """Build the data sets of a configuration and return their URIs, training first.

    Whatever is wrong with the input is refused before Ray starts (InputMissing, ConfigError, AlreadyExists,
    EnvironmentRefused). Raises DataError, with nothing committed, where more than `max_bad_fraction` is rejected.
    """
    plans = plan(config)
    try:
        packed = list(tracked(_run(plans, config.address), len(plans), "packing shards"))
        uris = _commit(config, plans, packed)
    except BaseException:
        _discard(plans)
        raise
    print(f"Data sets: {' '.join(uris)}")
    print(f"Next: python -m jobs.train stage=autoencoder data={store.absolute(config.out)}", flush=True)
    return uris


def plan(config: BuildShards) -> list[ShardPlan]:
    """The shards of all splits, checked against everything that can be known before any work starts."""
    out = store.absolute(config.out)
    for split in synthetic.SPLITS:
        manifest.refuse_existing(store.join(out, split))
    if config.source.name == "shapes":
        counts = {"train": config.source.n, "validation": config.source.n_validation}
        plans = [p for split, n in counts.items() for p in _plan_drawn(config, out, split, n)]
        need = sum(counts.values()) * _PER_SAMPLE_BYTES
    else:
        found = sources.entries(config.source)
        splits = split_entries(found, config.validation_fraction, config.seed)
        plans = [p for split, part in splits.items() for p in _plan_entries(config, out, split, part)]
        need = len(found) * _PER_SAMPLE_BYTES + sum(_local_size(entry["uri"]) for entry in found)
    store.require_space(out, need + _SPARE_BYTES)
    return plans


def split_entries(found: list[sources.Entry], fraction: float, seed: int) -> dict[str, list[sources.Entry]]:
    """`train` and `validation`, by a hash of each name: a picture stays where it is when others come or go.

    With a positive fraction and two or more names, both get at least one; of a small folder a tenth is kept, up to eight, for
    FID wants several.
    """
    draws = {entry["name"]: _split_draw(entry["name"], seed) for entry in found}
    held = {name for name, draw in draws.items() if draw < fraction}
    if fraction > 0 and len(draws) > 1:
        least = min(max(len(draws) // 10, 1), _LEAST_VALIDATION)
        held |= set(sorted(draws, key=draws.__getitem__)[:least])
    if len(held) == len(draws):
        held.discard(max(draws, key=draws.__getitem__))
    parts = {
        "train": [entry for entry in found if entry["name"] not in held],
        "validation": [entry for entry in found if entry["name"] in held],
    }
    return {split: part for split, part in parts.items() if part}


def _split_draw(name: str, seed: int) -> float:
    word = int.from_bytes(hashlib.sha256(name.encode(errors="surrogateescape")).digest()[:8], "big")
    return mix(seed, Purpose.SPLIT, word) * 2.0**-64


def _local_size(uri: str) -> int:
    if not uri or store.is_remote(uri):
        return 0
    path = store.local_path(uri)
    return path.stat().st_size if path.is_file() else 0


def _plan_drawn(config: BuildShards, out: str, split: str, n: int) -> Iterator[ShardPlan]:
    for number, first in enumerate(range(0, n, config.samples_per_shard)):
        yield ShardPlan(
            split=split,
            uri=store.join(out, split),
            name=shards.shard_name(number),
            first=first,
            entries=[],
            drawn=min(config.samples_per_shard, n - first),
            seed=config.seed,
        )


def _plan_entries(config: BuildShards, out: str, split: str, part: list[sources.Entry]) -> Iterator[ShardPlan]:
    for number, first in enumerate(range(0, len(part), config.samples_per_shard)):
        yield ShardPlan(
            split=split,
            uri=store.join(out, split),
            name=shards.shard_name(number),
            first=first,
            entries=part[first : first + config.samples_per_shard],
            max_pixels=config.max_pixels,
        )


def pack(job: ShardPlan) -> Packed:
    """Pack one shard and upload it. A sample that cannot be used is left out and listed; the rest goes on."""
    rejected: list[dict[str, str]] = []
    made = _drawn_samples(job) if job.drawn else _read_samples(job, rejected)
    with store.staging() as folder:
        result = shards.write_shard(made, folder / job.name)
        if not result.rows:
            return Packed(split=job.split, result=None, rejected=rejected)
        store.upload(folder / job.name, store.join(job.uri, job.name))
    return Packed(split=job.split, result=result, rejected=rejected)


def _drawn_samples(job: ShardPlan) -> Iterator[shards.Sample]:
    for index in range(job.first, job.first + job.drawn):
        kind = synthetic.kind_of(job.split, index)
        pixels = synthetic.draw(kind, job.seed, index, split=job.split)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        about = dataclasses.asdict(kind) | {"source": f"shapes/{job.split}/{index}"}
        yield _sample(
            index, buffer.getvalue(), "png", [synthetic.caption(kind)], pixels.shape[1], pixels.shape[0], about
        )


def _read_samples(job: ShardPlan, rejected: list[dict[str, str]]) -> Iterator[shards.Sample]:
    for index, entry in enumerate(job.entries, start=job.first):
        try:
            data, captions = sources.read(entry)
            pixels, suffix = decode.decode_with_format(data, max_pixels=job.max_pixels, where=entry["name"])
        except SampleRejected as error:
            rejected.append({"name": entry["name"], "reason": error.reason, "what": error.what})
            continue
        height, width = pixels.shape[:2]
        yield _sample(index, data, suffix, captions, width, height, {"source": entry["name"]})


def _sample(
    index: int, data: bytes, suffix: str, captions: list[str], width: int, height: int, about: dict[str, Any]
) -> shards.Sample:
    digest = hashlib.sha256(data).hexdigest()
    record = about | {"captions": captions, "width": width, "height": height, "sha256": digest}
    return shards.Sample(
        key=f"{index:09d}",
        members={
            suffix: data,
            "txt": captions[0].encode(),
            "json": json.dumps(record, sort_keys=True, ensure_ascii=False).encode(errors="surrogateescape"),
        },
        columns={"sha256": digest, "width": width, "height": height},
    )


def _pack_row(row: dict[str, str]) -> dict[str, str]:
    """`pack` for Ray Data: plans and results cross as JSON, whose types no block format bends."""
    packed = pack(ShardPlan(**json.loads(row["plan"])))
    result = packed.result.to_dict() if packed.result else None
    return {"packed": json.dumps({"split": packed.split, "result": result, "rejected": packed.rejected})}


def _run(plans: list[ShardPlan], address: str | None) -> Iterator[Packed]:
    """Pack all plans on Ray, as they finish."""
    import ray.data

    from latentray.data import cluster

    cluster.connect(address)
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # after Ray Data's import, which sets its own
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    rows = [{"plan": json.dumps(dataclasses.asdict(p))} for p in plans]
    for row in ray.data.from_items(rows, override_num_blocks=min(len(rows), 4096)).map(_pack_row).iter_rows():
        values = json.loads(row["packed"])
        result = shards.ShardResult.from_dict(values["result"]) if values["result"] else None
        yield Packed(split=values["split"], result=result, rejected=values["rejected"])


def _commit(config: BuildShards, plans: list[ShardPlan], packed: Iterable[Packed]) -> list[str]:
    """Write index, rejects and manifest of each split; refuse first where too much was rejected."""
    by_split: dict[str, list[Packed]] = {p.split: [] for p in plans}
    for one in packed:
        by_split[one.split].append(one)
    planned: collections.Counter[str] = collections.Counter()
    for p in plans:
        planned[p.split] += p.count
    _require_enough(config, by_split, planned.total())
    uris = []
    for split, parts in by_split.items():
        results = [p.result for p in parts if p.result is not None]
        uri = next(p.uri for p in plans if p.split == split)
        if not results:
            print(f"{split}: every picture was rejected, so there is no {uri}")
            continue
        _commit_split(config, split, uri, results, [r for p in parts for r in p.rejected], planned[split])
        uris.append(uri)
    return uris


def _require_enough(config: BuildShards, by_split: dict[str, list[Packed]], planned: int) -> None:
    rejected = [r for parts in by_split.values() for p in parts for r in p.rejected]
    usable = any(p.result for p in by_split["train"])
    if usable and len(rejected) <= config.max_bad_fraction * planned:
        return
    counts = ", ".join(
        f"{reason}: {n}" for reason, n in collections.Counter(r["reason"] for r in rejected).most_common()
    )
    examples = "; ".join(f"{r['name']} ({r['reason']})" for r in rejected[:5])
    raise DataError(
        f"{len(rejected)} of {planned} pictures cannot be used ({counts}); "
        f"max_bad_fraction is {config.max_bad_fraction:g}. First: {examples}.",
        where=config.source.path or "",
        mend="Mend or remove these pictures, or raise max_bad_fraction.",
    )


def _commit_split(
    config: BuildShards,
    split: str,
    uri: str,
    results: list[shards.ShardResult],
    rejected: list[dict[str, str]],
    planned: int,
) -> None:
    rejected = sorted(rejected, key=lambda r: r["name"])
    with store.staging() as folder:
        shards.write_index(results, folder / shards.INDEX)
        (folder / REJECTED).write_text("".join(json.dumps(r, sort_keys=True) + "\n" for r in rejected))
        files = {name: manifest.entry_of(folder / name) for name in (shards.INDEX, REJECTED)}
        for name in files:
            store.upload(folder / name, store.join(uri, name))
    for result in results:
        files[result.entry.name] = manifest.FileEntry(size=result.entry.bytes, sha256=result.entry.sha256)
    meta: dict[str, Any] = {
        "source": config.source.name,
        "split": split,
        "seed": config.seed,
        "samples": sum(result.entry.count for result in results),
        "planned": planned,
        "rejected": dict(sorted(collections.Counter(r["reason"] for r in rejected).items())),
    }
    if config.source.name == "shapes":
        meta["unseen"] = [synthetic.caption(kind) for kind in synthetic.UNSEEN]
    manifest.seal(uri, files, kind="dataset", config=compose.to_dict(config), meta=meta)
    print(f"{split}: {meta['samples']} pictures in {len(results)} shards, {len(rejected)} rejected", flush=True)


def _discard(plans: list[ShardPlan]) -> None:
    """Remove what a failed build wrote, manifests first: both splits are there, or none."""
    for uri in {p.uri for p in plans}:
        store.delete(store.join(uri, manifest.NAME))
    for p in plans:
        for name in (p.name, shards.INDEX, REJECTED):
            store.delete(store.join(p.uri, name))
    for uri in {p.uri for p in plans}:
        if not store.is_remote(uri):
            _remove_if_empty(store.local_path(uri))


def _remove_if_empty(path: Path) -> None:
    for folder in (path, path.parent):
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
