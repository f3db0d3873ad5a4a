"""Progress of a job by samples: drawn live on a terminal, plain lines where the output is piped (a Ray worker's)."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import IO, TypeVar

from rich.console import Console
from rich.progress import track

from latentray.reporting.live import State, View, facts
from latentray.reporting.wording import duration

Item = TypeVar("Item")


class Progress:
    """Shows how far a job is: samples, loss, samples per second, share of time spent waiting for data, time left.

        with Progress(50_000, "stage 2") as progress:
            progress.update(1_280, loss=0.41, samples_per_second=272.0, data_wait_share=0.02)

    Args:
        total_samples: samples at the end of the job.
        start_samples: samples already seen, where a run resumes.
        every_seconds: the least time between two plain lines; the first and the last always appear.
        stream: where to write; standard output by default.
        clock: seconds, monotonic; tests pass their own.
    """

    def __init__(
        self,
        total_samples: int,
        description: str,
        *,
        start_samples: int = 0,
        every_seconds: float = 10.0,
        stream: IO[str] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._description, self._every, self._clock = description, every_seconds, clock
        self._stream = stream or sys.stdout
        self._state = State(samples=start_samples, total=total_samples)
        self._first, self._started = start_samples, clock()
        self._last_line: float | None = None
        self._printed = ""
        self._view: View | None = None
        if is_terminal(self._stream):
            self._view = View(description, total_samples, stream=self._stream, clock=clock)
            self._view.hear(self._state)
            self._view.start()

    @classmethod
    def begin(cls, total_samples: int, description: str, start_samples: int) -> Progress:
        """One that writes to standard output."""
        return cls(total_samples, description, start_samples=start_samples)

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
    ) -> None:
        """Show the state at `samples` seen in all. What is not given is left out; the rate is then measured here."""
        now = self._clock()
        elapsed = now - self._started
        measured = (samples - self._first) / elapsed if elapsed > 0 and samples > self._first else None
        self._state = State(
            samples=samples,
            total=self._state.total,
            samples_per_second=samples_per_second or measured,
            loss=loss,
            data_wait_share=data_wait_share,
            checkpoint_age=checkpoint_age,
            restarts=restarts,
            goodput=goodput,
        )
        if self._view is not None:
            self._view.hear(self._state)
        elif self._last_line is None or now - self._last_line >= self._every:
            self._line(now)

    def close(self) -> None:
        """Leave the last state standing. Calling it again does nothing."""
        if self._view is not None:
            self._view.stop()
        elif self._state.samples > self._first and self._in_words() != self._printed:
            self._line(self._clock())

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _in_words(self) -> str:
        state = self._state
        found = [f"{state.samples:,}/{state.total:,} samples", *facts(state)]
        left = state.left()
        if left is not None:
            found.append(f"{duration(left)} left")
        elif state.samples >= state.total:
            found.append(f"done in {duration(self._clock() - self._started)}")
        return "  ".join(found)

    def _line(self, now: float) -> None:
        self._last_line, self._printed = now, self._in_words()
        share = self._state.samples / self._state.total if self._state.total else 1.0
        print(f"{self._description}  {share:4.0%}  {self._printed}", file=self._stream, flush=True)


def is_terminal(stream: IO[str]) -> bool:
    """Whether a stream ends at a terminal that can be drawn on."""
    console = Console(file=stream)
    return console.is_terminal and not console.is_dumb_terminal


def tracked(items: Iterable[Item], total: int, description: str) -> Iterator[Item]:
    """The items, while a bar (on a terminal) or a line per tenth of the work tells how far it is."""
    if Console().is_terminal:
        yield from track(items, description=description, total=total, transient=True)
        return
    for number, item in enumerate(items, start=1):
        if number * 10 // total > (number - 1) * 10 // total:
            print(f"{description}: {number} of {total}", flush=True)
        yield item
