"""Anonymous memory of a process that trains with its optimizer's state in memory or on a disk, and then saves: a program.

mapped_memory.py <cpu|nvme> <folder>
"""

from __future__ import annotations

import json
import os
import socket
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from latentray.config.cluster import ClusterConfig
from latentray.config.deepspeed import DeepSpeedConfig
from latentray.config.train import Train
from latentray.training.ema import EMA
from latentray.training.engine import Engine

WIDTH, LAYERS, BATCH = 2048, 4, 4


def anonymous_bytes() -> int:
    line = next(one for one in Path("/proc/self/status").read_text().splitlines() if one.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def main(where: str, folder: str) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ |= {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    network = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)))
    settings = Train(
        global_batch_size=BATCH, total_samples=100, precision="bf16", cluster=ClusterConfig(kind="none"),
        deepspeed=DeepSpeedConfig(zero_stage=2, offload_optimizer=where, nvme_path=folder if where == "nvme" else None),
    )  # fmt: skip
    engine = Engine(network, settings, world=1, device=torch.device("cpu"))
    ema, losses = EMA(engine, half_life_samples=10), []
    for _ in range(3):
        loss = engine(torch.randn(BATCH, WIDTH, dtype=torch.bfloat16)).float().square().mean()
        engine.backward(loss)
        engine.step()
        ema.update(BATCH)
        losses.append(float(loss.detach()))
    trained = anonymous_bytes()
    snapshot = ema.snapshot()
    saved = anonymous_bytes()
    parameters = sum(int(torch.Size(shape).numel()) for shape in engine.shapes.values())
    assert len(snapshot.tensors) == 4 * LAYERS
    print(json.dumps({"trained": trained, "saved": saved, "parameters": parameters, "loss": losses}), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
