"""Five steps at ZeRO-3 with parameters in memory, on the CPU, on a disk, and there with the optimizer: run by torchrun.

    disk_offload.py <precision> <folder>

Each rank leaves `rank<N>.json`: losses and a digest of the average by offload, and whether the disk was written.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from latentray import build
from latentray.config.cluster import ClusterConfig
from latentray.config.deepspeed import DeepSpeedConfig
from latentray.config.denoiser import DenoiserConfig
from latentray.config.train import Train
from latentray.training.ema import EMA
from latentray.training.engine import Engine

NETWORK = DenoiserConfig(
    channels=[32, 64], blocks=1, depth=[0, 1], heads=None, head_dim=16, context_width=16, groups=8,
    linear_projection=True,
)  # fmt: skip
BATCH, STEPS = 4, 5


def trained(precision: str, offload: str, folder: Path) -> dict[str, object]:
    world, rank = dist.get_world_size(), dist.get_rank()
    path = str(folder / "nvme") if offload in ("nvme", "both") else None
    config = Train(
        global_batch_size=BATCH * world, total_samples=10**6, precision=precision, cluster=ClusterConfig(kind="none"),
        deepspeed=DeepSpeedConfig(
            zero_stage=3, offload_parameters="nvme" if offload == "both" else offload,
            offload_optimizer="nvme" if offload == "both" else "none", nvme_path=path,
        ),
    )  # fmt: skip
    net = build.seeded(lambda: build.denoiser(NETWORK), 0)
    engine = Engine(net, config, world=world, device=torch.device("cpu"))
    ema, made, losses = EMA(engine, half_life_samples=100), torch.Generator().manual_seed(rank), []
    for _ in range(STEPS):
        x, context = torch.randn(BATCH, 4, 16, 16, generator=made), torch.randn(BATCH, 5, 16, generator=made)
        y = engine(x.to(engine.dtype), torch.linspace(0, 999, BATCH), context.to(engine.dtype))
        loss = y.float().square().mean()
        engine.backward(loss)
        engine.step()
        ema.update(BATCH * world)
        losses.append(float(loss.detach()))
    digest = hashlib.sha256()
    for name, value in sorted(ema.full_state().items()):
        digest.update(name.encode() + value.contiguous().numpy().tobytes())
    return {"losses": losses, "average": digest.hexdigest()}


def main(precision: str, folder: Path) -> None:
    os.environ["DS_ACCELERATOR"] = "cpu"
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found: dict[str, object] = {one: trained(precision, one, folder) for one in ("none", "cpu", "nvme", "both")}
    found["on_disk"] = sum(1 for path in (folder / "nvme").rglob("*"))
    (folder / f"rank{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.destroy_process_group()
    os._exit(0)  # DeepSpeed's handlers at exit find its files gone


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
