"""The loop of one worker. It knows no Ray: what to do at a checkpoint it is told by a callback."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch.distributed as dist
from torch import Tensor

from latentray.checkpoint import store
from latentray.config import compose
from latentray.data.ordering import Order
from latentray.data.shards import IndexedShards
from latentray.errors import TrainingFailed
from latentray.reporting.progress import Progress
from latentray.tracking import names
from latentray.training import checkpoint, export
from latentray.training.ema import EMA
from latentray.training.engine import Engine
from latentray.training.stage1 import AutoencoderStage
from latentray.training.stage2 import DiffusionStage
from latentray.training.state import Worker
from latentray.training.telemetry import Telemetry

STAGES: dict[str, Callable[[Worker], Stage]] = {"autoencoder": AutoencoderStage, "diffusion": DiffusionStage}


class Stage(Protocol):
    """What differs between the stages."""

    engines: dict[str, Engine]
    engine: Engine
    shards: IndexedShards
    order: Order
    inputs: dict[str, str]

    @property
    def facts(self) -> dict[str, object]: ...

    def batches(self, first_step: int, last_step: int) -> Iterator[Any]: ...

    def micro_batches(self, batch: Any, size: int) -> Iterator[Any]: ...

    def step(self, batch: Any, samples: int) -> dict[str, Tensor]: ...

    def finish(self, ema: EMA) -> export.Exported | None: ...


def run(worker: Worker, *, on_checkpoint: Callable[[str, int], None] = lambda uri, step: None) -> None:
    """Train from the newest valid checkpoint, or from the start, to the end, and export the result.

    Args:
        on_checkpoint: called on every rank with the URI and step of each committed checkpoint.

    Raises TrainingFailed where the loss stops being a number; FingerprintMismatch where the checkpoints belong to other
    settings.
    """
    config = worker.config
    stage = STAGES[config.stage.name](worker)
    ema = EMA(stage.engine, half_life_samples=config.ema_half_life_samples, global_batch_size=config.global_batch_size)
    fingerprint = _fingerprint(worker)
    first = _resume(worker, stage, ema, fingerprint)
    micro, _ = config.micro_and_accumulation(worker.world)
    telemetry = Telemetry(worker, facts=stage.facts, resumed_at=first * config.global_batch_size)
    batch_size, total = config.global_batch_size, config.steps * config.global_batch_size
    progress = Progress(total, config.stage.name, start_samples=first * batch_size) if worker.leads else None

    def save(step: int) -> None:
        telemetry.upload()  # before the checkpoint: a run that continues from it finds every line up to it
        cursor = stage.order.cursor(step, stage.shards.digest).to_dict()
        uri = checkpoint.save(
            worker,
            stage.engines,
            ema,
            cursor=cursor,
            inputs=stage.inputs,
            config=compose.to_dict(config),
            fingerprint=fingerprint,
        )
        on_checkpoint(uri, step)

    batches = stage.batches(first, config.steps)
    try:
        for step in range(first, config.steps):
            asked = time.perf_counter()
            batch = next(batches)
            waited = time.perf_counter() - asked
            samples = step * batch_size
            lr = config.optimizer.lr_at(samples + batch_size, total)
            for engine in stage.engines.values():
                engine.set_lr(lr)
            metrics = [stage.step(part, samples) for part in stage.micro_batches(batch, micro)]
            ema.update()
            telemetry.step(metrics, data_wait=waited, seconds=time.perf_counter() - asked)
            seen = samples + batch_size
            if _crossed(samples, seen, config.log_every_samples) or step == config.steps - 1:
                logged = telemetry.flush(seen, lr=lr, gradient_norm=stage.engine.gradient_norm)
                if progress is not None:
                    progress.update(
                        seen,
                        loss=logged[names.TRAIN_LOSS],
                        samples_per_second=logged[names.TRAIN_SAMPLES_PER_SECOND],
                        data_wait_share=logged[names.TRAIN_DATA_WAIT_SHARE],
                    )
                _require_finite(logged[names.TRAIN_LOSS], seen)
            if config.checkpoint_every_samples and _crossed(samples, seen, config.checkpoint_every_samples):
                save(step + 1)
        if progress is not None:
            progress.close()
        exported = stage.finish(ema)
        if exported is not None:
            telemetry.exported(exported, samples=total)
    finally:
        telemetry.close()
        for engine in stage.engines.values():
            engine.close()


def _resume(worker: Worker, stage: Stage, ema: EMA, fingerprint: str) -> int:
    """The step to begin with: 0, or the one after the newest valid checkpoint, then loaded."""
    found: list[checkpoint.Saved | None] = [checkpoint.newest(worker.out) if worker.leads else None]
    dist.broadcast_object_list(found, src=0)
    saved = found[0]
    if saved is None:
        return 0
    checkpoint.restore(worker, saved, stage.engines, ema, fingerprint=fingerprint)
    step = stage.order.resume(type(stage.order.cursor(0, "")).from_dict(saved.cursor), stage.shards.digest)
    if worker.leads:
        print(f"resumed from {saved.uri} at step {step}", flush=True)
    return step


def _fingerprint(worker: Worker) -> str:
    """What a checkpoint must share with the run that continues it: the networks and what they learn."""
    config = compose.to_dict(worker.config)
    return store.digest_of({key: config[key] for key in ("stage", "autoencoder", "denoiser", "objective")})


def _crossed(before: int, after: int, every: int) -> bool:
    return every > 0 and before // every != after // every


def _require_finite(loss: float, samples: int) -> None:
    if not math.isfinite(loss):
        raise TrainingFailed(
            f"The loss is {loss} after {samples} samples.",
            where="train/loss",
            mend="Resume from the last checkpoint with a lower optimizer.lr, or check the data.",
        )
