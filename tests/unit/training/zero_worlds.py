"""Trains a tiny network at several world sizes and ZeRO stages, and moves its state between them: run as a program.

Every world is a set of forked processes under gloo; what they wrote is left in the folder that is given. The second argument
says what moves: `all`, or names like `2-1,3-2` (stage, world) that then move into every stage and world; or it is `special`,
for other optimizers and offloads, or `compiled`.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import multiprocessing
import os
import socket
import sys
import unittest.mock
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed  # noqa: F401  (imported once, before the processes fork)
import torch
import torch.distributed as dist
from torch import nn

from latentray.config.cluster import ClusterConfig
from latentray.config.deepspeed import DeepSpeedConfig
from latentray.config.optimizer import OptimizerConfig
from latentray.config.train import Train
from latentray.training import mapped, partitions
from latentray.training.ema import EMA
from latentray.training.engine import Engine

BATCH = 6
STEPS = 3
STAGES = (0, 1, 2, 3)
KINDS = tuple(
    (stage, precision) for stage in STAGES for precision in ("fp32", "bf16", "autocast") if stage or precision != "bf16"
)


NVME = {"offload_optimizer": "nvme", "nvme_path": os.environ.get("NVME", "")}
SPECIAL = {
    "adafactor-0": (OptimizerConfig(name="adafactor"), DeepSpeedConfig(zero_stage=0)),
    "muon-0": (OptimizerConfig(name="muon", clip=0.0), DeepSpeedConfig(zero_stage=0)),
    "muon-1": (OptimizerConfig(name="muon", clip=0.0), DeepSpeedConfig(zero_stage=1)),
    "muon-2": (OptimizerConfig(name="muon", clip=0.0), DeepSpeedConfig(zero_stage=2)),
    "offload-1": (OptimizerConfig(), DeepSpeedConfig(zero_stage=1, offload_optimizer="cpu")),
    "offload-2": (OptimizerConfig(), DeepSpeedConfig(zero_stage=2, offload_optimizer="cpu")),
    "offload-3": (OptimizerConfig(), DeepSpeedConfig(zero_stage=3, offload_optimizer="cpu")),
    "disk-1": (OptimizerConfig(), DeepSpeedConfig(zero_stage=1, **NVME)),
    "disk-2": (OptimizerConfig(), DeepSpeedConfig(zero_stage=2, **NVME)),
    "disk-3": (OptimizerConfig(), DeepSpeedConfig(zero_stage=3, **NVME)),
    "parameters-3": (OptimizerConfig(), DeepSpeedConfig(zero_stage=3, offload_parameters="cpu")),
}
"""Other optimizers, and offloads."""
SPECIAL_KINDS = [(name, micro) for name in SPECIAL for micro in (None, 1) if micro is None or name.startswith("muon")]
FROM = {
    "muon-0": "muon-2", "muon-1": "muon-0", "muon-2": "muon-1", "offload-2": "offload-3", "offload-3": "offload-1",
    "disk-1": "disk-2", "disk-2": "offload-1", "disk-3": "disk-1",
}  # fmt: skip
"""Where a moved state comes from, if not from its like."""


def network() -> nn.Module:
    """Odd sizes, so that every cut leaves a remainder somewhere; the second layer and the third are hidden matrices."""
    torch.manual_seed(0)
    hidden = nn.Sequential(nn.Linear(13, 11), nn.SiLU(), nn.Linear(11, 5, bias=False), nn.SiLU())
    return nn.Sequential(nn.Linear(7, 13), nn.SiLU(), hidden, nn.Linear(5, 1))


def special(name: str, micro: int | None = None) -> Train:
    optimizer, zero = SPECIAL[name]
    return dataclasses.replace(config(1, "fp32", micro), optimizer=optimizer, deepspeed=zero)


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
    return build_from(config(stage, precision, micro), world)


def build_from(settings: Train, world: int) -> tuple[Engine, EMA]:
    module = network()
    with unittest.mock.patch.object(torch, "empty", _used):
        engine = Engine(module, settings, world=world, device=torch.device("cpu"), lr=1e-2)
    assert all(flat.isfinite().all() for flat in engine.master_partitions()), "what no parameter covers is no number"
    engine.set_lr(engine.config.optimizer.lr)
    return engine, EMA(engine, half_life_samples=12)


_empty = torch.empty


def _used(*args: Any, **kwargs: Any) -> torch.Tensor:
    """torch.empty, where little is asked for in memory that was used before: it holds what is no number."""
    made = _empty(*args, **kwargs)
    return made.fill_(torch.nan) if made.is_floating_point() and made.numel() < 10_000 else made


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
    cases = [*itertools.product(STAGES, (None, 1), ("fp32",)), *((stage, None, "bf16") for stage in STAGES[1:])]
    for stage, micro, precision in cases:
        for name, bad in (("without", False), ("with", True)):
            engine, ema = build(stage, world, precision, micro)
            _compare_norms(engine)
            train(engine, ema, range(2), rank, world)
            if bad:
                train(engine, ema, range(2, 3), rank, world, factor=float("nan") if rank == 0 else 1.0)
                assert not engine.applied, f"stage {stage}: the step was taken"
            train(engine, ema, range(3, 5), rank, world)
            assert engine.applied
            save(engine, ema, out / f"discarded-{stage}-{micro}-{precision}-{name}", rank)
            engine.close()


def _compare_norms(engine: Engine) -> None:
    """Have every norm of the gradients asserted to be what DeepSpeed's own takes in fp64, in several passes."""
    zero = engine._zero
    if not hasattr(zero, "get_grad_norm_direct"):
        return
    ours, theirs = zero.get_grad_norm_direct, type(zero).get_grad_norm_direct

    def both(gradients: list, params: list, norm_type: float = 2) -> torch.Tensor:
        expected, found = theirs(zero, gradients, params), ours(gradients, params)
        assert float(found) == float(expected) or abs(float(found / expected) - 1) < 1e-6, (found, expected)
        assert (float(found) == -1) == bool(type(zero).has_overflow(zero))
        return found

    assert zero.has_overflow() is False
    zero.get_grad_norm_direct = both


def special_first(rank: int, world: int, out: Path) -> None:
    """`first` with every other optimizer and offload; with Muon also in accumulation."""
    for name, micro in SPECIAL_KINDS if world > 1 else ():
        engine, ema = build_from(special(name, micro), world)
        train(engine, ema, range(STEPS), rank, world)
        save(engine, ema, out / f"{name}-{micro}-{world}", rank)
        _go_on(engine, ema, out / f"{name}-{micro}-{world}-end", rank, world)


def special_resumed(rank: int, world: int, out: Path) -> None:
    """`resumed` likewise; and what the world of two wrote, at another stage where there is one, goes on in this one."""
    for name, micro in SPECIAL_KINDS if world > 1 else ():
        engine, ema = _restored(name, micro, world, out / f"{name}-{micro}-{world}")
        _go_on(engine, ema, out / f"{name}-{micro}-{world}-resumed", rank, world)
    for name in SPECIAL if world != 2 else ():
        origin = out / f"{FROM.get(name, name)}-None-2"
        engine, ema = _restored(name, None, world, origin)
        save(engine, ema, out / "moved" / f"{origin.name}-to-{name}-{world}", rank)
        _go_on(engine, ema, out / "moved" / f"{origin.name}-to-{name}-{world}-end", rank, world)


def _restored(name: str, micro: int | None, world: int, origin: Path) -> tuple[Engine, EMA]:
    engine, ema = build_from(special(name, micro), world)
    engine.restore(read(origin))
    ema.restore(read(origin))
    return engine, ema


def _go_on(engine: Engine, ema: EMA, folder: Path, rank: int, world: int) -> None:
    losses = train(engine, ema, range(STEPS, 2 * STEPS), rank, world)
    save(engine, ema, folder, rank)
    if not rank:
        (folder / "losses.json").write_text(json.dumps(losses))
    engine.close()


def compiled(rank: int, world: int, out: Path) -> None:
    """The same steps with and without compilation, at every stage."""
    for stage, precision in [(0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (2, "autocast")] if world == 2 else ():
        losses = {}
        for compile in (False, True):
            engine, ema = build_from(dataclasses.replace(config(stage, precision), compile=compile), world)
            losses[str(compile)] = train(engine, ema, range(2 * STEPS), rank, world)
            engine.close()
        if not rank:
            (out / f"compiled-{stage}-{precision}-{world}.json").write_text(json.dumps(losses))


def _one(rank: int, world: int, port: int, out: Path) -> None:
    os.environ |= {
        "RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    torch.set_num_threads(1)
    mapped.LEAST_BYTES = 0
    dist.init_process_group("gloo")
    _phases()[os.environ["PHASE"]](rank, world, out)
    dist.destroy_process_group()
    os._exit(0)  # DeepSpeed's handlers at exit are of the parent


PROGRAMS = {
    "special": {"first": special_first, "resumed": special_resumed},
    "compiled": {"compiled": compiled},
}
PHASES = {"first": first, "resumed": resumed, "discarded": discarded, "moved": moved}


def _phases() -> dict[str, Callable[[int, int, Path], None]]:
    return PROGRAMS.get(os.environ["MOVES"], PHASES)


def main(out: Path) -> int:
    context = multiprocessing.get_context("fork")
    for phase in _phases():
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
