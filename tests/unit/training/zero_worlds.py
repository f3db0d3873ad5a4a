"""Trains a tiny network at several world sizes and ZeRO stages, and moves its state between them: run as a program.

Every world is a set of forked processes under gloo; what they wrote is left in the folder that is given. The second argument
says what moves: `all`, or names like `2-1,3-2` (stage, world) that then move into every stage and world.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import socket
import sys
from pathlib import Path

import deepspeed  # noqa: F401  (imported once, before the processes fork)
import torch
import torch.distributed as dist
from torch import nn

from latentray.config.cluster import ClusterConfig
from latentray.config.train import DeepSpeedConfig, Train
from latentray.training import partitions
from latentray.training.ema import EMA
from latentray.training.engine import Engine

BATCH = 6
STEPS = 3
STAGES = (0, 1, 2, 3)
KINDS = tuple(
    (stage, precision) for stage in STAGES for precision in ("fp32", "bf16", "autocast") if stage or precision != "bf16"
)


def network() -> nn.Module:
    """Odd sizes, so that every cut leaves a remainder somewhere."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 13), nn.SiLU(), nn.Linear(13, 5, bias=False), nn.SiLU(), nn.Linear(5, 1))


def config(stage: int, precision: str, micro: int | None = None) -> Train:
    return Train(
        global_batch_size=BATCH,
        total_samples=600,
        micro_batch_size=micro,
        precision=precision,
        deepspeed=DeepSpeedConfig(zero_stage=stage),
        cluster=ClusterConfig(kind="none"),
    )


def build(stage: int, world: int, precision: str = "fp32", micro: int | None = None) -> tuple[Engine, EMA]:
    engine = Engine(network(), config(stage, precision, micro), world=world, device=torch.device("cpu"), lr=1e-2)
    engine.set_lr(engine.config.optimizer.lr)
    return engine, EMA(engine, half_life_samples=12)


def batch_of(step: int, rank: int, world: int) -> torch.Tensor:
    whole = torch.randn(BATCH, 7, generator=torch.Generator().manual_seed(step))
    return whole.chunk(world)[rank]


def train(engine: Engine, ema: EMA, steps: range, rank: int, world: int, factor: float = 1.0) -> list[float]:
    losses = []
    accumulation = engine.config.micro_and_accumulation(world)[1]
    for step in steps:
        total = torch.zeros(())
        for part in batch_of(step, rank, world).chunk(accumulation):
            loss = (engine(part.to(engine.dtype)).float() - part.sum(1, keepdim=True)).square().mean()
            engine.backward(loss * factor)
            engine.step()
            total += loss.detach() / accumulation
        if engine.applied:
            ema.update(BATCH)
        dist.all_reduce(total)
        losses.append(float(total / world))
    return losses


def save(engine: Engine, ema: EMA, folder: Path, rank: int) -> None:
    partitions.write(folder / f"rank_{rank:05d}.safetensors", ema.snapshot())
    dist.barrier()


def read(folder: Path) -> partitions.Pieces:
    return partitions.Pieces(sorted(folder.glob("*.safetensors")))


def first(rank: int, world: int, out: Path) -> None:
    """Every stage trains some steps from the same start, is saved, and trains on undisturbed."""
    for stage, precision in KINDS:
        engine, ema = build(stage, world, precision)
        train(engine, ema, range(STEPS), rank, world)
        save(engine, ema, out / f"{precision}-{stage}-{world}", rank)
        losses = train(engine, ema, range(STEPS, 2 * STEPS), rank, world)
        save(engine, ema, out / f"{precision}-{stage}-{world}-end", rank)
        if not rank:
            (out / f"{precision}-{stage}-{world}-end" / "losses.json").write_text(json.dumps(losses))
        engine.close()


def moved(rank: int, world: int, out: Path) -> None:
    """Every saved state is taken over by every stage in this world, saved again, and trains on."""
    wanted = os.environ["MOVES"]
    for origin in sorted(p for p in out.glob("fp32-?-?") if wanted == "all" or p.name[5:] in wanted.split(",")):
        for stage in STAGES:
            engine, ema = build(stage, world)
            engine.restore(read(origin))
            ema.restore(read(origin))
            there = out / "moved" / f"{origin.name}-to-{stage}-{world}"
            save(engine, ema, there, rank)
            losses = train(engine, ema, range(STEPS, 2 * STEPS), rank, world)
            if not rank:
                (there / "losses.json").write_text(json.dumps(losses))
            engine.close()


def resumed(rank: int, world: int, out: Path) -> None:
    """At the same size and stage, in every precision; in fresh processes, as after a fault (with three ranks, the order in which
    gloo adds for ZeRO-2 depends on what a process reduced before).
    """
    for stage, precision in KINDS:
        origin = out / f"{precision}-{stage}-{world}"
        engine, ema = build(stage, world, precision)
        engine.restore(read(origin))
        ema.restore(read(origin))
        train(engine, ema, range(STEPS, 2 * STEPS), rank, world)
        save(engine, ema, out / f"{origin.name}-resumed", rank)
        engine.close()


def discarded(rank: int, world: int, out: Path) -> None:
    """A step whose loss is no number on one rank, within accumulation, between two good ones."""
    for stage, micro in itertools.product(STAGES, (None, 1)):
        for name, bad in (("without", False), ("with", True)):
            engine, ema = build(stage, world, micro=micro)
            train(engine, ema, range(2), rank, world)
            if bad:
                train(engine, ema, range(2, 3), rank, world, factor=float("nan") if rank == 0 else 1.0)
                assert not engine.applied, f"stage {stage}: the step was taken"
            train(engine, ema, range(3, 5), rank, world)
            assert engine.applied
            save(engine, ema, out / f"discarded-{stage}-{micro}-{name}", rank)
            engine.close()


def _one(rank: int, world: int, port: int, out: Path) -> None:
    os.environ |= {
        "RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    PHASES[os.environ["PHASE"]](rank, world, out)
    dist.destroy_process_group()
    os._exit(0)  # DeepSpeed's handlers at exit are of the parent


PHASES = {"first": first, "resumed": resumed, "discarded": discarded, "moved": moved}


def main(out: Path) -> int:
    context = multiprocessing.get_context("fork")
    for phase in PHASES:
        os.environ["PHASE"] = phase
        for world in (1, 2, 3):
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = probe.getsockname()[1]
            ranks = [context.Process(target=_one, args=(rank, world, port, out)) for rank in range(world)]
            for one in ranks:
                one.start()
            for one in ranks:
                one.join()
            if any(one.exitcode for one in ranks):
                return 1
    return 0


if __name__ == "__main__":
    os.environ["MOVES"] = sys.argv[2]
    sys.exit(main(Path(sys.argv[1])))
