"""The begin and the end of a latent job's stores: what unfinished ones note, and what makes them finished."""

from __future__ import annotations

import collections
import json
from collections.abc import Sequence

import numpy as np
import safetensors.torch
import torch

from latentray.checkpoint import manifest, store
from latentray.conditioning.encoders import Encoder, prefix
from latentray.config import compose
from latentray.config.precompute_latents import PrecomputeLatents
from latentray.data import index, latent_shards, latents
from latentray.data.damage import require_few
from latentray.data.latent_job import Plan
from latentray.data.latent_parts import SplitJob
from latentray.data.latent_shards import Committed
from latentray.errors import ConfigError

REJECTED = "rejected.jsonl"
UNFINISHED = "unfinished.json"
_RECORD_BYTES = 4096  # JSON, tar blocks, index row


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
    counts = np.bincount(plan.buckets[number], minlength=len(job.shapes)).tolist()
    pixels = sum(
        count * height * width
        for count, of_bucket in zip(counts, job.shapes, strict=True)
        for height, width in of_bucket
    )
    numbers = pixels * job.frames * plan.stores[number][0].channels // plan.downsampling**2
    records = plan.sources[number].count * job.stores
    return len(job.variants) * (2 * latent * numbers + records * (texts + _RECORD_BYTES))


def commit(config: PrecomputeLatents, plan: Plan) -> None:
    """Write index, rejects, empty prompt and manifest of every unfinished store.

    Raises DataError, with nothing committed, where more samples are damaged than `damage` allows.
    """
    found = {number: [_sidecars(plan, number, i) for i in range(plan.job.stores)] for number in plan.unfinished}
    allowed = config.damage.max_bad_fraction if plan.job.skip_damaged else 0.0
    rejected = sum(len(one.rejected) for of_split in found.values() for one in of_split[0])
    require_few(rejected, samples=plan.job.samples, allowed=allowed)
    for number, of_split in found.items():
        for place, commits in enumerate(of_split):
            if manifest.find(plan.stores[number][place].uri) is None:
                _commit_store(config, plan, number, place, commits)
        _tidy(plan.job.splits[number])  # the manifests are the commit now


def _sidecars(plan: Plan, number: int, place: int) -> list[Committed]:
    split = plan.job.splits[number]
    return [
        Committed.from_bytes(store.read_bytes(latent_shards.sidecar(split, split.outs[place], entry.name)))
        for entry in plan.sources[number].shards
    ]


def _commit_store(config: PrecomputeLatents, plan: Plan, number: int, place: int, commits: list[Committed]) -> None:
    described = plan.stores[number][place]
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
    if split.older:
        lineage["reused"] = manifest.read(split.older[place]).digest
    meta = latents.meta_of(described) | {
        "samples": sum(result.entry.count for result in results),
        "batch_size": plan.job.batch_size,
        "rejected": dict(sorted(collections.Counter(one["reason"] for one in rejected).items())),
        **{name: counts[name] for name in latent_shards.COUNTED.values()},
    }
    manifest.seal(described.uri, files, kind=latents.KIND, inputs=lineage, config=compose.to_dict(config), meta=meta)
    done = ", ".join(f"{counts[name]} {name}" for name in latent_shards.COUNTED.values() if counts[name])
    print(
        f"{described.uri}: {meta['samples']} records ({done or 'none'}), {len(rejected)} samples rejected", flush=True
    )


def _empty_prompts(encoders: Sequence[Encoder]) -> dict[str, torch.Tensor]:
    """What each encoder says of nothing, in full precision."""
    found: dict[str, torch.Tensor] = {}
    for encoder in encoders:
        record = prefix(encoder.reading.kind, encoder.name)
        found |= latents.text_tensors(record, encoder.nothing(), torch.float32)
    return found


def _tidy(split: SplitJob) -> None:
    """Remove what jobs leave in the stores of a split on their way: sidecars, parts, and the note of what they are to be."""
    store.delete(split.parts)
    for out in split.outs:
        names = {name.split("/", 1)[0] for name in store.list_files(out)}
        for name in names:
            if name.startswith("parts-") or name.endswith(".rows") or name == UNFINISHED:
                store.delete(store.join(out, name))
