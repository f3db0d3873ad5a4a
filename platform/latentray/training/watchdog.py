"""Signs of life between the ranks of an attempt, and what is done when one of them stands still.

A thread of each rank says every second or so in which step its loop is, through a small store of the attempt's own, and
reads what the others said. Where one hangs, every rank that lives saves its stacks, the one that is stopped is ended where
it is on this node, and the process ends: the workers start again from the last checkpoint, or torchrun does it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import faulthandler
import json
import os
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from latentray.checkpoint import store
from latentray.config.faults import FaultsConfig
from latentray.training import policies
from latentray.training.policies import Beat, Hang
from latentray.training.state import Worker

_EVERY_S = 1.0
_ANSWER_S = 5.0
EXIT_CODE = 75
"""Of a process that ended itself because the attempt hung (EX_TEMPFAIL: trying again may help)."""


@dataclasses.dataclass
class _Seen:
    text: str
    since: float


class Watchdog:
    """Watches the ranks of one attempt. The loop says where it is with `at`; everything else happens in a thread."""

    def __init__(self, worker: Worker, faults: FaultsConfig, *, poll: Callable[[], None] = lambda: None) -> None:
        """Collective. `poll` is called about every second, for what else needs a look now and then."""
        self.worker, self.faults, self._poll = worker, faults, poll
        self._step, self._watched, self._since = -1, False, time.monotonic()
        self._seen: dict[int, _Seen] = {}
        self._beats: dict[int, Beat] = {}
        self._count = 0
        self._done = threading.Event()
        self._store = _shared_store(worker)
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self._thread.start()

    def at(self, step: int, *, watched: bool = True) -> None:
        """The loop is in this step now; with `watched=False` at something that may take long."""
        self._step, self._watched, self._since = step, watched, time.monotonic()

    def close(self) -> None:
        """The attempt ends; the others are told, and do not miss this rank."""
        self._done.set()
        self._thread.join(timeout=2 * _ANSWER_S)

    def _run(self) -> None:
        while not self._done.wait(_EVERY_S):
            self._poll()
            try:
                self._store.set(_key(self.worker.rank), self._sign())
                self._read()
            except (RuntimeError, ConnectionError, dist.DistError):  # the store is rank 0's: it is silent, or gone
                self._missed(0)
            found = policies.hang(self._beats, self.faults)
            if found is not None:
                self._end(found)
        try:
            self._store.set(_key(self.worker.rank), json.dumps({"over": True}))
        except (RuntimeError, ConnectionError, dist.DistError):
            return

    def _sign(self) -> str:
        self._count += 1
        return json.dumps(
            {
                "host": socket.gethostname(),
                "pid": os.getpid(),
                "step": self._step,
                "in_step_s": time.monotonic() - self._since,
                "watched": self._watched,
                "count": self._count,
            }
        )

    def _read(self) -> None:
        for rank in range(self.worker.world):
            if not self._store.check([_key(rank)]):
                continue
            text, now = self._store.get(_key(rank)).decode(), time.monotonic()
            seen = self._seen.get(rank)
            if seen is None or seen.text != text:
                self._seen[rank] = seen = _Seen(text, now)
            about = json.loads(text)
            if about.pop("over", False):
                self._beats.pop(rank, None)
                continue
            about.pop("count")
            self._beats[rank] = Beat(rank=rank, silent_s=now - seen.since, **about)

    def _missed(self, rank: int) -> None:
        """No answer from where that rank's signs would come from."""
        seen, beat = self._seen.get(rank), self._beats.get(rank)
        if seen is not None and beat is not None and rank != self.worker.rank:
            self._beats[rank] = dataclasses.replace(beat, silent_s=time.monotonic() - seen.since)

    def _end(self, found: Hang) -> None:
        print(f"hang: {found}; the workers start again", flush=True)
        self._save_stacks(found)
        one = found.beat
        if found.silent and one.host == socket.gethostname() and one.pid != os.getpid():
            with contextlib.suppress(ProcessLookupError):
                os.kill(one.pid, signal.SIGKILL)  # a stopped process obeys nothing else, and would keep its GPU
        os._exit(EXIT_CODE)

    def _save_stacks(self, found: Hang) -> None:
        where = store.join(self.worker.out, "stacks", f"{self.worker.attempt}-rank_{self.worker.rank:05d}.txt")
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "stacks.txt"
            with path.open("w") as file:
                file.write(f"{datetime.datetime.now(datetime.UTC).isoformat()} {found}\n\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
            try:
                store.upload(path, where)
                print(f"stacks of rank {self.worker.rank}: {where}", flush=True)
            except Exception as error:  # whatever it is, the process must still end
                print(f"stacks of rank {self.worker.rank} could not be saved: {error}", flush=True)


def _key(rank: int) -> str:
    return f"beat/{rank}"


def _shared_store(worker: Worker) -> dist.TCPStore:
    """A store of this attempt's own, served by rank 0. Collective."""
    timeout = datetime.timedelta(seconds=_ANSWER_S)
    where: list[tuple[str, int]] = [("", 0)]
    served: dist.TCPStore | None = None
    if worker.leads:
        host = os.environ.get("MASTER_ADDR") or "127.0.0.1"
        served = dist.TCPStore(host, 0, None, True, timeout, wait_for_workers=False)
        where = [(host, served.port)]
    dist.broadcast_object_list(where, src=0)
    host, port = where[0]
    return served or dist.TCPStore(host, port, None, False, datetime.timedelta(seconds=60), wait_for_workers=False)
