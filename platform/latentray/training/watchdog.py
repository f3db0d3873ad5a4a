"""Signs of life between the ranks of an attempt, and what is done when one of them stands still.

Every second a rank says in which step its loop is, in a small store of the attempt's own that rank 0 serves. Rank 0 reads
what all said and judges; the others read its sign and its verdict, so that the traffic grows with the ranks and not with
their square. Where one hangs, every rank that lives saves its stacks, the one that is stopped is ended where it is on this
node, and the process ends: the workers start again from the last checkpoint, or torchrun does it.

One thread talks to the store, which may never answer; another one judges, and waits for nobody.
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
from collections.abc import Callable, Mapping
from pathlib import Path

import torch.distributed as dist

from latentray.checkpoint import store
from latentray.config.faults import FaultsConfig
from latentray.training import policies
from latentray.training.policies import Beat, Hang
from latentray.training.state import Worker

_EVERY_S = 1.0
_TURN_S = 3 * _EVERY_S
"""The most that a turn of the judging thread counts for: in what is beyond it the process did not run."""
_ANSWER_S = 5.0
_CONNECT_S = 60.0
_TELL_S = 3.0
"""Rank 0 serves its verdict for so long before it ends."""
_UPLOAD_S = 10.0
_VERDICT = "verdict"
_LOST = (RuntimeError, ConnectionError)
"""What the store raises where rank 0 is silent or gone (dist.DistError is a RuntimeError)."""
EXIT_CODE = 75
"""Of a process that ended itself because the attempt hung (EX_TEMPFAIL: trying again may help)."""


@dataclasses.dataclass(frozen=True)
class Heard:
    """The last sign of life of a rank that differed from the one before, and when it came, on the reader's own clock."""

    text: str
    at: float


def beats(heard: Mapping[int, Heard], *, answered: float, now: float) -> dict[int, Beat]:
    """The signs as beats, without those of ranks that are done. All times are of the reader's clock.

    Args:
        answered: when the store answered last. Since then it is rank 0, which serves it, that is silent; of the others
            nothing was to be heard.
    """
    found = {}
    for rank, one in heard.items():
        about = json.loads(one.text)
        if about.pop("over", False):
            continue
        about.pop("count")
        found[rank] = Beat(rank=rank, silent_s=(now if rank == 0 else answered) - one.at, **about)
    return found


class Watchdog:
    """Watches the ranks of one attempt. The loop says where it is with `at`; everything else happens in threads."""

    def __init__(self, worker: Worker, faults: FaultsConfig) -> None:
        """Collective."""
        self.worker, self.faults = worker, faults
        self._at = (-1, False, 0.0)
        self._heard: dict[int, Heard] = {}
        self._verdict: Hang | None = None
        self._count = 0
        self._awake = self._answered = 0.0
        """Seconds that this process ran for, and how many of them when the store answered last: a machine that was paused
        has heard nothing and done nothing meanwhile, and that is nobody's fault."""
        self._done = threading.Event()
        self._store, self._where = _shared_store(worker)
        self._store.set(_key(worker.rank), self._sign())  # who is stopped before the first turn is missed, too
        self._read = range(worker.world) if worker.leads else range(1)
        self._talking = threading.Thread(target=self._talk, name="watchdog-signs", daemon=True)
        self._judging = threading.Thread(target=self._judge, name="watchdog", daemon=True)
        self._talking.start()
        self._judging.start()

    def at(self, step: int, *, watched: bool = True) -> None:
        """The loop is in this step now; with `watched=False` at something that may take long."""
        self._at = (step, watched, self._awake)

    def close(self) -> None:
        """The attempt ends; the others are told, and do not miss this rank."""
        self._done.set()
        self._judging.join()
        self._talking.join(timeout=_ANSWER_S)

    # ---- the thread that talks

    def _talk(self) -> None:
        while not self._done.wait(_EVERY_S):
            try:
                self._store.set(_key(self.worker.rank), self._sign())
                texts = self._store.multi_get([*map(_key, self._read), _VERDICT])
            except _LOST:
                self._connect_again()
                continue
            self._hear([text.decode() for text in texts])
        with contextlib.suppress(*_LOST):
            self._store.set(_key(self.worker.rank), json.dumps({"over": True}))

    def _sign(self) -> str:
        self._count += 1
        step, watched, since = self._at
        return json.dumps(
            {
                "host": socket.gethostname(),
                "pid": os.getpid(),
                "step": step,
                "in_step_s": self._awake - since,
                "watched": watched,
                "count": self._count,
            }
        )

    def _hear(self, texts: list[str]) -> None:
        *signs, verdict = texts
        now = self._awake
        for rank, text in zip(self._read, signs, strict=True):
            before = self._heard.get(rank)
            if text and (before is None or before.text != text):
                self._heard = self._heard | {rank: Heard(text, now)}
        self._answered = now
        if verdict:
            self._verdict = _from_json(verdict)

    def _connect_again(self) -> None:
        """An answer that comes too late would be taken for that of the next question."""
        if not self.worker.leads:
            with contextlib.suppress(*_LOST):
                self._store = _client(*self._where, patience_s=_ANSWER_S)

    # ---- the thread that judges

    def _judge(self) -> None:
        before = time.monotonic()
        while not self._done.wait(_EVERY_S):
            now = time.monotonic()
            self._awake += min(now - before, _TURN_S)
            before = now
            found = self._verdict or self._found()
            if found is not None:
                self._end(found)

    def _found(self) -> Hang | None:
        seen = beats(self._heard, answered=self._answered, now=self._awake)
        if self.worker.leads:
            return policies.hang(seen, self.faults)
        return policies.silent(seen, self.faults)  # only rank 0 sees who holds the others up

    def _end(self, found: Hang) -> None:
        print(f"hang: {found}; the workers start again", flush=True)
        told = time.monotonic()
        if self.worker.leads:
            _within(_TELL_S, lambda: self._store.set(_VERDICT, _to_json(found)))
        self._save_stacks(found)
        if self.worker.leads:
            time.sleep(max(told + _TELL_S - time.monotonic(), 0.0))
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
            _within(_UPLOAD_S, lambda: self._upload(path, where))  # a store that is out must not keep it from ending

    def _upload(self, path: Path, where: str) -> None:
        try:
            store.upload(path, where)
            print(f"stacks of rank {self.worker.rank}: {where}", flush=True)
        except Exception as error:  # whatever it is, it is told
            print(f"stacks of rank {self.worker.rank} could not be saved: {error}", flush=True)


def _within(seconds: float, job: Callable[[], None]) -> None:
    """Do it, and wait no longer than so."""
    doing = threading.Thread(target=job, daemon=True)
    doing.start()
    doing.join(timeout=seconds)


def _to_json(found: Hang) -> str:
    return json.dumps(dataclasses.asdict(found))


def _from_json(text: str) -> Hang:
    about = json.loads(text)
    return Hang(beat=Beat(**about["beat"]), silent=about["silent"])


def _key(rank: int) -> str:
    return f"beat/{rank}"


def _client(host: str, port: int, *, patience_s: float) -> dist.TCPStore:
    """A connection to the store."""
    made = dist.TCPStore(host, port, None, False, datetime.timedelta(seconds=patience_s), wait_for_workers=False)
    made.set_timeout(datetime.timedelta(seconds=_ANSWER_S))
    return made


def _shared_store(worker: Worker) -> tuple[dist.TCPStore, tuple[str, int]]:
    """A store of this attempt's own, served by rank 0, and where it is. Collective."""
    where: list[tuple[str, int]] = [("", 0)]
    served: dist.TCPStore | None = None
    if worker.leads:
        host = os.environ.get("MASTER_ADDR") or "127.0.0.1"
        patience = datetime.timedelta(seconds=_ANSWER_S)
        served = dist.TCPStore(host, 0, None, True, patience, wait_for_workers=False)
        names = [*map(_key, range(worker.world)), _VERDICT]
        served.multi_set(names, [""] * len(names))  # asked for together, they must all be there
        where = [(host, served.port)]
    dist.broadcast_object_list(where, src=0)
    return served or _client(*where[0], patience_s=_CONNECT_S), where[0]
