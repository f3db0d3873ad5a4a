"""What workers tell the driver of a launch: that they are at work, their progress, drawn where it has a terminal, and an error
that ends the run.

They tell it to a board, which under Ray is an actor, since they may share no disk, and the storage may be what failed.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from latentray.reporting.progress import Progress

_TOLD_EVERY_S = 0.5
_ASKED_EVERY_S = 0.5
_SIGN_EVERY_S = 1.0

Said = dict[str, Any]
"""`total_samples`, `description` and `start_samples` as Progress.begin takes them, then `samples` and `figures` of an update."""


class Board:
    """When rank 0 gave a sign last, what it said, and the first error that a worker raised on purpose.

    Args:
        drawn: whether what is said is drawn; if not, rank 0 prints it itself.
    """

    def __init__(self, *, drawn: bool) -> None:
        self._said: Said | None = None
        self._failed: dict[str, str] | None = None
        self._drawn = drawn
        self._signed_at = time.monotonic()

    def sign(self) -> None:
        """Rank 0 is at work."""
        self._signed_at = time.monotonic()

    def idle_s(self) -> float:
        """Seconds since a worker was at work; before the first is, since the launch."""
        return time.monotonic() - self._signed_at

    def drawn(self) -> bool:
        return self._drawn

    def fail(self, told: dict[str, str]) -> None:
        self._failed = self._failed or told

    def failed(self) -> dict[str, str] | None:
        return self._failed

    def say(self, said: Said) -> None:
        self._said = said

    def said(self) -> Said | None:
        return self._said


class Told:
    """Rank 0's side, in place of a Progress: it says no more than a driver draws.

    Args:
        say: takes what there is to say, and waits for no answer.
    """

    def __init__(self, say: Callable[[Said], object], total_samples: int, description: str, start_samples: int) -> None:
        self._say = say
        self._run = {"total_samples": total_samples, "description": description, "start_samples": start_samples}
        self._unsaid: Said | None = None
        self._said_at = -_TOLD_EVERY_S

    def update(self, samples: int, **figures: Any) -> None:
        """As Progress.update."""
        self._unsaid = self._run | {"samples": samples, "figures": figures}
        if time.monotonic() - self._said_at >= _TOLD_EVERY_S:
            self.close()

    def close(self) -> None:
        """Say what is left to say."""
        if self._unsaid is not None:
            self._say(self._unsaid)
            self._unsaid, self._said_at = None, time.monotonic()


@contextlib.contextmanager
def at_work(sign: Callable[[], object]) -> Iterator[None]:
    """A sign every second, from a thread of its own, while what is within lasts. `sign` gives it, and waits for no answer."""
    over = threading.Event()

    def go_on() -> None:
        sign()
        while not over.wait(_SIGN_EVERY_S):
            sign()

    thread = threading.Thread(target=go_on, name="at-work", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def draw(ask: Callable[[], Said | None], over: threading.Event) -> None:
    """Draw what a board says until it is over, and the last word once more. `ask` gives None where nothing is known."""
    shown: Progress | None = None
    before: Said | None = None
    ends = False
    while not ends:
        ends = over.wait(_ASKED_EVERY_S)
        said = ask()
        if said is None or said == before:
            continue
        before = said
        if shown is None:
            shown = Progress.begin(said["total_samples"], said["description"], said["start_samples"])
        shown.update(said["samples"], **said["figures"])
    if shown is not None:
        shown.close()
