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
from rich.console import Console
from rich.progress import track

from latentray import build
from latentray.checkpoint import manifest, store
from latentray.conditioning import text, tiny_text_encoder
from latentray.config import compose
from latentray.config.precompute_latents import PrecomputeLatents
from latentray.data import decode, latents, members, shards
from latentray.errors import AlreadyExists, InputMissing
from latentray.records import TextEmbedding

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
        _encode_split(config, plan, one, described, encoder.embed([""]), encoder.digest)
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

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.device = build.device(plan.device)
        torch.set_num_threads(1 if self.device.type == "cpu" else torch.get_num_threads())
        self.autoencoder = build.autoencoder_artifact(plan.autoencoder).load().to(self.device)
        self.encoder = text.load(plan.text_source, name=plan.text_name, device=self.device)
        self.shards = shards.IndexedShards.open(plan.data)
        self._embedded: dict[str, TextEmbedding] = {}

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[str]]:
        return {"result": [json.dumps(self.encode(int(number))) for number in batch["shard"]]}

    def encode(self, number: int) -> dict[str, Any]:
        """Encode one input shard, or find it done; the shard's entry and index rows."""
        name = self.shards.shards[number].name
        sidecar = store.join(self.plan.out, f"{name}.json")
        if store.exists(sidecar):
            done = store.read_json(sidecar)
            if done["key"] == self.plan.key:
                return done["result"]
        rows = np.flatnonzero(self.shards.shard_numbers == number)
        with store.staging() as folder:
            result = shards.write_shard(self._records(rows.tolist()), folder / name).to_dict()
            store.upload(folder / name, store.join(self.plan.out, name))
        store.write_json(sidecar, {"key": self.plan.key, "result": result})
        return result

    def _records(self, rows: list[int]) -> Iterator[shards.Sample]:
        flips = (False, True) if self.plan.flip_variants else (False,)
        per_batch = max(self.plan.batch_size // len(flips), 1)
        for i in range(0, len(rows), per_batch):
            samples = [members.decode_sample(self.shards.read(x)) for x in rows[i : i + per_batch]]
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


def _encode_split(
    config: PrecomputeLatents,
    plan: Plan,
    source: shards.IndexedShards,
    described: latents.LatentStore,
    empty: TextEmbedding,
    text_digest: str,
) -> None:
    results = [
        shards.ShardResult.from_dict(values) for values in _with_progress(_run(config, plan, source), source, plan)
    ]
    sidecars = [f"{entry.name}.json" for entry in source.shards]
    with store.staging() as folder:
        shards.write_index(results, folder / shards.INDEX)
        tensors = {"tokens": empty.tokens_BLD, "mask": empty.mask_BL, "pooled": empty.pooled_BD}
        safetensors.torch.save_file({k: v.contiguous() for k, v in tensors.items()}, folder / latents.EMPTY_PROMPT)
        files = {name: manifest.entry_of(folder / name) for name in (shards.INDEX, latents.EMPTY_PROMPT)}
        for name in files:
            store.upload(folder / name, store.join(plan.out, name))
    for result in results:
        files[result.entry.name] = manifest.FileEntry(size=result.entry.bytes, sha256=result.entry.sha256)
    inputs = {
        "dataset": source.manifest.digest,
        "autoencoder": manifest.read(plan.autoencoder).digest,
        "text_encoder": text_digest,
    }
    meta = latents.meta_of(described) | {"samples": sum(r.entry.count for r in results)}
    manifest.seal(plan.out, files, kind=latents.KIND, inputs=inputs, config=compose.to_dict(config), meta=meta)
    for name in sidecars:  # the manifest is the commit now
        store.delete(store.join(plan.out, name))


def _run(config: PrecomputeLatents, plan: Plan, source: shards.IndexedShards) -> Iterator[dict[str, Any]]:
    """Encode all shards on Ray, as they finish."""
    import ray
    import ray.data

    from latentray.data import cluster

    cluster.connect(config.address)
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    rows = [{"shard": number} for number in range(len(source.shards))]
    gpus = 1 if config.device != "cpu" and ray.cluster_resources().get("GPU", 0) >= 1 else 0
    most = min(config.actors[1], len(rows))
    encoded = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        EncoderActor,
        fn_constructor_args=(plan,),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(min_size=min(config.actors[0], most), max_size=most),
        num_cpus=1,
        num_gpus=gpus,
    )
    for row in encoded.iter_rows():
        yield json.loads(row["result"])


def _with_progress(
    results: Iterator[dict[str, Any]], source: shards.IndexedShards, plan: Plan
) -> Iterator[dict[str, Any]]:
    """A bar on a terminal; elsewhere a line per tenth of the work."""
    total = len(source.shards)
    if Console().is_terminal:
        yield from track(results, description="encoding shards", total=total, transient=True)
        return
    for number, one in enumerate(results, start=1):
        if number * 10 // total > (number - 1) * 10 // total:
            print(f"encoded {number} of {total} shards of {plan.out.rsplit('/', 1)[-1]}", flush=True)
        yield one
