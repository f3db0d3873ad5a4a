"""The loop of one worker. It knows no Ray: what is told at a checkpoint, and who is preempted, it asks its hooks."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from latentray.checkpoint import manifest
from latentray.data.ordering import Cursor
from latentray.errors import FingerprintMismatch, StorageFailed, TrainingFailed
from latentray.reporting.progress import Progress
from latentray.tracking import names
from latentray.training import checkpoint, export, policies
from latentray.training.checkpoint import Checkpoints, Saved
from latentray.training.classifier_stage import ClassifierStage
from latentray.training.clock import CAUSES, CHECKPOINTS, Clock
from latentray.training.ema import EMA
from latentray.training.engine import Engine
from latentray.training.feed import Feed, Ledger
from latentray.training.guard import Guard, Heard
from latentray.training.policies import Answer
from latentray.training.stage1 import AutoencoderStage
from latentray.training.stage2 import DiffusionStage
from latentray.training.state import Worker
from latentray.training.stopping import Stop
from latentray.training.telemetry import Telemetry
from latentray.training.watchdog import Watchdog

_ASK_EVERY_S = 5.0
"""A cloud tells of a node that it takes back half a minute to two minutes before; asking is a round trip of all ranks."""

_COUNTED = ("dropped", "dropped_in_a_row", "rollbacks")
"""What the loop counts of dropped steps, over all attempts."""

STAGES: dict[str, Callable[[Worker], Stage]] = {
    "autoencoder": AutoencoderStage,
    "diffusion": DiffusionStage,
    "classifier": ClassifierStage,
}


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


class Shown(Protocol):
    """Whoever is told how far a run is (`reporting.progress.Progress`)."""

    def update(
        self,
        samples: int,
        *,
        loss: float | None = None,
        samples_per_second: float | None = None,
        data_wait_share: float | None = None,
        checkpoint_age: float | None = None,
        restarts: int = 0,
        goodput: float | None = None,
    ) -> None: ...

    def close(self) -> None: ...


@dataclasses.dataclass(frozen=True)
class Hooks:
    """What the surroundings of a worker are told, and asked."""

    on_checkpoint: Callable[[str, int], None] = lambda uri, step: None
    """Called on every rank with the URI and step of each checkpoint that was begun."""
    progress: Callable[[int, str, int], Shown] = Progress.begin
    """Makes what rank 0 tells its progress to, from the samples of the run, its stage and the samples it begins at."""
    leaving: Callable[[], frozenset[str]] = frozenset
    """The nodes of this run that will be taken away. Collective; asked on every rank in the same steps, every few seconds."""


def run(worker: Worker, hooks: Hooks = Hooks()) -> bool:
    """Train from the newest valid checkpoint, or from the start, to the end, and export the result.

    False where it was asked to stop, which leaves a checkpoint. Raises TrainingFailed where steps are dropped, or weights
    are no numbers, more often than `faults` allows; StorageFailed where checkpoints cannot be written any more;
    FingerprintMismatch or ArtifactError where the run's checkpoints cannot be continued.
    """
    stop = Stop(worker.out, leads=worker.leads)
    watchdog = Watchdog(worker, worker.config.faults)
    try:
        with stop.on_signal():
            return _Loop(worker, hooks, stop, watchdog).run()
    finally:
        stop.close()
        watchdog.close()


class _Loop:
    """One attempt of a run."""

    def __init__(self, worker: Worker, hooks: Hooks, stop: Stop, watchdog: Watchdog) -> None:
        self.worker, self.config, self.hooks = worker, worker.config, hooks
        self.stop, self.watchdog = stop, watchdog
        self.stage = STAGES[self.config.stage.name](worker)
        self.ema = EMA(self.stage.engine, half_life_samples=self.config.ema_half_life_samples)
        others = [engine for engine in self.stage.engines.values() if engine is not self.stage.engine]
        self.guard = Guard(self.stage.engine, others, self.config.faults, world=worker.world)
        self.checkpoints = Checkpoints(worker, self.stage.engines, self.ema, inputs=self.stage.inputs)
        self.saved = self.checkpoints.restore()
        cursor = Cursor.from_dict(self.saved.cursor) if self.saved else None
        self.first = self._resume_data(cursor) if cursor else 0
        self.order = self.stage.feed.order
        self.ledger = Ledger(
            self.stage.feed,
            allowed=self.config.damage.max_bad_fraction,
            device=worker.device,
            damaged_before=cursor.damaged if cursor else 0,
        )
        self.last = self.order.steps_to(self.config.total_samples)
        self.accumulation = self.config.micro_and_accumulation(worker.world)[1]
        begun, self.total = self.order.samples_before(self.first), self.order.samples_before(self.last)
        self.telemetry = Telemetry(worker, facts=self.stage.facts, inputs=self.stage.inputs, resumed_at=begun)
        self.progress = hooks.progress(self.total, self.config.stage.name, begun) if worker.leads else None
        self.clock = Clock.begin()
        faults = self.saved.faults if self.saved else {}
        self.guard.restore(faults)
        self.dropped, self.dropped_in_a_row, self.rollbacks = (int(faults.get(name, 0)) for name in _COUNTED)
        self.leaving: frozenset[str] = frozenset()
        self.asked_at = time.monotonic()
        if worker.leads and self.saved is not None:
            print(_resumed(self.saved), flush=True)

    def _resume_data(self, cursor: Cursor) -> int:
        """The step to go on at. Other data, where that is allowed, go on after as many samples of their own order."""
        assert self.saved is not None
        try:
            self.stage.feed = self.stage.feed.resumed(cursor)
        except FingerprintMismatch:
            if "data" not in self.config.resume.allow:
                raise
            return self.stage.feed.order.steps_to(self.saved.samples)
        return cursor.step

    def run(self) -> bool:
        try:
            finished = self._steps()
            if self.progress is not None:
                self.progress.close()
            self.watchdog.at(self.last, watched=False)
            self.checkpoints.wait()
            if finished:
                self._finish()
            return finished
        finally:
            self.telemetry.close()
            for engine in self.stage.engines.values():
                engine.close()

    def _steps(self) -> bool:
        """The steps that are left; False where the run was asked to stop."""
        batches = self.stage.batches(self.first, self.last)
        self.clock = Clock.resume(self.saved.clock) if self.saved else Clock.begin()
        for step in range(self.first, self.last):
            self.watchdog.at(step if step > self.first else -1)
            samples, seen = self.order.samples_before(step), self.order.samples_before(step + 1)
            lr = self.config.optimizer.lr_at(seen, self.total)
            heard = self._step(batches, samples, seen, lr)
            logs = _crossed(samples, seen, self.config.log_every_samples) or step == self.last - 1
            if logs:
                self._log(step, seen, lr)
            due = _crossed(samples, seen, self.config.checkpoint_every_samples)
            just_in_time = heard.ask and self._is_another_leaving(seen)
            saved = self._save(step + 1) if heard.stop or due or just_in_time else False
            if heard.stop:
                if self.worker.leads:
                    left = "a checkpoint is being written" if saved else "the last checkpoint is what it goes on from"
                    print(f"stopped at {seen} samples, as asked; {left}", flush=True)
                return False
        return True

    def _is_another_leaving(self, seen: int) -> bool:
        """True once for each node that will be taken away: it costs one checkpoint just in time, and training goes on."""
        self.asked_at = time.monotonic()
        before, self.leaving = self.leaving, self.hooks.leaving()
        if self.leaving <= before:
            return False
        if self.worker.leads:
            told = ", ".join(sorted(self.leaving - before))
            print(f"node {told} will be taken away: a checkpoint is written at {seen} samples", flush=True)
        return True

    def _step(self, batches: Iterator[Any], samples: int, seen: int, lr: float) -> Heard:
        """One global batch, and what the ranks told each other with it."""
        asked = time.perf_counter()
        batch = next(batches)
        waited = time.perf_counter() - asked
        self.ledger.note(batch)
        for engine in self.stage.engines.values():
            engine.set_lr(lr)
        ask = self.worker.leads and time.monotonic() - self.asked_at >= _ASK_EVERY_S
        self.guard.tell(stop=self.stop.asked, failed=self.checkpoints.failed, ask=ask)
        size = len(batch.ids) // self.accumulation
        metrics = [self.stage.step(part, samples) for part in self.stage.micro_batches(batch, size)]
        heard = self.guard.after_step()
        if heard.failed:
            self.checkpoints.give_up()
        if heard.applied:
            self.ema.update(seen - samples)
        seconds = time.perf_counter() - asked
        self.telemetry.step(metrics if heard.applied else [], data_wait=waited, seconds=seconds)
        self.clock.step(seconds=seconds, data_s=waited, applied=heard.applied)
        self._mind_drops(heard.applied, seen)
        return heard

    def _mind_drops(self, applied: bool, seen: int) -> None:
        """After so many dropped steps in a row, go back to the last checkpoint's weights; the data goes on where it is."""
        self.dropped += not applied
        self.dropped_in_a_row = 0 if applied else self.dropped_in_a_row + 1
        if applied:
            return
        if self.worker.leads and self.dropped_in_a_row == 1:
            print(f"step dropped before {seen} samples: a loss or gradient is no number, or far off", flush=True)
        answer = policies.after_dropped_step(self.dropped_in_a_row, self.rollbacks, self.config.faults)
        if answer is not Answer.GO_ON:
            self._roll_back(answer, f"{self.dropped_in_a_row} steps in a row were dropped", seen)

    def _roll_back(self, answer: Answer, why: str, seen: int) -> None:
        found = self.checkpoints.restore() if answer is Answer.ROLL_BACK else None
        if found is None:
            raise TrainingFailed(
                f"At {seen} samples {why}, and the run went back {self.rollbacks} times before.",
                where="train/loss",
                mend="Resume with a lower optimizer.lr or a larger batch, or look at the data that was read there; "
                "faults.max_rollbacks counts over all attempts.",
            )
        self.rollbacks += 1
        self.dropped_in_a_row = 0
        self.clock.rolled_back(found.clock)
        if self.worker.leads:
            print(f"{why}: back to the weights of {found.uri}; the data goes on at {seen} samples", flush=True)

    def _log(self, step: int, seen: int, lr: float) -> None:
        now = time.time()
        about = {
            names.TRAIN_LEARNING_RATE: lr,
            names.TRAIN_GRADIENT_NORM: self.stage.engine.gradient_norm,
            names.TRAIN_EPOCH: min(self.order.epochs_before(step + 1)),
            names.TRAIN_DROPPED_STEPS: self.dropped,
            names.TRAIN_ROLLBACKS: self.rollbacks,
            names.RUN_GOODPUT: self.clock.goodput(now),
            names.RUN_RESTARTS: self.clock.restarts,
            names.CHECKPOINT_STALL_SECONDS: self.checkpoints.stalled_s,
        } | self.ledger.figures(seen)
        shares = self.clock.shares(now)
        about |= {names.lost_to(cause): shares[cause] for cause in CAUSES}
        if self.checkpoints.written_at is not None:
            about[names.CHECKPOINT_AGE_SECONDS] = now - self.checkpoints.written_at
        logged = self.telemetry.flush(seen, about)
        if self.progress is not None:
            self.progress.update(
                seen,
                loss=logged.get(names.TRAIN_LOSS),
                samples_per_second=logged[names.TRAIN_SAMPLES_PER_SECOND],
                data_wait_share=logged[names.TRAIN_DATA_WAIT_SHARE],
                checkpoint_age=logged.get(names.CHECKPOINT_AGE_SECONDS),
                restarts=self.clock.restarts,
                goodput=about[names.RUN_GOODPUT],
            )

    def _save(self, step: int) -> bool:
        """Save the state before `step`; False where it is no state to go on from, or the storage is too slow."""
        if not checkpoint.is_finite(self.stage.engines, self.ema, self.worker.device):
            answer = policies.after_broken_weights(self.rollbacks, self.config.faults)
            self._roll_back(answer, "the weights were no numbers any more", self.order.samples_before(step))
            return False
        samples = self.order.samples_before(step)
        cursor = self.order.cursor(step, damaged=self.ledger.damaged(samples)).to_dict()
        faults = self.guard.to_dict() | {name: getattr(self, name) for name in _COUNTED}
        begun = time.perf_counter()
        uri = self.checkpoints.save(
            cursor=cursor,
            samples=samples,
            clock=self.clock.to_dict(),
            faults=faults,
            first=self.telemetry.upload,  # a run that continues from it finds every line up to it
        )
        failures = self.checkpoints.failures
        if policies.after_failed_checkpoint(failures, self.config.faults) is Answer.STOP:
            raise StorageFailed(
                f"{failures} checkpoints in a row could not be written.",
                where=self.worker.out,
                mend="Mend the storage, and resume the run; or allow more (faults.failed_checkpoints).",
            )
        if uri is None:
            self.clock.lose(CHECKPOINTS, time.perf_counter() - begun)
            if self.worker.leads:
                print(f"checkpoint at {samples} samples left out: the one before is still being written", flush=True)
            return False
        self.hooks.on_checkpoint(uri, step)
        self.clock.lose(CHECKPOINTS, time.perf_counter() - begun)  # Ray may take seconds to be told
        return True

    def _finish(self) -> None:
        if self.worker.leads and self.worker.device.type == "cpu":
            # Rank 0 measures and exports alone: the threads of its node's other ranks are free for it.
            torch.set_num_threads(torch.get_num_threads() * int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        exported = self.stage.finish(self.ema)
        if exported is not None:
            self.telemetry.exported(exported, samples=self.total)


def _resumed(saved: Saved) -> str:
    """What rank 0 says of where a run goes on; another commit may train otherwise, so it is told."""
    then, now = saved.manifest.git_commit, manifest.git_commit()
    other = f" (written by commit {then[:10]}, this is {now[:10]})" if then and now and then != now else ""
    return f"resumed from {saved.uri} at step {saved.step}{other}"


def _crossed(before: int, after: int, every: int) -> bool:
    return every > 0 and before // every != after // every
