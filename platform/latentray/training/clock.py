"""Where a run's time goes, over all its attempts: the effective-time ratio, and what the rest was lost to.

The clock travels in the checkpoint. So steps that a fault threw away count as lost without being looked for: they are the
time between the checkpoint that a run resumes from and the first step after it, like the restart itself.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from typing import Any

FAULTS, DATA, CHECKPOINTS, DROPPED, OTHER = "faults", "data", "checkpoints", "dropped", "other"
CAUSES = (FAULTS, DATA, CHECKPOINTS, DROPPED, OTHER)
"""What time was lost to: restarts and steps done again; waiting for data; saving; dropped and rolled back steps; the rest."""


@dataclasses.dataclass(kw_only=True)
class Clock:
    """Seconds since the run's first step, sorted. `now` and `began` are seconds since the epoch."""

    began: float
    productive_s: float = 0.0
    """In steps that count: whose result is in the weights."""
    lost_s: dict[str, float] = dataclasses.field(default_factory=lambda: dict.fromkeys(CAUSES, 0.0))
    restarts: int = 0

    @classmethod
    def begin(cls, now: float | None = None) -> Clock:
        return cls(began=time.time() if now is None else now)

    @classmethod
    def resume(cls, saved: Mapping[str, Any], now: float | None = None) -> Clock:
        """The clock of a checkpoint, as an attempt takes it up at its first step."""
        now = time.time() if now is None else now
        lost = dict.fromkeys(CAUSES, 0.0) | dict(saved["lost_s"])
        lost[FAULTS] += max(now - saved["at"], 0.0)
        return cls(
            began=saved["began"], productive_s=saved["productive_s"], lost_s=lost, restarts=saved["restarts"] + 1
        )

    def step(self, *, seconds: float, data_s: float, applied: bool) -> None:
        """Take in a step of so many seconds, of which the loop waited `data_s` for its data."""
        self.lost_s[DATA] += data_s
        if applied:
            self.productive_s += seconds - data_s
        else:
            self.lost_s[DROPPED] += seconds - data_s

    def lose(self, cause: str, seconds: float) -> None:
        """So many seconds went to something else than steps."""
        self.lost_s[cause] += seconds

    def rolled_back(self, saved: Mapping[str, Any]) -> None:
        """The steps since a checkpoint do not count any more."""
        gone = max(self.productive_s - saved["productive_s"], 0.0)
        self.productive_s -= gone
        self.lost_s[DROPPED] += gone

    def goodput(self, now: float | None = None) -> float:
        """Share of the time since the run's first step that went into steps that count, 0 to 1."""
        elapsed = (time.time() if now is None else now) - self.began
        return min(self.productive_s / elapsed, 1.0) if elapsed > 0 else 1.0

    def shares(self, now: float | None = None) -> dict[str, float]:
        """Share of the time lost to each cause; with `goodput` they make up 1."""
        now = time.time() if now is None else now
        elapsed = max(now - self.began, 1e-9)
        named = {cause: seconds / elapsed for cause, seconds in self.lost_s.items()}
        return named | {OTHER: max(1 - self.goodput(now) - sum(named.values()), 0.0)}

    def to_dict(self, now: float | None = None) -> dict[str, Any]:
        """What a checkpoint holds of it."""
        return dataclasses.asdict(self) | {"at": time.time() if now is None else now}
