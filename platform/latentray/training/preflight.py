"""What can be known before a worker starts, and is refused there: inputs, disk, tracking, and a run that cannot go on so."""

from __future__ import annotations

import os

from latentray import build, tracking
from latentray.checkpoint import store
from latentray.config import compose
from latentray.config.train import Train
from latentray.data.ordering import Cursor
from latentray.errors import FingerprintMismatch
from latentray.training import checkpoint, engine, feed, inputs, room


def check(config: Train, out: str) -> dict[str, str]:
    """Check everything that can be known without a worker; the digests of the inputs."""
    tracking.check(config.tracking)
    if config.cluster.kind != "ray" and (config.compile or config.optimizer.name == "muon"):
        build.require_compiler()
    if config.cluster.kind != "ray":
        engine.require_nvme(config.deepspeed)
    for world in worlds_of(config):
        config.require_divisible(world)
    engine.require_accepted(config, world_of(config))
    store.require_writable(out)
    found = inputs.check(config, world_of(config))
    room.require(config, out)
    saved = checkpoint.require_sound(out)
    if saved:
        checkpoint.require_like(saved[0], compose.to_dict(config), found, config.resume.allow)
        _require_order(config, saved[0])
    return found


def _require_order(config: Train, saved: checkpoint.Saved) -> None:
    """Raise FingerprintMismatch where the data would be read in another order than a checkpoint's, as its workers would.

    What they read online is of an order with the encoders in it, which are not loaded here: by its settings alone.
    """
    if "data" in config.resume.allow:
        return
    for key in ("seed", "global_batch_size"):
        then, now = saved.manifest.config.get(key), getattr(config, key)
        if then is not None and then != now:
            raise FingerprintMismatch(
                f"The run was begun with {key}={then}, which orders its data; now it is {now}.",
                where=key,
                mend=f"Resume with {key}={then}, or begin a new run.",
            )
    if not config.online.enabled:
        feed.Feed.open(config).resumed(Cursor.from_dict(saved.cursor))


def world_of(config: Train) -> int:
    return config.cluster.workers if config.cluster.kind == "ray" else int(os.environ.get("WORLD_SIZE", "1"))


def worlds_of(config: Train) -> range:
    """Every number of workers that the run may have."""
    most = world_of(config)
    fewest = config.cluster.min_workers if config.cluster.kind == "ray" else None
    return range(fewest or most, most + 1)
