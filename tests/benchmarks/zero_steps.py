"""What `test_zero.py` measures, in two processes under gloo: steps of DDP, ZeRO-2 and ZeRO-3, in turns in the same processes.

    zero_steps.py <rounds> <seconds a step of DDP should take at least>

Each takes the same network, batch and optimizer (AdamW, fp32, clipped). Prints one line of JSON: seconds per step, by name.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable

import deepspeed  # noqa: F401  (imported once, before the processes fork)
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from latentray import build
from latentray.config.cluster import ClusterConfig
from latentray.config.deepspeed import DeepSpeedConfig
from latentray.config.denoiser import DenoiserConfig
from latentray.config.train import Train
from latentray.training.engine import Engine

WORLD = 2
NETWORK = DenoiserConfig(
    channels=[112, 112], blocks=1, depth=[0, 1], heads=None, head_dim=56, context_width=64, groups=16,
    linear_projection=True,
)  # fmt: skip


def network() -> nn.Module:
    return build.seeded(lambda: build.denoiser(NETWORK), 0)


def batch_of(samples: int) -> tuple[torch.Tensor, ...]:
    made = torch.Generator().manual_seed(dist.get_rank())
    x, context = torch.randn(samples, 4, 32, 32, generator=made), torch.randn(samples, 16, 64, generator=made)
    return x, torch.linspace(0, 999, samples), context


def by_ddp(batch: tuple[torch.Tensor, ...]) -> Callable[[], None]:
    net = network()
    model = DistributedDataParallel(net)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        model(*batch).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def by_zero(stage: int, batch: tuple[torch.Tensor, ...]) -> Callable[[], None]:
    config = Train(
        global_batch_size=WORLD * len(batch[0]), total_samples=10**6, precision="fp32",
        deepspeed=DeepSpeedConfig(zero_stage=stage), cluster=ClusterConfig(kind="none"),
    )  # fmt: skip
    engine = Engine(network(), config, world=WORLD, device=torch.device("cpu"))

    def step() -> None:
        engine.backward(engine(*batch).square().mean())
        engine.step()

    return step


def seconds(step: Callable[[], None]) -> float:
    dist.barrier()
    begin = time.perf_counter()
    step()
    dist.barrier()
    return time.perf_counter() - begin


def samples_for(least: float) -> int:
    """The batch with which a step of DDP takes `least` seconds: a step of twice the batch takes less than twice the time."""
    samples = 1
    while True:
        probe = by_ddp(batch_of(samples))
        probe()
        took = torch.tensor(min(seconds(probe) for _ in range(3)))
        dist.all_reduce(took, dist.ReduceOp.MAX)
        if took >= least:
            return samples
        samples += max(1, int(samples * (least / float(took) - 1)))


def measure(rounds: int, least: float) -> dict[str, list[float]]:
    """The batch is made as large as the shortest step asks for; then the three take turns, each round in another order."""
    batch = batch_of(samples := samples_for(1.3 * least))
    steps = {"ddp": by_ddp(batch), "zero2": by_zero(2, batch), "zero3": by_zero(3, batch)}
    for step in steps.values():
        step()
        step()
    found: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for number in range(rounds):
        for name in names[number % 3 :] + names[: number % 3]:
            found[name].append(seconds(steps[name]))
    return found | {"samples": [samples]}


def _one(rank: int, port: int, rounds: int, least: float) -> None:
    os.environ |= {
        "RANK": str(rank), "WORLD_SIZE": str(WORLD), "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = measure(rounds, least)
    if not rank:
        print(json.dumps(found), flush=True)
    dist.destroy_process_group()
    os._exit(0)  # DeepSpeed's handlers at exit are of the parent


def main(rounds: int, least: float) -> int:
    context = multiprocessing.get_context("fork")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = [context.Process(target=_one, args=(rank, port, rounds, least)) for rank in range(WORLD)]
    for one in ranks:
        one.start()
    for one in ranks:
        one.join()
    return int(any(one.exitcode for one in ranks))


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), float(sys.argv[2])))
