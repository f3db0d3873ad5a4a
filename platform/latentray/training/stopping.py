"""Asking a run to stop: by a signal to a worker, or, where the workers are elsewhere, by a file in the run's folder.

A driver that is asked hands it on by that file, and ends by itself where no worker is there to hear of it.
"""

from __future__ import annotations

import _thread
import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

from latentray.checkpoint import store

REQUEST = "stop.json"
PATIENCE_S = 8.0
"""Where no worker has been at work for so long, none will save anything within the time that a run has to end."""
_EVERY_S = 2.0
_LOOK_S = 0.2


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


@contextlib.contextmanager
def handed_on(out: str, idle_s: Callable[[], float | None]) -> Iterator[threading.Event]:
    """SIGTERM to a driver asks the workers to save a checkpoint and end, upon which what is within comes back by itself; where
    none is at work it would wait for them for ever, and is left. Gives whether the driver was asked.

    Only a main thread hears signals; elsewhere nothing changes.

    Args:
        idle_s: for how long no worker was at work, seconds; None where that cannot be told now.
    """
    asked, over, alone = threading.Event(), threading.Event(), threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def heard(number: int, frame: FrameType | None) -> None:
        asked.set()
        if alone.is_set() and not over.is_set():
            over.set()
            raise KeyboardInterrupt  # of all exceptions the one that gets out of Ray's waiting

    thread = threading.Thread(target=_hand_on, args=(out, idle_s, asked, over, alone), name="stop-driver", daemon=True)
    before = signal.signal(signal.SIGTERM, heard)
    thread.start()
    try:
        yield asked
    except KeyboardInterrupt:
        if not alone.is_set():
            raise
    finally:
        over.set()
        thread.join(5 * _LOOK_S)  # it may wait for the store, but interrupts nobody any more
        signal.signal(signal.SIGTERM, before)


def _hand_on(
    out: str,
    idle_s: Callable[[], float | None],
    asked: threading.Event,
    over: threading.Event,
    alone: threading.Event,
) -> None:
    while not asked.is_set():
        if over.wait(_LOOK_S):
            return
    threading.Thread(target=_request, args=(out,), name="stop-request", daemon=True).start()
    while not over.wait(_LOOK_S):
        idle = idle_s()
        if idle is not None and idle > PATIENCE_S and not over.is_set():
            print("no worker is at work: there is nothing to save", flush=True)
            alone.set()
            _thread.interrupt_main(signal.SIGTERM)
            return


def _request(out: str) -> None:
    try:
        request(out)
    except OSError as error:  # of a store that is out: the workers cannot save there either
        print(f"the workers could not be asked to stop: {error}", flush=True)


def request(out: str) -> None:
    """Ask the run in this folder to stop at its next step, with a checkpoint."""
    store.write_json(store.join(out, REQUEST), {"asked_at": time.time(), "by": os.getpid()})


def requested(out: str) -> bool:
    return store.exists(store.join(out, REQUEST))


def clear(out: str) -> None:
    """Forget what a run before was asked."""
    store.delete(store.join(out, REQUEST))
