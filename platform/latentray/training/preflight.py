"""What can be known before a worker starts, and is refused there: inputs, disk, tracking, and a run that cannot go on so."""

from __future__ import annotations

import os

import torch

from latentray import build, tracking
from latentray.checkpoint import store
from latentray.config import compose
from latentray.config.train import Train
from latentray.training import checkpoint, engine, inputs, optimizers


def check(config: Train, out: str) -> dict[str, str]:
    """Check everything that can be known without a worker; the digests of the inputs."""
    tracking.check(config.tracking)
    if config.cluster.kind != "ray" and (config.compile or config.optimizer.name == "muon"):
        optimizers.require_compiler()
    if config.cluster.kind != "ray" and config.deepspeed.offload_parameters == "nvme":
        engine.require_nvme(config.deepspeed.nvme_path or "")
    for world in worlds_of(config):
        config.require_divisible(world)
    found = inputs.check(config, world_of(config))
    store.require_space(out, bytes_needed(config))
    saved = checkpoint.candidates(out)
    if saved:
        checkpoint.require_like(saved[0], compose.to_dict(config), found, config.resume.allow)
    return found


def world_of(config: Train) -> int:
    return config.cluster.workers if config.cluster.kind == "ray" else int(os.environ.get("WORLD_SIZE", "1"))


def worlds_of(config: Train) -> range:
    """Every number of workers that the run may have."""
    most = world_of(config)
    fewest = config.cluster.min_workers if config.cluster.kind == "ray" else None
    return range(fewest or most, most + 1)


def bytes_needed(config: Train) -> int:
    """Checkpoints (weights, two moments and EMA: 4 x 4 bytes a parameter; the one that is staged too) and the result."""
    with torch.device("meta"):
        net = (
            build.autoencoder(config.autoencoder)
            if config.stage.name == "autoencoder"
            else build.denoiser(config.denoiser)
        )
    kept = config.keep_checkpoints + 2 if config.checkpoint_every_samples else 0
    return build.parameter_count(net) * (16 * kept + 8) + (64 << 20)
