"""Asking a run to stop: by a signal to a worker, or, where the workers are elsewhere, by a file in the run's folder."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

from latentray.checkpoint import store

REQUEST = "stop.json"
_EVERY_S = 2.0


class Stop:
    """Whether this worker was asked to stop: by SIGTERM, or on rank 0 by the file that `request` writes.

    The file is looked for by a thread of its own: a store that is slow or out holds up neither a step nor a sign of life.
    """

    def __init__(self, out: str, *, leads: bool) -> None:
        self._out = out
        self._asked, self._over = threading.Event(), threading.Event()
        if leads:
            threading.Thread(target=self._look, name="stop-request", daemon=True).start()

    @property
    def asked(self) -> bool:
        return self._asked.is_set()

    def close(self) -> None:
        """Look no longer."""
        self._over.set()

    def _look(self) -> None:
        while not self._over.wait(_EVERY_S) and not self.asked:
            with contextlib.suppress(OSError):  # of a store that is out; it is asked again
                if requested(self._out):
                    self._asked.set()

    @contextlib.contextmanager
    def on_signal(self) -> Iterator[None]:
        """SIGTERM to this process asks it to stop. Only a main thread hears signals; elsewhere nothing changes."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGTERM, self._heard)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def _heard(self, number: int, frame: FrameType | None) -> None:
        self._asked.set()


def request(out: str) -> None:
    """Ask the run in this folder to stop at its next step, with a checkpoint."""
    store.write_json(store.join(out, REQUEST), {"asked_at": time.time(), "by": os.getpid()})


def requested(out: str) -> bool:
    return store.exists(store.join(out, REQUEST))


def clear(out: str) -> None:
    """Forget what a run before was asked."""
    store.delete(store.join(out, REQUEST))
