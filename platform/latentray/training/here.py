"""Training in this very process: alone, or as one of torchrun's. No Ray is imported."""

from __future__ import annotations

import datetime
import os

import torch.distributed as dist

from latentray.config.train import Train
from latentray.training import stopping
from latentray.training.loop import Hooks
from latentray.training.worker import device_of, work


def train(config: Train, run: str, out: str) -> bool:
    """Train to the end; False where it was asked to stop, by SIGTERM or by `stopping.request`."""
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    device = device_of(config.cluster.device, int(os.environ.get("LOCAL_RANK", "0")))
    if world == 1:
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
        os.environ.setdefault("MASTER_PORT", str(20_000 + os.getpid() % 20_000))
    if rank == 0:
        stopping.clear(out)
    timeout = datetime.timedelta(seconds=config.cluster.collective_timeout_s)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timeout)
    try:
        return work(config, run, out, rank=rank, world=world, device=device, hooks=Hooks())
    finally:
        dist.destroy_process_group()
