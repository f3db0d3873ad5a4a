"""One thread that writes what the loop has copied, while the loop goes on."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Writer:
    """Runs one job at a time. A job that fails is told, and counted until one succeeds; training goes on meanwhile."""

    def __init__(self) -> None:
        self.failures = 0
        """Jobs in a row that failed."""
        self._thread: threading.Thread | None = None

    def start(self, job: Callable[[], None]) -> None:
        """Begin a job, once the one before has ended."""
        self.wait()
        self._thread = threading.Thread(target=self._run, args=(job,), name="checkpoint-writer", daemon=True)
        self._thread.start()

    def wait(self, seconds: float | None = None) -> bool:
        """Until no job runs, or for so many seconds; whether none runs."""
        if self._thread is not None:
            self._thread.join(seconds)
            if self._thread.is_alive():
                return False
            self._thread = None
        return True

    def _run(self, job: Callable[[], None]) -> None:
        try:
            job()
            self.failures = 0
        except Exception as error:
            self.failures += 1
            print(f"checkpoint failed ({self.failures} in a row): {error}", flush=True)
