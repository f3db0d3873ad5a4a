"""Trains a tiny VQ autoencoder at several world sizes and ZeRO stages, and goes on from what was saved: run as a program.

Every world is a set of forked processes under gloo, and every phase has processes of its own, as after a fault; what they
wrote is left in the folder that is given.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import deepspeed  # noqa: F401  (imported once, before the processes fork)
import torch
import torch.distributed as dist

from latentray import build
from latentray.checkpoint import weights
from latentray.config.autoencoder import AutoencoderConfig
from latentray.config.cluster import ClusterConfig
from latentray.config.deepspeed import DeepSpeedConfig
from latentray.config.train import CodebookConfig, StageConfig, Train
from latentray.records import SampleId
from latentray.training import partitions
from latentray.training.codebook import CodebookEngine
from latentray.training.ema import EMA

NET = AutoencoderConfig(
    kind="vq", codebook_size=24, latent_channels=3, channels=[8, 8], blocks=1, groups=4, attention=False
)
BATCH, STEPS, SIZE = 4, 4, 8
KINDS = ((0, "fp32"), (1, "bf16"), (2, "fp32"), (3, "fp32"), (3, "bf16"))
WORLDS = (1, 2)


def settings(stage: int, precision: str, micro: int | None = None) -> Train:
    return Train(
        stage=StageConfig(name="autoencoder", codebook=CodebookConfig(restart_below=0.3)),
        autoencoder=NET,
        global_batch_size=BATCH,
        total_samples=600,
        micro_batch_size=micro,
        precision=precision,
        size=SIZE,
        ema_half_life_samples=12,
        deepspeed=DeepSpeedConfig(zero_stage=stage),
        cluster=ClusterConfig(kind="none"),
    )


def make(config: Train, world: int) -> tuple[CodebookEngine, EMA]:
    net = build.seeded(lambda: build.autoencoder(NET), 0)
    engine = CodebookEngine(net, config, world=world, device=torch.device("cpu"), lr=1e-2)
    engine.set_lr(config.optimizer.lr)
    return engine, EMA(engine, half_life_samples=config.ema_half_life_samples)


def micro_batches(config: Train, step: int, rank: int, world: int) -> Iterator[tuple[torch.Tensor, list[SampleId]]]:
    """This rank's slice of a global batch, which depends on the step alone."""
    x = torch.rand(BATCH, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(step)) * 2 - 1
    ids = [SampleId(epoch=0, dataset=0, index=BATCH * step + i) for i in range(BATCH)]
    micro, _ = config.micro_and_accumulation(world)
    share = BATCH // world
    for i in range(rank * share, (rank + 1) * share, micro):
        yield x[i : i + micro], ids[i : i + micro]


def train(engine: CodebookEngine, ema: EMA, steps: range, rank: int, world: int, factor: float = 1.0) -> None:
    for step in steps:
        for x, ids in micro_batches(engine.config, step, rank, world):
            rec, latent, codes, _ = engine(x.to(engine.dtype))
            vectors = engine.codebook.quantizer.lookup(codes)
            loss = (rec.float() - x).abs().mean() + 0.25 * (latent.float() - vectors).square().mean()
            engine.codebook.observe(latent, codes, ids, torch.ones(len(x)))
            engine.backward(loss * factor)
            engine.step()
        if engine.applied:
            ema.update(BATCH)


def save(engine: CodebookEngine, ema: EMA, folder: Path, rank: int) -> None:
    partitions.write(folder / f"rank_{rank:05d}.safetensors", ema.snapshot())
    held = engine.codebook.tensors()
    weights.save(folder / f"seen_by_{rank}", held)
    dist.barrier()


def read(folder: Path) -> partitions.Pieces:
    return partitions.Pieces(sorted(folder.glob("*.safetensors")))


def first(rank: int, world: int, out: Path) -> None:
    """Some steps, saved, and trained on undisturbed."""
    for stage, precision in KINDS:
        engine, ema = make(settings(stage, precision), world)
        train(engine, ema, range(STEPS), rank, world)
        save(engine, ema, out / f"{stage}-{precision}-{world}", rank)
        train(engine, ema, range(STEPS, 2 * STEPS), rank, world)
        save(engine, ema, out / f"{stage}-{precision}-{world}-end", rank)
        engine.close()


def resumed(rank: int, world: int, out: Path) -> None:
    """The same from what was saved: by the same world, and by the other one at another stage."""
    for stage, precision in KINDS:
        engine, ema = make(settings(stage, precision), world)
        pieces = read(out / f"{stage}-{precision}-{world}")
        engine.restore(pieces)
        ema.restore(pieces)
        train(engine, ema, range(STEPS, 2 * STEPS), rank, world)
        save(engine, ema, out / f"{stage}-{precision}-{world}-resumed", rank)
        engine.close()
    engine, ema = make(settings(2, "fp32"), world)
    pieces = read(out / f"3-fp32-{3 - world}")
    engine.restore(pieces)
    ema.restore(pieces)
    save(engine, ema, out / f"moved-{world}", rank)
    engine.close()


def accumulated(rank: int, world: int, out: Path) -> None:
    """In micro-batches of one; and with a step between whose loss is no number."""
    for name, bad in (("accumulated", False), ("dropped", True)):
        engine, ema = make(dataclasses.replace(settings(2, "fp32"), micro_batch_size=1), world)
        train(engine, ema, range(2), rank, world)
        if bad:
            train(engine, ema, range(7, 8), rank, world, factor=float("nan"))
            assert not engine.applied
        train(engine, ema, range(2, STEPS), rank, world)
        save(engine, ema, out / f"{name}-{world}", rank)
        engine.close()


PHASES = {"first": first, "resumed": resumed, "accumulated": accumulated}


def _one(phase: str, rank: int, world: int, port: int, out: Path) -> None:
    os.environ |= {
        "RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    PHASES[phase](rank, world, out)
    dist.destroy_process_group()
    os._exit(0)  # DeepSpeed's handlers at exit are of the parent


def main(out: Path) -> int:
    context = multiprocessing.get_context("fork")
    for phase in PHASES:
        for world in WORLDS:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = probe.getsockname()[1]
            ranks = [context.Process(target=_one, args=(phase, rank, world, port, out)) for rank in range(world)]
            for one in ranks:
                one.start()
            for one in ranks:
                one.join()
            if any(one.exitcode for one in ranks):
                return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
