"""The loop of one worker. It knows no Ray: what to do at a checkpoint it is told by a callback."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from latentray.checkpoint import store
from latentray.config import compose
from latentray.data.ordering import Cursor
from latentray.errors import TrainingFailed
from latentray.reporting.progress import Progress
from latentray.tracking import names
from latentray.training import checkpoint, export
from latentray.training.ema import EMA
from latentray.training.engine import Engine
from latentray.training.feed import Feed, Ledger
from latentray.training.stage1 import AutoencoderStage
from latentray.training.stage2 import DiffusionStage
from latentray.training.state import Worker
from latentray.training.telemetry import Telemetry

STAGES: dict[str, Callable[[Worker], Stage]] = {"autoencoder": AutoencoderStage, "diffusion": DiffusionStage}


class Stage(Protocol):
    """What differs between the stages."""

    engines: dict[str, Engine]
    engine: Engine
    feed: Feed
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
    ema = EMA(stage.engine, half_life_samples=config.ema_half_life_samples)
    fingerprint = _fingerprint(worker)
    cursor = _resume(worker, stage, ema, fingerprint)
    first = cursor.step if cursor else 0
    order = stage.feed.order
    ledger = Ledger(
        stage.feed,
        allowed=config.damage.max_bad_fraction,
        device=worker.device,
        damaged_before=cursor.damaged if cursor else 0,
    )
    _, accumulation = config.micro_and_accumulation(worker.world)
    last = order.steps_to(config.total_samples)
    begun, total = order.samples_before(first), order.samples_before(last)
    telemetry = Telemetry(worker, facts=stage.facts, resumed_at=begun)
    progress = Progress(total, config.stage.name, start_samples=begun) if worker.leads else None

    def save(step: int) -> None:
        telemetry.upload()  # before the checkpoint: a run that continues from it finds every line up to it
        cursor = order.cursor(step, damaged=ledger.damaged()).to_dict()
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

    batches = stage.batches(first, last)
    try:
        for step in range(first, last):
            asked = time.perf_counter()
            batch = next(batches)
            waited = time.perf_counter() - asked
            ledger.note(batch)
            samples, seen = order.samples_before(step), order.samples_before(step + 1)
            lr = config.optimizer.lr_at(seen, total)
            for engine in stage.engines.values():
                engine.set_lr(lr)
            metrics = [stage.step(part, samples) for part in stage.micro_batches(batch, len(batch.ids) // accumulation)]
            ema.update(seen - samples)
            telemetry.step(metrics, data_wait=waited, seconds=time.perf_counter() - asked)
            if _crossed(samples, seen, config.log_every_samples) or step == last - 1:
                about = {
                    names.TRAIN_LEARNING_RATE: lr,
                    names.TRAIN_GRADIENT_NORM: stage.engine.gradient_norm,
                    names.TRAIN_EPOCH: min(order.epochs_before(step + 1)),
                } | ledger.figures()
                logged = telemetry.flush(seen, about)
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
        _take_idle_threads(worker)
        exported = stage.finish(ema)
        if exported is not None:
            telemetry.exported(exported, samples=total)
    finally:
        telemetry.close()
        for engine in stage.engines.values():
            engine.close()


def _take_idle_threads(worker: Worker) -> None:
    """Rank 0 measures and exports alone: the threads of its node's other ranks are free for it."""
    if worker.leads and worker.device.type == "cpu":
        torch.set_num_threads(torch.get_num_threads() * int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def _resume(worker: Worker, stage: Stage, ema: EMA, fingerprint: str) -> Cursor | None:
    """Load the newest valid checkpoint and go on with its place in the data; None where there is none."""
    found: list[checkpoint.Saved | None] = [checkpoint.newest(worker.out) if worker.leads else None]
    dist.broadcast_object_list(found, src=0)
    saved = found[0]
    if saved is None:
        return None
    checkpoint.restore(worker, saved, stage.engines, ema, fingerprint=fingerprint)
    cursor = Cursor.from_dict(saved.cursor)
    stage.feed = stage.feed.resumed(cursor)
    if worker.leads:
        print(f"resumed from {saved.uri} at step {cursor.step}", flush=True)
    return cursor


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
