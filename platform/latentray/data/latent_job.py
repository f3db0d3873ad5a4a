"""From settings to a latent job: its inputs opened and checked, and its work listed."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from latentray import build
from latentray.checkpoint import manifest, store
from latentray.conditioning.encoders import Encoder
from latentray.config.precompute_latents import PrecomputeLatents
from latentray.data import latent_inputs, latent_plan, latent_reuse, latent_shards, latents, shards
from latentray.data.latent_parts import Job, SplitJob
from latentray.data.latent_plan import Ints, Shapes
from latentray.data.latent_sources import Window
from latentray.errors import AlreadyExists, InputMissing

SPLITS = ("train", "validation")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardWork:
    """A shard that is not committed yet."""

    split: int
    shard: int
    name: str
    parts: int
    left: list[latent_plan.Part]
    written: dict[int, str]
    """Number -> file name of the parts that an earlier run wrote."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """A job with all its inputs opened."""

    job: Job
    outs: list[str]
    """What stage 2 is given: `out`, or with several sizes a folder below for each."""
    sources: list[shards.IndexedShards]
    """The data set of each split."""
    buckets: list[Ints]
    """The bucket of each sample, by split."""
    stores: list[list[latents.LatentStore]]
    """The stores of each split: one for each size of squares, or one of all buckets."""
    unfinished: list[int]
    """The splits that are not committed."""
    work: list[ShardWork]
    encoders: list[Encoder]
    downsampling: int
    """The autoencoder's factor."""
    inputs: dict[str, str]
    """Digests for lineage; each split adds its data set, and what it reuses."""


def plan(config: PrecomputeLatents, scratch: Path | None = None) -> Plan:
    """Open and check everything, and list what is left to do.

    Nothing is written but the tiny text encoder of a configuration that makes one: into `scratch`, where that is given.
    """
    data = store.absolute(config.data or "")
    names = [name for name in SPLITS if store.exists(store.join(data, name, manifest.NAME))]
    if "train" not in names:
        raise InputMissing(
            "There is no training split.", where=store.join(data, "train"), mend="Build the shards first."
        )
    sources = [shards.IndexedShards.open(store.join(data, name)) for name in names]
    for source in sources:
        source.verify()
    artifact = build.autoencoder_artifact(store.absolute(config.autoencoder_from or ""))
    window = latent_inputs.window(config, sources)
    sizes, shapes = latent_inputs.shapes(config, artifact)
    buckets = [latent_inputs.buckets_of(source, shapes) for source in sources]
    outs = _outs(config, sizes)
    loaded = [latent_inputs.text_encoder(one, sources[0], scratch) for one in config.all_text_encoders]
    texts = tuple(latents.TextSource.of(encoder, where) for encoder, where in loaded)
    stores = [
        [
            _store(config, artifact, texts, size, shapes, window, store.join(out, name), source)
            for size, out in zip(sizes, outs, strict=True)
        ]
        for name, source in zip(names, sources, strict=True)
    ]
    held = [_held(config, name, of_split) for name, of_split in zip(names, stores, strict=True)]
    job = Job(
        splits=tuple(
            _split_job(config, source, of_split, older)
            for source, of_split, older in zip(sources, stores, held, strict=True)
        ),
        samples=sum(source.count for source in sources),
        autoencoder=artifact.uri,
        texts=texts,
        views=latent_inputs.views([encoder for encoder, _ in loaded], window),
        shapes=tuple((shape,) for shape in shapes.all) if shapes else (tuple((size, size) for size in sizes),),
        window=window,
        variants=stores[0][0].variants,
        batch_size=config.batch_size,
        precision=config.precision,
        latent_dtype=config.latent_dtype,
        text_dtype=config.text_dtype,
        max_pixels=config.max_pixels,
        skip_damaged=config.damage.policy == "skip",
        device=config.device,
    )
    unfinished = [number for number, of_split in enumerate(stores) if not _finished(of_split, sources[number])]
    inputs = {"autoencoder": artifact.digest}
    for number, (encoder, _) in enumerate(loaded):
        inputs["text_encoder" if number == 0 else f"text_encoder.{encoder.name}"] = encoder.digest
    return Plan(
        job=job,
        outs=outs,
        sources=sources,
        buckets=buckets,
        stores=stores,
        unfinished=unfinished,
        work=[one for n in unfinished for one in _work(job, n, sources[n], buckets[n], held[n])],
        encoders=[encoder for encoder, _ in loaded],
        downsampling=artifact.config.downsampling,
        inputs=inputs,
    )


def _outs(config: PrecomputeLatents, sizes: Sequence[int]) -> list[str]:
    out = store.absolute(config.out or "")
    return [out] if len(sizes) == 1 else [store.join(out, str(size)) for size in sizes]


def _store(
    config: PrecomputeLatents,
    artifact: build.AutoencoderArtifact,
    texts: tuple[latents.TextSource, ...],
    size: int,
    shapes: Shapes | None,
    window: Window | None,
    uri: str,
    source: shards.IndexedShards,
) -> latents.LatentStore:
    clip = dataclasses.asdict(window) if window else {}
    key = latents.key_of(
        config, autoencoder_fingerprint=artifact.fingerprint, texts=texts, size=None if shapes else size, **clip
    )
    return latents.LatentStore(
        uri=uri,
        key=key,
        autoencoder_uri=artifact.uri,
        autoencoder_fingerprint=artifact.fingerprint,
        scale=artifact.scale,
        channels=artifact.config.latent_channels,
        size=size,
        buckets=shapes.all if shapes else (),
        texts=texts,
        variants=latent_plan.variants(config.crops, config.flip_variants),
        classes=tuple(source.manifest.meta.get("classes", ())),
        listing=source.manifest,
        **clip,
    )


def _held(config: PrecomputeLatents, split: str, stores: Sequence[latents.LatentStore]) -> list[latent_reuse.Held]:
    """What each older store holds of a split; none where nothing is reused, or it lacks the split."""
    if not config.reuse:
        return []
    root = store.absolute(config.reuse)
    uris = [store.join(root, *([] if len(stores) == 1 else [str(one.size)]), split) for one in stores]
    if split != "train" and not all(store.exists(store.join(uri, manifest.NAME)) for uri in uris):
        return []
    return [latent_reuse.Held.open(uri, one.key) for uri, one in zip(uris, stores, strict=True)]


def _split_job(
    config: PrecomputeLatents,
    source: shards.IndexedShards,
    stores: Sequence[latents.LatentStore],
    held: Sequence[latent_reuse.Held],
) -> SplitJob:
    decides = {
        "keys": [one.key for one in stores],
        "variants": list(stores[0].variants),
        "dataset": source.manifest.digest,
        "max_pixels": config.max_pixels,
    }
    if stores[0].buckets:
        decides["buckets"] = stores[0].buckets
    cut = {"batch_size": config.batch_size, "older": [one.digest for one in held]}
    return SplitJob(
        data=source.uri,
        data_digest=source.manifest.digest,
        outs=tuple(one.uri for one in stores),
        older=tuple(one.uri for one in held),
        parts=store.join(stores[0].uri, f"parts-{store.digest_of(decides | cut)[:16]}"),
        plan=store.digest_of(decides),
    )


def _finished(stores: Sequence[latents.LatentStore], source: shards.IndexedShards) -> bool:
    """True where every store of a split is committed. Raises AlreadyExists where one is committed with other content."""
    found = [manifest.find(one.uri) for one in stores]
    for one, listing in zip(stores, found, strict=True):
        if listing is None:
            continue
        meta = listing.meta | {"buckets": listing.meta.get("buckets", [])}
        if any(meta.get(name) != latents.meta_of(one)[name] for name in ("key", "variants", "buckets")):
            what, mend = "of another autoencoder, text encoder or preprocessing", "Choose another out=..."
        elif listing.inputs.get("dataset") != source.manifest.digest:
            what = "of another data set, or of this one before it changed"
            mend = "Choose another out=... and add reuse=<these latents>: only what is new is encoded"
        else:
            continue
        raise AlreadyExists(
            f"There are latents already, {what}.", where=one.uri, mend=f"{mend}; or delete that folder first."
        )
    if all(found):
        print(f"skipped {', '.join(one.uri for one in stores)}: finished")
    return all(found)


def _work(
    job: Job, number: int, source: shards.IndexedShards, buckets: Ints, held: Sequence[latent_reuse.Held]
) -> list[ShardWork]:
    """The shards of a split that are not committed, and what is left of each."""
    split = job.splits[number]
    written = latent_shards.parts_there(split)
    digests = latent_reuse.digests_of(source, "sha256") if held else None
    found = []
    for shard, entry in enumerate(source.shards):
        if latent_shards.committed(split, entry.name):
            continue
        units = latent_plan.units_of(source.index.rows_of(shard), job.variants)
        of_units = buckets[units // latent_plan.VARIANTS]
        older = np.full((len(units), job.stores), -1, np.int64)
        if digests is not None:
            shapes = np.array(job.shapes, np.int64)[of_units]  # (units, stores, 2)
            each = [latent_reuse.units_held(one, digests, units, shapes[:, i]) for i, one in enumerate(held)]
            older = np.stack(each, axis=1)
        parts = latent_plan.parts_of(number, shard, units, of_units, older, job.units_per_part)
        there = {part.number: written[shard, part.number] for part in parts if (shard, part.number) in written}
        left = [part for part in parts if part.number not in there]
        found.append(ShardWork(split=number, shard=shard, name=entry.name, parts=len(parts), left=left, written=there))
    return found
