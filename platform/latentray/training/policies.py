"""What is done about a fault: decisions as pure functions of what was seen, without a process, a clock or a file."""

from __future__ import annotations

import dataclasses
import enum
import math
import statistics
from collections.abc import Mapping, Sequence

from latentray.config.faults import FaultsConfig

_SCALED = 1.4826
"""A median absolute deviation times this is the standard deviation of a normal distribution."""


class Answer(enum.Enum):
    """What the loop does next."""

    GO_ON = "go on"
    ROLL_BACK = "roll back"
    STOP = "stop"


def spike_limit(losses: Sequence[float], faults: FaultsConfig) -> float:
    """The loss above which a step is a spike: median + factor * max(|median|, deviation), infinite where too few were seen.

    A loss may be near 0, or negative where an adversarial term is in it: then the deviation of the last ones is the scale.
    """
    if not faults.spike_factor or len(losses) < max(faults.spike_window // 4, 2):
        return math.inf
    middle = statistics.median(losses)
    spread = _SCALED * statistics.median(abs(loss - middle) for loss in losses)
    return middle + faults.spike_factor * max(abs(middle), spread)


def after_dropped_step(in_a_row: int, rollbacks: int, faults: FaultsConfig) -> Answer:
    """After the `in_a_row`-th dropped step in a row, with so many rollbacks before it."""
    if in_a_row < faults.drops_in_a_row:
        return Answer.GO_ON
    return Answer.ROLL_BACK if rollbacks < faults.max_rollbacks else Answer.STOP


def after_broken_weights(rollbacks: int, faults: FaultsConfig) -> Answer:
    """Where weights are no numbers any more: such a state is never saved."""
    return Answer.ROLL_BACK if rollbacks < faults.max_rollbacks else Answer.STOP


def after_failed_checkpoint(in_a_row: int, faults: FaultsConfig) -> Answer:
    """After the `in_a_row`-th checkpoint in a row that could not be written: training is worth more than one of them."""
    return Answer.GO_ON if in_a_row <= faults.failed_checkpoints else Answer.STOP


@dataclasses.dataclass(frozen=True, kw_only=True)
class Beat:
    """A sign of life of one rank, as another one sees it."""

    rank: int
    host: str
    pid: int
    step: int
    """The step it is in; -1 before the first."""
    in_step_s: float
    """How long it has been in that step, by its own clock."""
    silent_s: float
    """How long its signs of life have not changed, by the reader's clock."""
    watched: bool
    """False while it is at something that has no common length: loading, exporting."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hang:
    """Who holds the others up, and how."""

    beat: Beat
    silent: bool
    """True where the whole process stands still; False where it lives and its step does not end."""

    def __str__(self) -> str:
        one = self.beat
        step = "in its first step" if one.step < 0 else f"at step {one.step}"
        where = f"rank {one.rank} (process {one.pid} on {one.host}) {step}"
        if self.silent:
            return f"{where} gave no sign of life for {one.silent_s:.0f} s: stopped, or its node is lost"
        return f"{where} has been there for {one.in_step_s:.0f} s"


def silent(beats: Mapping[int, Beat], faults: FaultsConfig) -> Hang | None:
    """The process that stands still, None where none does."""
    found = [one for one in beats.values() if one.silent_s > faults.silent_s]
    return Hang(beat=max(found, key=lambda one: one.silent_s), silent=True) if found else None


def hang(beats: Mapping[int, Beat], faults: FaultsConfig) -> Hang | None:
    """The rank that hangs, None where none does. A silent process counts first, then the rank that is furthest behind."""
    slow = [one for one in beats.values() if one.watched and one.in_step_s > _patience(one.step, faults)]
    late = Hang(beat=min(slow, key=lambda one: (one.step, -one.in_step_s)), silent=False) if slow else None
    return silent(beats, faults) or late


def _patience(step: int, faults: FaultsConfig) -> float:
    return faults.step_timeout_s * (3 if step < 0 else 1)
