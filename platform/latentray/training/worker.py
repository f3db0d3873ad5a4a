"""What every worker of a run does, wherever it was started: under Ray Train, under torchrun, or alone."""

from __future__ import annotations

import secrets

import torch
import torch.distributed as dist

from latentray import allocator, build
from latentray.config.train import Train
from latentray.errors import ConfigError
from latentray.training import loop, room
from latentray.training.state import Worker


def work(config: Train, run: str, out: str, *, rank: int, world: int, device: torch.device, hooks: loop.Hooks) -> bool:
    """Train to the end, or until asked to stop (False). Collective; the process group is there."""
    if device.type == "cpu":
        allocator.keep_freed_memory()
        torch.set_num_threads(config.cluster.threads or max(int(config.cluster.cpus_per_worker), 1))
    worker = Worker(
        config=config, run=run, out=out, rank=rank, world=world, device=device, attempt=_shared_attempt(rank)
    )
    room.require_on_workers(worker)
    return loop.run(worker, hooks)


def _shared_attempt(rank: int) -> str:
    """One random name for all ranks of this attempt. Collective."""
    box = [secrets.token_hex(3) if rank == 0 else ""]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def device_of(name: str, local_rank: int) -> torch.device:
    """The device of a worker: its own GPU, or the CPU. Raises ConfigError where this machine has no GPU for it."""
    device = build.device(name, where="cluster.device")
    if device.type == "cuda":
        there = torch.cuda.device_count()
        if local_rank >= there:
            raise ConfigError(
                f"Worker {local_rank + 1} of this machine has no GPU of its own: there are {there}.",
                where="cluster.device",
                mend=f"Start at most {there} workers here (torchrun --nproc-per-node), or use cluster.device=cpu.",
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    return device
