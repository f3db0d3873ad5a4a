"""What can be known before a worker starts, and is refused there: inputs, disk, tracking, and a run that cannot go on so."""

from __future__ import annotations

import os

import torch

from latentray import build, tracking
from latentray.checkpoint import store
from latentray.config.train import Train
from latentray.errors import FingerprintMismatch
from latentray.training import checkpoint, inputs


def check(config: Train, out: str) -> dict[str, str]:
    """Check everything that can be known without a worker; the digests of the inputs."""
    tracking.check(config.tracking)
    found = inputs.check(config, world_of(config))
    store.require_space(out, bytes_needed(config))
    saved = checkpoint.newest(out)
    if saved is not None and saved.manifest.meta["world"] != world_of(config):
        raise FingerprintMismatch(
            f"The run was begun with {saved.manifest.meta['world']} workers, now there are {world_of(config)}.",
            where=saved.uri,
            mend=f"Set cluster.workers={saved.manifest.meta['world']}, or begin a new run.",
        )
    return found


def world_of(config: Train) -> int:
    return config.cluster.workers if config.cluster.kind == "ray" else int(os.environ.get("WORLD_SIZE", "1"))


def bytes_needed(config: Train) -> int:
    """Checkpoints (weights, two moments, EMA: 4 x 4 bytes a parameter, and half as much for bf16 weights) and the result."""
    with torch.device("meta"):
        net = (
            build.autoencoder(config.autoencoder)
            if config.stage.name == "autoencoder"
            else build.denoiser(config.denoiser)
        )
    kept = config.keep_checkpoints + 1 if config.checkpoint_every_samples else 0
    return build.parameter_count(net) * (18 * kept + 8) + (64 << 20)
