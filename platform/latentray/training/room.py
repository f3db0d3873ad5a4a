"""Where a run's files have room, and whether all its ranks see them: looked at before the first step, not at the first save."""

from __future__ import annotations

import os
import socket
import tempfile

import torch
import torch.distributed as dist

from latentray import build
from latentray.checkpoint import store
from latentray.config.train import Train
from latentray.errors import EnvironmentRefused
from latentray.models.discriminator import PatchDiscriminator
from latentray.training.state import Worker

_TMPDIR = "Free some space, or set TMPDIR to a folder with room on every node."


def checkpoint_bytes(config: Train) -> int:
    """Of one checkpoint, all ranks together: in fp32 weights, two moments and the average; a discriminator has no average."""
    bytes_, discriminator = 16 * build.parameter_count(_network(config)), config.stage.discriminator
    if config.stage.name == "autoencoder" and discriminator.weight > 0:
        with torch.device("meta"):
            critic = PatchDiscriminator(channels=discriminator.channels, layers=discriminator.layers)
        bytes_ += 12 * build.parameter_count(critic)
    return bytes_


def bytes_needed(config: Train) -> int:
    """What a run's folder takes: checkpoints that are kept, one that is being written and one that is staged; the result."""
    kept = config.keep_checkpoints + 2 if config.checkpoint_every_samples else 0
    return kept * checkpoint_bytes(config) + 8 * build.parameter_count(_network(config)) + (64 << 20)


def require(config: Train, out: str) -> None:
    """Raise EnvironmentRefused where the run's folder has no room, or, where the workers are on this machine, its staging."""
    store.require_space(out, bytes_needed(config))
    is_here = config.cluster.kind == "none" or not (config.cluster.address or os.environ.get("RAY_ADDRESS"))
    if is_here and config.checkpoint_every_samples:
        store.require_space(tempfile.gettempdir(), checkpoint_bytes(config), mend=_TMPDIR)


def require_on_workers(worker: Worker) -> None:
    """Raise EnvironmentRefused, on all ranks alike, where one has no room to stage its part of a checkpoint, or does not see the
    run's folder. Collective."""
    config, probe = worker.config, store.join(worker.out, f".seen-{worker.attempt}")
    is_shared = worker.world > 1 and not store.is_remote(worker.out)
    if is_shared and worker.leads:
        store.write_bytes(probe, b"")
    dist.barrier()
    problem: tuple[str, str, str] | None = None
    if is_shared and not store.exists(probe):
        problem = (
            f"Rank {worker.rank}, on {socket.gethostname()}, does not see the run's folder of rank 0: it is on one node's disk.",
            worker.out,
            "Give out=<s3 URI>, or a path of a volume that all nodes mount at the same place.",
        )
    elif config.checkpoint_every_samples:
        problem = _without_room(worker)
    problems: list[tuple[str, str, str] | None] = [None] * worker.world
    dist.all_gather_object(problems, problem)
    if is_shared and worker.leads:
        store.delete(probe)
    first = next(filter(None, problems), None)
    if first is not None:
        what, where, mend = first
        raise EnvironmentRefused(what, where=where, mend=mend)


def _without_room(worker: Worker) -> tuple[str, str, str] | None:
    """What is wrong with this node's room for the parts of all its ranks."""
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    part = checkpoint_bytes(worker.config) * ranks_here // worker.world
    try:
        store.require_space(tempfile.gettempdir(), part, mend=_TMPDIR)
    except EnvironmentRefused as error:
        return f"{socket.gethostname()}: {error.what}", error.where, error.mend
    return None


def _network(config: Train) -> torch.nn.Module:
    with torch.device("meta"):
        if config.stage.name == "autoencoder":
            return build.autoencoder(config.autoencoder)
        return build.denoiser(config.denoiser)
