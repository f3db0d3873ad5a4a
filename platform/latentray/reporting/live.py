"""How far a job is, drawn anew a few times a second at the foot of a terminal; what else is printed scrolls above it."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable
from typing import IO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from latentray.reporting.wording import duration

_BLOCKS = "▁▂▃▄▅▆▇█"
_LOSSES = 40
_QUIET_S = 10.0
"""Without news for so long it is said: a step takes long, or workers start again."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class State:
    """What is known of a job when it was last heard of; None where it was not told."""

    samples: int
    total: int
    samples_per_second: float | None = None
    loss: float | None = None
    data_wait_share: float | None = None
    checkpoint_age: float | None = None
    """Seconds, when it was heard of."""
    restarts: int = 0
    goodput: float | None = None

    def left(self) -> float | None:
        """Seconds that are left at this rate."""
        if not self.samples_per_second or self.samples >= self.total:
            return None
        return (self.total - self.samples) / self.samples_per_second


def facts(state: State, *, since: float = 0.0) -> list[str]:
    """The state in words, but for its samples; `since` it was heard of so many seconds went by."""
    found = []
    if state.loss is not None:
        found.append(f"loss {state.loss:.4g}")
    if state.samples_per_second:
        found.append(f"{state.samples_per_second:.0f} samples/s")
    if state.data_wait_share is not None:
        found.append(f"data wait {state.data_wait_share:.0%}")
    if state.checkpoint_age is not None:
        found.append(f"checkpoint {duration(state.checkpoint_age + since)} old")
    if state.restarts:
        found.append(f"{state.restarts} restart{'s' if state.restarts > 1 else ''}")
    if state.goodput is not None:
        found.append(f"goodput {state.goodput:.0%}")
    return found


def sparkline(values: list[float]) -> str:
    """One block per value, the lowest and the highest of them at the ends of the scale."""
    if not values:
        return ""
    low, high = min(values), max(values)
    scale = (len(_BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BLOCKS[round((value - low) * scale)] for value in values)


class View:
    """The state of a job on a terminal, from `start` to `stop`."""

    def __init__(self, description: str, total: int, *, stream: IO[str], clock: Callable[[], float]) -> None:
        self._description, self._clock = description, clock
        self._state, self._heard = State(samples=0, total=total), clock()
        self._losses: collections.deque[float] = collections.deque(maxlen=_LOSSES)
        self._live = Live(
            get_renderable=self.render,
            console=Console(file=stream, highlight=False),
            refresh_per_second=4,
            redirect_stdout=True,
            redirect_stderr=True,
        )

    def start(self) -> None:
        self._live.start()

    def stop(self) -> None:
        """Leave the last state standing."""
        self._live.stop()

    def hear(self, state: State) -> None:
        self._state, self._heard = state, self._clock()
        if state.loss is not None:
            self._losses.append(state.loss)

    def render(self) -> RenderableType:
        """The state as it is now: times go on while nothing is heard."""
        state, since = self._state, self._clock() - self._heard
        share = state.samples / state.total if state.total else 1.0
        left = state.left()
        rows = Table.grid(padding=(0, 1))
        rows.add_row(
            ProgressBar(total=state.total or 1, completed=state.samples, width=28),
            f"{share:4.0%}  {state.samples:,} of {state.total:,} samples",
            "" if left is None else f"{duration(max(left - since, 0.0))} left",
        )
        words = Text("   ").join(Text(fact) for fact in facts(state, since=since))
        parts: list[RenderableType] = [rows, words]
        if len(self._losses) > 1:
            parts.append(Text(f"loss {sparkline(list(self._losses))}", style="cyan"))
        if since > _QUIET_S and state.samples < state.total:
            parts.append(Text(f"nothing was heard for {duration(since)}", style="yellow"))
        return Panel(Group(*parts), title=self._description, title_align="left", expand=False)
