"""The job that encodes pictures and captions once: a Ray Data graph of one row per shard over a pool of encoder actors.

An output shard has its input's name. Its tar is uploaded first and its `.json` sidecar last: the sidecar is the commit,
and holds the key (fingerprint of autoencoder, text encoder and preprocessing). A job that is run again skips what is
committed under the same key, and redoes the rest.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import safetensors.torch
import torch

from latentray import build
from latentray.checkpoint import manifest, store
from latentray.conditioning import text, tiny_text_encoder
from latentray.config import compose
from latentray.config.precompute_latents import PrecomputeLatents
from latentray.data import decode, latents, members, shards
from latentray.errors import AlreadyExists, InputMissing
from latentray.records import TextEmbedding
from latentray.reporting.progress import tracked

SPLITS = ("train", "validation")
_CAPTIONS_FOR_TOKENIZER = 100_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What every row of the graph shares."""

    data: str
    out: str
    autoencoder: str
    text_source: str
    text_name: str
    text_dtype: str
    key: str
    size: int
    batch_size: int
    flip_variants: bool
    device: str


def precompute(config: PrecomputeLatents) -> list[str]:
    """Encode every split of the data set and return the URIs of the latents.

    Raises InputMissing, DigestMismatch or AlreadyExists before Ray starts.
    """
    data, out = store.absolute(config.data or ""), store.absolute(config.out or "")
    splits = {name: shards.IndexedShards.open(store.join(data, name)) for name in SPLITS if _has(data, name)}
    if "train" not in splits:
        raise InputMissing(
            "There is no training split.", where=store.join(data, "train"), mend="Build the shards first."
        )
    for one in splits.values():
        one.verify()
    artifact = build.autoencoder_artifact(store.absolute(config.autoencoder_from or ""))
    source = _text_source(config, splits["train"])
    encoder = text.load(source, name=config.text_encoder.name)
    size = config.size or artifact.size
    key = latents.key_of(
        config, autoencoder_fingerprint=artifact.fingerprint, text_fingerprint=encoder.fingerprint, size=size
    )
    todo = {name: one for name, one in splits.items() if not _committed(store.join(out, name), key)}
    store.require_space(out, sum(_bytes_of(config, one.count, artifact, encoder) for one in todo.values()))
    plans, stores = [], []
    for name, one in todo.items():
        described = latents.LatentStore(
            uri=store.join(out, name),
            key=key,
            autoencoder_uri=artifact.uri,
            autoencoder_fingerprint=artifact.fingerprint,
            scale=artifact.scale,
            channels=artifact.config.latent_channels,
            size=size,
            encoder=encoder.name,
            text_source=source,
            text_fingerprint=encoder.fingerprint,
            text_width=encoder.width,
            listing=one.manifest,
        )
        stores.append(described)
        plan = Plan(
            data=one.uri,
            out=described.uri,
            autoencoder=artifact.uri,
            text_source=source,
            text_name=encoder.name,
            text_dtype=config.text_dtype,
            key=key,
            size=size,
            batch_size=config.batch_size,
            flip_variants=config.flip_variants,
            device=config.device,
        )
        plans.append(plan)
    sources = list(todo.values())
    results = _encode_all(config, plans, sources) if plans else []
    inputs = {"autoencoder": artifact.digest, "text_encoder": encoder.digest}
    for one, described, done in zip(sources, stores, results, strict=True):
        _commit(config, one, described, done, encoder.embed([""]), inputs)
    print(f"Latents: {out} (key {key[:12]})")
    print(f"Next: python -m jobs.train stage=diffusion latents={out}", flush=True)
    return [store.join(out, name) for name in splits]


def _has(data: str, split: str) -> bool:
    return store.exists(store.join(data, split, manifest.NAME))


def _text_source(config: PrecomputeLatents, train: shards.IndexedShards) -> str:
    """Where the text encoder is; a tiny one is made there first where the configuration says so."""
    wanted = config.text_encoder
    if wanted.build is None:
        return wanted.source
    source = store.absolute(wanted.source)
    if manifest.find(source) is None:
        captions = (
            caption
            for x in range(min(train.count, _CAPTIONS_FOR_TOKENIZER))
            for caption in members.captions_of(members.decode_sample(_only_texts(train.read(x))))
        )
        tiny_text_encoder.publish(source, captions, wanted.build)
        print(f"Made a tiny text encoder: {source}", flush=True)
    return source


def _only_texts(sample: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in sample.items() if name.startswith("__") or name in ("txt", "json")}


def _committed(uri: str, key: str) -> bool:
    """True where this split is finished under this key. Raises AlreadyExists where it is finished under another."""
    found = manifest.find(uri)
    if found is None:
        return False
    if found.meta.get("key") != key:
        raise AlreadyExists(
            "There are latents already, of another autoencoder, text encoder or preprocessing.",
            where=uri,
            mend="Choose another out=..., or delete that folder first.",
        )
    print(f"skipped {uri}: it is finished")
    return True


def _bytes_of(
    config: PrecomputeLatents, count: int, artifact: build.AutoencoderArtifact, encoder: text.TextEncoder
) -> int:
    side = (config.size or artifact.size) // artifact.config.downsampling
    latent = 2 * 4 * artifact.config.latent_channels * side * side
    return count * (latent + 4 * encoder.max_tokens * encoder.width + 4096) * (2 if config.flip_variants else 1)


class EncoderActor:
    """Encodes whole shards, in one canonical batch shape: a latent does not depend on what was encoded beside it."""

    def __init__(self, *plans: Plan) -> None:
        self.plan = plan = plans[0]  # plans differ in the split they read and write, in nothing else
        self.splits = [(shards.IndexedShards.open(one.data), one.out) for one in plans]
        self.device = build.device(plan.device)
        torch.set_num_threads(1 if self.device.type == "cpu" else torch.get_num_threads())
        self.autoencoder = build.autoencoder_artifact(plan.autoencoder).load().to(self.device)
        self.encoder = text.load(plan.text_source, name=plan.text_name, device=self.device)
        self._embedded: dict[str, TextEmbedding] = {}

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[str]]:
        pairs = zip(batch["shard"].tolist(), batch["split"].tolist(), strict=True)
        return {"split": batch["split"].tolist(), "result": [json.dumps(self.encode(*pair)) for pair in pairs]}

    def encode(self, number: int, split: int = 0) -> dict[str, Any]:
        """Encode one input shard, or find it done; the shard's entry and index rows."""
        source, out = self.splits[split]
        name = source.shards[number].name
        sidecar = store.join(out, f"{name}.json")
        if store.exists(sidecar):
            done = store.read_json(sidecar)
            if done["key"] == self.plan.key:
                return done["result"]
        rows = np.flatnonzero(source.shard_numbers == number)
        with store.staging() as folder:
            result = shards.write_shard(self._records(source, rows.tolist()), folder / name).to_dict()
            store.upload(folder / name, store.join(out, name))
        store.write_json(sidecar, {"key": self.plan.key, "result": result})
        return result

    def _records(self, source: shards.IndexedShards, rows: list[int]) -> Iterator[shards.Sample]:
        flips = (False, True) if self.plan.flip_variants else (False,)
        per_batch = max(self.plan.batch_size // len(flips), 1)
        for i in range(0, len(rows), per_batch):
            samples = [members.decode_sample(source.read(x)) for x in rows[i : i + per_batch]]
            pixels = [decode.to_square(members.picture_of(sample), self.plan.size) for sample in samples]
            variants = [
                (s, p[:, ::-1] if flip else p, flip) for s, p in zip(samples, pixels, strict=True) for flip in flips
            ]
            mean, logvar = self._latents([p for _, p, _ in variants])
            for row, (sample, _, flip) in enumerate(variants):
                yield self._sample(sample, mean[row], logvar[row], flip)

    @torch.inference_mode()
    def _latents(self, pixels: list[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
        """(n, C, h, w) mean and log-variance; padded to the canonical batch and cut back."""
        x = decode.to_tensor(np.ascontiguousarray(np.stack(pixels)))
        padded = torch.zeros(self.plan.batch_size, *x.shape[1:])
        padded[: len(x)] = x
        posterior = self.autoencoder.encode(padded.to(self.device))
        return posterior.mean_BChw[: len(x)].float().cpu(), posterior.logvar_BChw[: len(x)].float().cpu()

    def _sample(self, sample: dict[str, Any], mean: torch.Tensor, logvar: torch.Tensor, flip: bool) -> shards.Sample:
        captions = members.captions_of(sample)
        missing = [c for c in captions if c not in self._embedded]
        if missing:
            embedded = self.encoder.embed(missing)
            for i, caption in enumerate(missing):
                self._embedded[caption] = embedded.rows(slice(i, i + 1))
        parts = [self._embedded[c] for c in captions]
        joined = TextEmbedding(
            tokens_BLD=torch.cat([p.tokens_BLD for p in parts]),
            mask_BL=torch.cat([p.mask_BL for p in parts]),
            pooled_BD=torch.cat([p.pooled_BD for p in parts]),
        )
        if len(self._embedded) > 65_536:
            self._embedded.clear()
        about = sample.get("json") or {}
        width, height = about.get("width", self.plan.size), about.get("height", self.plan.size)
        shown = {
            "captions": captions,
            "source": sample["__key__"],
            "source_sha256": about.get("sha256", ""),
            "original_size": [height, width],
            "crop_top_left": [max(0, (height - min(width, height)) // 2), max(0, (width - min(width, height)) // 2)],
            "target_size": [self.plan.size, self.plan.size],
            "flip": flip,
        }
        dtype = getattr(torch, self.plan.text_dtype)
        return shards.Sample(
            key=f"{sample['__key__']}_{int(flip)}",
            members=latents.record(mean, logvar, self.plan.text_name, joined, dtype)
            | {"json": json.dumps(shown, sort_keys=True, ensure_ascii=False).encode()},
            columns={"width": self.plan.size, "height": self.plan.size},
        )


def _encode_all(
    config: PrecomputeLatents, plans: list[Plan], sources: list[shards.IndexedShards]
) -> list[list[shards.ShardResult]]:
    """Encode all shards of all splits in one pool of actors; the results of each split."""
    total = sum(len(source.shards) for source in sources)
    results: list[list[shards.ShardResult]] = [[] for _ in plans]
    for split, values in tracked(_run(config, plans, sources), total, "encoding shards"):
        results[split].append(shards.ShardResult.from_dict(values))
    return results


def _commit(
    config: PrecomputeLatents,
    source: shards.IndexedShards,
    described: latents.LatentStore,
    results: list[shards.ShardResult],
    empty: TextEmbedding,
    inputs: dict[str, str],
) -> None:
    """Write the index, the empty prompt and the manifest of a split."""
    uri = described.uri
    with store.staging() as folder:
        shards.write_index(results, folder / shards.INDEX)
        tensors = {"tokens": empty.tokens_BLD, "mask": empty.mask_BL, "pooled": empty.pooled_BD}
        safetensors.torch.save_file({k: v.contiguous() for k, v in tensors.items()}, folder / latents.EMPTY_PROMPT)
        files = {name: manifest.entry_of(folder / name) for name in (shards.INDEX, latents.EMPTY_PROMPT)}
        for name in files:
            store.upload(folder / name, store.join(uri, name))
    for result in results:
        files[result.entry.name] = manifest.FileEntry(size=result.entry.bytes, sha256=result.entry.sha256)
    meta = latents.meta_of(described) | {"samples": sum(r.entry.count for r in results)}
    lineage = inputs | {"dataset": source.manifest.digest}
    manifest.seal(uri, files, kind=latents.KIND, inputs=lineage, config=compose.to_dict(config), meta=meta)
    for entry in source.shards:  # the manifest is the commit now
        store.delete(store.join(uri, f"{entry.name}.json"))


def _run(
    config: PrecomputeLatents, plans: list[Plan], sources: list[shards.IndexedShards]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Encode all shards on Ray: (split, result) as they finish."""
    import ray
    import ray.data

    from latentray.data import cluster

    cluster.connect(config.address)
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    rows = [{"split": split, "shard": n} for split, source in enumerate(sources) for n in range(len(source.shards))]
    gpus = 1 if config.device != "cpu" and ray.cluster_resources().get("GPU", 0) >= 1 else 0
    most = min(config.actors[1], len(rows))
    encoded = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        EncoderActor,
        fn_constructor_args=tuple(plans),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(min_size=min(config.actors[0], most), max_size=most),
        num_cpus=1,
        num_gpus=gpus,
    )
    for row in encoded.iter_rows():
        yield int(row["split"]), json.loads(row["result"])
