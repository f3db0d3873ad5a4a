"""From settings to a latent job: its inputs checked, its work listed, and its stores committed in the end."""

from __future__ import annotations

import collections
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import safetensors.torch
import torch

from latentray import build
from latentray.checkpoint import manifest, store
from latentray.conditioning import text, tiny_text_encoder
from latentray.config import compose
from latentray.config.precompute_latents import PrecomputeLatents
from latentray.config.text_encoder import TextEncoderConfig
from latentray.data import index, latent_plan, latent_reuse, latent_shards, latents, members, shards
from latentray.data.damage import require_few
from latentray.data.latent_parts import Job, SplitJob, only_texts
from latentray.data.latent_shards import Committed
from latentray.errors import AlreadyExists, ConfigError, InputMissing

SPLITS = ("train", "validation")
REJECTED = "rejected.jsonl"
UNFINISHED = "unfinished.json"
_CAPTIONS_FOR_TOKENIZER = 100_000
_RECORD_BYTES = 4096  # JSON, tar blocks, index row


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
    stores: list[list[latents.LatentStore]]
    """The store of each split and size."""
    unfinished: list[int]
    """The splits that are not committed."""
    work: list[ShardWork]
    encoders: list[text.TextEncoder]
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
    loaded = [_text_encoder(one, sources[0], scratch) for one in config.all_text_encoders]
    texts = tuple(_text_source(encoder, where) for encoder, where in loaded)
    sizes = tuple(config.sizes or [artifact.size])
    outs = _outs(config, artifact, sizes)
    stores = [
        [
            _store(config, artifact, texts, size, store.join(out, name), source)
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
        sizes=sizes,
        variants=stores[0][0].variants,
        batch_size=config.batch_size,
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
        stores=stores,
        unfinished=unfinished,
        work=[one for number in unfinished for one in _work(job, number, sources[number], held[number])],
        encoders=[encoder for encoder, _ in loaded],
        downsampling=artifact.config.downsampling,
        inputs=inputs,
    )


def _outs(config: PrecomputeLatents, artifact: build.AutoencoderArtifact, sizes: Sequence[int]) -> list[str]:
    factor = artifact.config.downsampling
    for size in sizes:
        if size % factor:
            raise ConfigError(
                f"Pictures of {size} pixels do not divide by the autoencoder's factor {factor}.",
                where="sizes",
                mend=f"Choose multiples of {factor}.",
            )
    out = store.absolute(config.out or "")
    return [out] if len(sizes) == 1 else [store.join(out, str(size)) for size in sizes]


def _text_encoder(
    wanted: TextEncoderConfig, train: shards.IndexedShards, scratch: Path | None
) -> tuple[text.TextEncoder, str]:
    """A text encoder and where it is; a tiny one is made there first where the configuration says so."""
    source = wanted.source
    if wanted.build is not None:
        source = store.absolute(source)
        if manifest.find(source) is None:
            source = source if scratch is None else str(scratch / wanted.name)
            captions = (
                caption
                for x in range(min(train.count, _CAPTIONS_FOR_TOKENIZER))
                for caption in members.captions_of(members.decode_sample(only_texts(train.read(x))))
            )
            tiny_text_encoder.publish(source, captions, wanted.build)
            print(f"Made a tiny text encoder: {source}", flush=True)
    return text.load(source, name=wanted.name), source


def _text_source(encoder: text.TextEncoder, source: str) -> latents.TextSource:
    return latents.TextSource(
        name=encoder.name,
        source=source,
        fingerprint=encoder.fingerprint,
        width=encoder.width,
        max_tokens=encoder.max_tokens,
    )


def _store(
    config: PrecomputeLatents,
    artifact: build.AutoencoderArtifact,
    texts: tuple[latents.TextSource, ...],
    size: int,
    uri: str,
    source: shards.IndexedShards,
) -> latents.LatentStore:
    return latents.LatentStore(
        uri=uri,
        key=latents.key_of(config, autoencoder_fingerprint=artifact.fingerprint, texts=texts, size=size),
        autoencoder_uri=artifact.uri,
        autoencoder_fingerprint=artifact.fingerprint,
        scale=artifact.scale,
        channels=artifact.config.latent_channels,
        size=size,
        texts=texts,
        variants=latent_plan.variants(config.crops, config.flip_variants),
        listing=source.manifest,
    )


def _held(config: PrecomputeLatents, split: str, stores: Sequence[latents.LatentStore]) -> list[latent_reuse.Held]:
    """What the older store of each size holds of a split; none where nothing is reused, or it lacks the split."""
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
        if listing.meta.get("key") != one.key or listing.meta.get("variants") != list(one.variants):
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


def _work(job: Job, number: int, source: shards.IndexedShards, held: Sequence[latent_reuse.Held]) -> list[ShardWork]:
    """The shards of a split that are not committed, and what is left of each."""
    split = job.splits[number]
    written = latent_shards.parts_there(split)
    digests = latent_reuse.digests_of(source, "sha256") if held else None
    found = []
    for shard, entry in enumerate(source.shards):
        if latent_shards.committed(split, entry.name):
            continue
        units = latent_plan.units_of(source.index.rows_of(shard), job.variants)
        older = np.full((len(units), len(job.sizes)), -1, np.int64)
        if digests is not None:
            older = np.stack([latent_reuse.units_held(one, digests, units) for one in held], axis=1)
        parts = latent_plan.parts_of(number, shard, units, older, job.batch_size)
        there = {part.number: written[shard, part.number] for part in parts if (shard, part.number) in written}
        left = [part for part in parts if part.number not in there]
        found.append(ShardWork(split=number, shard=shard, name=entry.name, parts=len(parts), left=left, written=there))
    return found


def begin(plan: Plan) -> None:
    """Note in each unfinished store what it is to be, and drop what a run with other settings, or one cut short, left.

    Raises ConfigError where a run that was cut short used another batch size: its shards would mix two shapes.
    EnvironmentRefused where the disk is too full.
    """
    store.require_space(plan.stores[0][0].uri, sum(_bytes_of(plan, number) for number in plan.unfinished))
    for number, split in enumerate(plan.job.splits):
        where = store.join(split.outs[0], UNFINISHED)
        if number not in plan.unfinished:
            if store.exists(where):
                _tidy(split)
            continue
        wanted = {"plan": split.plan, "batch_size": plan.job.batch_size}
        noted = store.read_json(where) if store.exists(where) else wanted
        if noted["plan"] != split.plan:
            _tidy(split)
        elif noted["batch_size"] != wanted["batch_size"]:
            raise ConfigError(
                f"These latents were begun with batch_size={noted['batch_size']}.",
                where=split.outs[0],
                mend=f"Set batch_size={noted['batch_size']} to go on, or delete that folder to begin anew.",
            )
        store.write_json(where, wanted)


def _bytes_of(plan: Plan, number: int) -> int:
    """About how much a split will take on disk."""
    job = plan.job
    latent, embedding = (getattr(torch, name).itemsize for name in (job.latent_dtype, job.text_dtype))
    texts = sum(one.max_tokens * one.width for one in job.texts) * embedding
    each = sum(
        2 * latent * one.channels * (one.size // plan.downsampling) ** 2 + texts + _RECORD_BYTES
        for one in plan.stores[number]
    )
    return plan.sources[number].count * len(job.variants) * each


def commit(config: PrecomputeLatents, plan: Plan) -> None:
    """Write index, rejects, empty prompt and manifest of every unfinished store.

    Raises DataError, with nothing committed, where more samples are damaged than `damage` allows.
    """
    found = {number: [_sidecars(plan, number, i) for i in range(len(plan.job.sizes))] for number in plan.unfinished}
    allowed = config.damage.max_bad_fraction if plan.job.skip_damaged else 0.0
    rejected = sum(len(one.rejected) for of_split in found.values() for one in of_split[0])
    require_few(rejected, samples=plan.job.samples, allowed=allowed)
    for number, of_split in found.items():
        for described, commits in zip(plan.stores[number], of_split, strict=True):
            if manifest.find(described.uri) is None:
                _commit_store(config, plan, number, described, commits)
        _tidy(plan.job.splits[number])  # the manifests are the commit now


def _sidecars(plan: Plan, number: int, size: int) -> list[Committed]:
    split = plan.job.splits[number]
    return [
        Committed.from_bytes(store.read_bytes(latent_shards.sidecar(split, split.outs[size], entry.name)))
        for entry in plan.sources[number].shards
    ]


def _commit_store(
    config: PrecomputeLatents, plan: Plan, number: int, described: latents.LatentStore, commits: list[Committed]
) -> None:
    results = [one.result for one in commits if one.result is not None]
    rejected = [one for commit in commits for one in commit.rejected]
    counts: collections.Counter[str] = collections.Counter()
    for one in commits:
        counts.update(one.counts)
    with store.staging() as folder:
        index.write(results, folder / index.NAME)
        (folder / REJECTED).write_text("".join(json.dumps(one, sort_keys=True) + "\n" for one in rejected))
        names = [index.NAME, REJECTED]
        if plan.encoders:
            safetensors.torch.save_file(_empty_prompts(plan.encoders), folder / latents.EMPTY_PROMPT)
            names.append(latents.EMPTY_PROMPT)
        files = {name: manifest.entry_of(folder / name) for name in names}
        for name in names:
            store.upload(folder / name, store.join(described.uri, name))
    for result in results:
        files[result.entry.name] = manifest.FileEntry(size=result.entry.bytes, sha256=result.entry.sha256)
    split = plan.job.splits[number]
    lineage = plan.inputs | {"dataset": split.data_digest}
    size = plan.job.sizes.index(described.size)
    if split.older:
        lineage["reused"] = manifest.read(split.older[size]).digest
    meta = latents.meta_of(described) | {
        "samples": sum(result.entry.count for result in results),
        "batch_size": plan.job.batch_size,
        "rejected": dict(sorted(collections.Counter(one["reason"] for one in rejected).items())),
        **{name: counts[name] for name in latent_shards.COUNTED.values()},
    }
    manifest.seal(described.uri, files, kind=latents.KIND, inputs=lineage, config=compose.to_dict(config), meta=meta)
    done = ", ".join(f"{counts[name]} {name}" for name in latent_shards.COUNTED.values() if counts[name])
    print(
        f"{described.uri}: {meta['samples']} records ({done or 'none'}), {len(rejected)} pictures rejected", flush=True
    )


def _empty_prompts(encoders: Sequence[text.TextEncoder]) -> dict[str, torch.Tensor]:
    """The embedding of the empty caption by each encoder, in full precision."""
    found: dict[str, torch.Tensor] = {}
    for encoder in encoders:
        found |= latents.text_tensors(encoder.name, encoder.embed([""]), torch.float32)
    return found


def _tidy(split: SplitJob) -> None:
    """Remove what jobs leave in the stores of a split on their way: sidecars, parts, and the note of what they are to be."""
    store.delete(split.parts)
    for out in split.outs:
        names = {name.split("/", 1)[0] for name in store.list_files(out)}
        for name in names:
            if name.startswith("parts-") or name.endswith(".rows") or name == UNFINISHED:
                store.delete(store.join(out, name))
