"""The one place where the data jobs meet a Ray cluster."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import ray

_OBJECT_STORE_BYTES = 512 << 20
"""Of a cluster started here: plans, index rows, and the few parts of decoded pictures that wait for an encoder."""


def connect(address: str | None) -> None:
    """Connect to the cluster at `address`, or start one on this machine; nothing to do where Ray runs already.

    A cluster given by address brings its own code (`jobs.submit` ships it); a local one is told where this checkout is.
    """
    if ray.is_initialized():
        return
    if address or os.environ.get("RAY_ADDRESS"):
        ray.init(address=address, logging_level=logging.WARNING, log_to_driver=True)
        return
    root = str(Path(__file__).resolve().parents[2])
    paths = [root, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    ray.init(
        include_dashboard=False,
        logging_level=logging.ERROR,
        object_store_memory=_OBJECT_STORE_BYTES,
        runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join(dict.fromkeys(paths))}},
    )
