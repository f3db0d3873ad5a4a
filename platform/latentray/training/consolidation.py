"""Whole weights from the parts that the ranks of a run wrote: plain file reading, on any machine."""

from __future__ import annotations

import time

from latentray.checkpoint import manifest, store, weights
from latentray.config.export import Export
from latentray.errors import ArtifactError, InputMissing
from latentray.training import checkpoint, denoiser_weights, initial_weights
from latentray.training.checkpoint import Saved
from latentray.training.partitions import EMA, WEIGHT, Pieces

KIND = "weights"


def export(config: Export) -> str:
    """Write `<out>/<network>.safetensors`, fp32, for every network of a checkpoint, and return the URI.

    A network without an average (a discriminator) has its weights written. Raises InputMissing where the run has no
    checkpoint, DigestMismatch where a part of it is damaged, AlreadyExists where `out` holds an artifact.
    """
    assert config.out is not None
    out = store.absolute(config.out)
    manifest.refuse_existing(out)
    saved = _newest(store.absolute(config.run)) if config.run else _named(store.absolute(config.checkpoint or ""))
    if config.pin:  # before it is read: the run may go on, and remove it
        store.write_json(store.join(saved.uri, checkpoint.PINNED), {"exported_to": out, "at": time.time()})
        manifest.read(saved.uri, kind=checkpoint.KIND)
    with store.staging() as folder:
        for network in sorted({name.split("/", 1)[0] for name in saved.manifest.files}):
            pieces = Pieces([manifest.fetch_file(saved.uri, part, saved.manifest) for part in saved.parts(network)])
            state = config.state if config.state in pieces.states else WEIGHT
            full = pieces.full(state)
            about = saved.manifest
            if network == "denoiser":
                full = denoiser_weights.whole(full, about.config, about.inputs)
            elif network == "autoencoder":
                full = initial_weights.whole(full, pieces, about.config, about.inputs, averaged=state == EMA)
            weights.save(folder / f"{network}.safetensors", full)
        meta = {"state": config.state, "step": saved.step, "samples": saved.samples, "checkpoint": saved.uri}
        made = manifest.publish(
            folder,
            out,
            kind=KIND,
            inputs={**saved.manifest.inputs, "checkpoint": saved.manifest.digest},
            config=saved.manifest.config,
            meta=meta,
        )
    print(f"{', '.join(made.files)} at {saved.samples} samples ({config.state}): {out}")
    return out


def _newest(run: str) -> Saved:
    """The newest checkpoint of a run that is whole."""
    for saved in checkpoint.candidates(run):
        try:
            for name in saved.manifest.files:
                manifest.fetch_file(saved.uri, name, saved.manifest)
            return saved
        except ArtifactError as error:
            print(f"checkpoint passed over: {error}", flush=True)
    raise InputMissing("The run has no checkpoint that is whole.", where=run, mend="Check the run's folder.")


def _named(uri: str) -> Saved:
    return Saved(uri=uri, manifest=manifest.read(uri, kind=checkpoint.KIND))
