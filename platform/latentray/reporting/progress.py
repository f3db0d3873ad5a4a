"""Progress of a job by samples: a live bar on a terminal, plain lines where the output is piped (a Ray worker's)."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import IO, Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, TextColumn, track
from rich.progress import Progress as RichProgress

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
        self._total, self._description = total_samples, description
        self._every, self._clock = every_seconds, clock
        self._stream = stream or sys.stdout
        self._samples = self._first = start_samples
        self._started = clock()
        self._last_line: float | None = None
        self._facts = self._printed = ""
        self._rate: float | None = None
        self._bar: RichProgress | None = None
        if self._stream.isatty():
            columns: list[Any] = [
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[facts]}"),
            ]
            self._bar = RichProgress(*columns, console=Console(file=self._stream, highlight=False))
            self._task = self._bar.add_task(description, total=total_samples, completed=start_samples, facts="")
            self._bar.start()

    def update(
        self,
        samples: int,
        *,
        loss: float | None = None,
        samples_per_second: float | None = None,
        data_wait_share: float | None = None,
        checkpoint_age: float | None = None,
        restarts: int = 0,
    ) -> None:
        """Show the state at `samples` seen in all. What is not given is left out; the rate is then measured here."""
        self._samples = samples
        now = self._clock()
        elapsed = now - self._started
        measured = (samples - self._first) / elapsed if elapsed > 0 and samples > self._first else None
        self._rate = samples_per_second or measured
        self._facts = self._describe(loss, data_wait_share, checkpoint_age, restarts)
        if self._bar is not None:
            self._bar.update(self._task, completed=samples, facts=self._facts)
        elif self._last_line is None or now - self._last_line >= self._every:
            self._line(now)

    def close(self) -> None:
        """Leave the last state standing. Calling it again does nothing."""
        if self._bar is not None:
            self._bar.stop()
        elif self._facts != self._printed:
            self._line(self._clock())

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _describe(
        self, loss: float | None, data_wait_share: float | None, checkpoint_age: float | None, restarts: int
    ) -> str:
        facts = [f"{self._samples:,}/{self._total:,} samples"]
        if loss is not None:
            facts.append(f"loss {loss:.4g}")
        if self._rate:
            facts.append(f"{self._rate:.0f} samples/s")
        if data_wait_share is not None:
            facts.append(f"data wait {data_wait_share:.0%}")
        if checkpoint_age is not None:
            facts.append(f"checkpoint {duration(checkpoint_age)} old")
        if restarts:
            facts.append(f"{restarts} restart{'s' if restarts > 1 else ''}")
        if self._rate and self._samples < self._total:
            facts.append(f"{duration((self._total - self._samples) / self._rate)} left")
        elif self._samples >= self._total:
            facts.append(f"done in {duration(self._clock() - self._started)}")
        return "  ".join(facts)

    def _line(self, now: float) -> None:
        self._last_line = now
        share = self._samples / self._total if self._total else 1.0
        print(f"{self._description}  {share:4.0%}  {self._facts}", file=self._stream, flush=True)
        self._printed = self._facts


def duration(seconds: float) -> str:
    """Seconds for a reader: `8.3 s`, `9 min 42 s`, `12 min`, `3 h 05 min`."""
    if seconds < 59.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s" if rest else f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def tracked(items: Iterable[Item], total: int, description: str) -> Iterator[Item]:
    """The items, while a bar (on a terminal) or a line per tenth of the work tells how far it is."""
    if Console().is_terminal:
        yield from track(items, description=description, total=total, transient=True)
        return
    for number, item in enumerate(items, start=1):
        if number * 10 // total > (number - 1) * 10 // total:
            print(f"{description}: {number} of {total}", flush=True)
        yield item
