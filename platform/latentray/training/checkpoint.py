"""Checkpoints of a run: every rank uploads its part, rank 0 writes the manifest last.

Layout: `<run>/checkpoints/<step>-<attempt>/<engine>/...` and `manifest.json`. The newest valid one is found by listing
manifests; a folder without one, of a dead attempt, is never read. A damaged checkpoint is refused by name, and the one
before it is used.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping
from typing import Any

import torch.distributed as dist

from latentray.checkpoint import manifest, store
from latentray.errors import ArtifactError, DigestMismatch, FingerprintMismatch
from latentray.training.ema import EMA
from latentray.training.engine import Engine
from latentray.training.state import Worker

KIND = "checkpoint"


@dataclasses.dataclass(kw_only=True)
class Saved:
    """A checkpoint that was found: where, and the cursor of the step to do next."""

    uri: str
    manifest: manifest.Manifest

    @property
    def step(self) -> int:
        return int(self.manifest.meta["cursor"]["step"])

    @property
    def cursor(self) -> dict[str, Any]:
        return self.manifest.meta["cursor"]


def save(
    worker: Worker,
    engines: Mapping[str, Engine],
    ema: EMA,
    *,
    cursor: Mapping[str, Any],
    inputs: Mapping[str, str],
    config: Mapping[str, Any],
    fingerprint: str,
) -> str:
    """Write a checkpoint of all ranks and return its URI. Collective."""
    uri = store.join(_root(worker), f"{cursor['step']:09d}-{worker.attempt}")
    with store.staging() as folder:
        for name, engine in engines.items():
            engine.save(folder, name)
        ema.save(folder / f"ema_rank_{worker.rank:05d}.safetensors")
        entries = {
            p.relative_to(folder).as_posix(): manifest.entry_of(p) for p in sorted(folder.rglob("*")) if p.is_file()
        }
        for name in entries:
            store.upload(folder / name, store.join(uri, name))
    everyone: list[dict[str, manifest.FileEntry]] = [{} for _ in range(worker.world)]
    dist.all_gather_object(everyone, entries)
    if worker.leads:
        files = {name: entry for part in everyone for name, entry in part.items()}
        meta = {
            "cursor": dict(cursor),
            "world": worker.world,
            "zero_stage": worker.config.deepspeed.zero_stage,
            "precision": worker.config.precision,
            "fingerprint": fingerprint,
        }
        manifest.seal(uri, files, kind=KIND, inputs=inputs, config=config, meta=meta)
        _retain(worker)
    dist.barrier()
    return uri


def newest(out: str) -> Saved | None:
    """The newest checkpoint of a run whose every file matches its manifest; None where there is none.

    A damaged one is named on standard output and passed over.
    """
    for saved in reversed(_committed(store.join(out, "checkpoints"))):
        try:
            for name in saved.manifest.files:
                manifest.fetch_file(saved.uri, name, saved.manifest)
            return saved
        except ArtifactError as error:
            print(f"checkpoint passed over: {error}", flush=True)
    return None


def restore(worker: Worker, saved: Saved, engines: Mapping[str, Engine], ema: EMA, *, fingerprint: str) -> None:
    """Load a checkpoint into engines and EMA. Collective.

    Raises FingerprintMismatch where it was written by another world size, ZeRO stage, precision, model or objective.
    """
    meta, config = saved.manifest.meta, worker.config
    now = {
        "world": worker.world,
        "zero_stage": config.deepspeed.zero_stage,
        "precision": config.precision,
        "fingerprint": fingerprint,
    }
    differing = [f"{key}: {meta[key]} then, {value} now" for key, value in now.items() if meta[key] != value]
    if differing:
        raise FingerprintMismatch(
            f"The run cannot be continued with these settings ({'; '.join(differing)}).",
            where=saved.uri,
            mend="Resume with the settings the run began with, or begin a new run.",
        )
    with store.staging() as folder:
        for name in saved.manifest.files:
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(manifest.fetch_file(saved.uri, name, saved.manifest), target)
        for name, engine in engines.items():
            engine.load(folder, name)
        ema.load(folder / f"ema_rank_{worker.rank:05d}.safetensors")
        dist.barrier()


def _root(worker: Worker) -> str:
    return store.join(worker.out, "checkpoints")


def _committed(root: str) -> list[Saved]:
    """Every checkpoint with a manifest, oldest first; one whose manifest is damaged is named and left out."""
    found = []
    for name in store.list_folders(root):
        uri = store.join(root, name)
        try:
            listing = manifest.find(uri)
        except DigestMismatch as error:
            print(f"checkpoint passed over: {error}", flush=True)
            continue
        if listing is not None:
            found.append(Saved(uri=uri, manifest=listing))
    return sorted(found, key=lambda saved: (saved.step, saved.manifest.created))


def _retain(worker: Worker) -> None:
    """Keep the newest `keep_checkpoints`; a dropped one loses its manifest first, so it is never seen in part."""
    for saved in _committed(_root(worker))[: -worker.config.keep_checkpoints]:
        store.delete(store.join(saved.uri, manifest.NAME))
        store.delete(saved.uri)
