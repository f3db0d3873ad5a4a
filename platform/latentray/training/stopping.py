"""Asking a run to stop: by a signal to a worker, or, where the workers are elsewhere, by a file in the run's folder."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from latentray.checkpoint import store

REQUEST = "stop.json"
_EVERY_S = 2.0


class Stop:
    """Whether this worker was asked to stop: by SIGTERM, or on rank 0 by the file that `request` writes."""

    def __init__(self, out: str, *, leads: bool) -> None:
        self._out, self._leads = out, leads
        self._asked = threading.Event()
        self._looked = 0.0
        self._began = time.time()

    @property
    def asked(self) -> bool:
        return self._asked.is_set()

    def poll(self) -> None:
        """Look for the file, now and then; called by a thread of its own."""
        now = time.monotonic()
        if not self._leads or self.asked or now - self._looked < _EVERY_S:
            return
        self._looked = now
        if requested(self._out):
            self._asked.set()

    @contextmanager
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
