"""Byte ranges of remote shards, read through a bounded cache of blocks on this node's disk.

A range is read in blocks of a fixed size; missing neighbours come in one ranged GET, are kept as files, and the least
recently used go when the cache is full. All processes of a node share the cache: a block appears by rename, and one that
another process evicted is fetched again. So a second epoch, and a second rank, read from the disk.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import os
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import tenacity

from latentray.data import ranges
from latentray.records import Traffic

BLOCK_BYTES = 1 << 20
_EVICT_EVERY = 64
"""Blocks written between two looks at the cache's size."""
_EVICT_TO = 0.9
"""Share of the capacity that an eviction leaves."""

Read = Callable[[str, int, int], bytes]
"""(URI, offset, length) -> bytes: one ranged GET."""


class BlockCache:
    """Ranges of remote files, through blocks in `folder`. Threads may share one object, processes one folder.

    Args:
        capacity_bytes: the most that the folder holds, but for what is written between two looks at it.
        budget_s: how long a range is tried for, with exponentially growing, jittered pauses, before its error is raised.
    """

    def __init__(
        self,
        folder: Path,
        *,
        capacity_bytes: int,
        budget_s: float = 120.0,
        block_bytes: int = BLOCK_BYTES,
        read: Read = ranges.read_range,
    ) -> None:
        self.folder, self.capacity, self.budget_s, self.block = folder, capacity_bytes, budget_s, block_bytes
        self._read = read
        self._lock = threading.Lock()
        self._fetching: set[tuple[str, int]] = set()
        self._fetched = threading.Condition()
        self._traffic = Traffic()
        self._written = 0
        self._given_up: OSError | None = None

    def read(self, uri: str, size: int, offset: int, length: int) -> bytes:
        """`length` bytes at `offset` of a file of `size` bytes; fewer where it ends before.

        Raises FileNotFoundError where the file is not there, EOFError where it is shorter than `size`, OSError where it
        could not be read within the budget.
        """
        end = min(offset + length, size)
        if end <= offset:
            return b""
        wanted = range(offset // self.block, (end - 1) // self.block + 1)
        blocks = {number: self._cached(uri, number) for number in wanted}
        if None in blocks.values():
            with self._alone(uri, [number for number, data in blocks.items() if data is None]):
                blocks = {number: data or self._cached(uri, number) for number, data in blocks.items()}
                for run in _runs([number for number, data in blocks.items() if data is None]):
                    blocks |= self._fetch(uri, size, run)
        joined = b"".join(blocks[number] or b"" for number in wanted)
        return joined[offset - wanted.start * self.block : end - wanted.start * self.block]

    def forget(self, uri: str, offset: int, length: int) -> None:
        """Drop the blocks of a range: what they hold turned out to be wrong."""
        for number in range(offset // self.block, (offset + max(length, 1) - 1) // self.block + 1):
            self._path(uri, number).unlink(missing_ok=True)

    def __reduce__(self) -> tuple[Any, ...]:
        make = functools.partial(
            BlockCache,
            self.folder,
            capacity_bytes=self.capacity,
            budget_s=self.budget_s,
            block_bytes=self.block,
            read=self._read,
        )
        return make, ()

    def traffic(self) -> Traffic:
        """What reading cost since the last call."""
        with self._lock:
            found, self._traffic = self._traffic, Traffic()
        return found

    def _path(self, uri: str, number: int) -> Path:
        return self.folder / _folder_of(uri) / f"{number}-{self.block}"

    def _cached(self, uri: str, number: int) -> bytes | None:
        path = self._path(uri, number)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
        with contextlib.suppress(FileNotFoundError):
            os.utime(path)  # what was used last goes last
        with self._lock:
            self._traffic.cached_bytes += len(data)
        return data

    @contextlib.contextmanager
    def _alone(self, uri: str, numbers: list[int]) -> Iterator[None]:
        """No other thread fetches these blocks meanwhile; who waited for one that did finds them in the folder."""
        wanted = {(uri, number) for number in numbers}
        with self._fetched:
            self._fetched.wait_for(lambda: not wanted & self._fetching)
            self._fetching |= wanted
        try:
            yield
        finally:
            with self._fetched:
                self._fetching -= wanted
                self._fetched.notify_all()

    def _fetch(self, uri: str, size: int, run: range) -> dict[int, bytes | None]:
        start = run.start * self.block
        length = min(run.stop * self.block, size) - start
        if self._given_up is not None:
            raise self._given_up
        attempts = 0
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception(
                lambda e: isinstance(e, OSError) and not isinstance(e, FileNotFoundError)
            ),
            wait=tenacity.wait_random_exponential(multiplier=0.1, max=10.0),
            stop=tenacity.stop_after_delay(self.budget_s),
            reraise=True,
        )
        try:
            for attempt in retrying:
                with attempt:
                    attempts += 1
                    data = self._read(uri, start, length)
                    if len(data) != length:
                        raise OSError(f"{uri}: {len(data)} of {length} bytes came")
        except FileNotFoundError:
            raise
        except OSError as error:
            self._given_up = error  # those that wait for their turn need not try as long again
            raise
        with self._lock:
            self._traffic.fetched_bytes += length
            self._traffic.retries += attempts - 1
        found: dict[int, bytes | None] = {}
        for number in run:
            part = data[number * self.block - start : (number + 1) * self.block - start]
            self._keep(self._path(uri, number), part)
            found[number] = part
        return found

    def _keep(self, path: Path, data: bytes) -> None:
        if len(data) > self.capacity:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{uuid.uuid4().hex}.partial")
        try:
            partial.write_bytes(data)
            partial.replace(path)
        except OSError:  # a full disk must not end a run that can read over the network
            partial.unlink(missing_ok=True)
            return
        with self._lock:
            self._written += 1
            due = self._written % min(_EVICT_EVERY, max(self.capacity // (4 * self.block), 1)) == 0
        if due:
            self.evict()

    def evict(self) -> None:
        """Remove the least recently used blocks until the folder is below its capacity. One process at a time does it."""
        with open(self.folder / ".lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return
            held = []
            for path in self.folder.glob("*/*"):
                with contextlib.suppress(FileNotFoundError):
                    about = path.stat()
                    held.append((about.st_mtime_ns, about.st_size, path))
            total = sum(size for _, size, _ in held)
            if total <= self.capacity:
                return
            for _, size, path in sorted(held, key=lambda one: one[0]):
                path.unlink(missing_ok=True)
                total -= size
                if total <= _EVICT_TO * self.capacity:
                    return


@functools.lru_cache(maxsize=65_536)
def _folder_of(uri: str) -> str:
    return hashlib.sha256(uri.encode()).hexdigest()[:24]


def _runs(numbers: list[int]) -> Iterator[range]:
    """Ascending numbers as ranges of neighbours."""
    start = 0
    for i in range(1, len(numbers) + 1):
        if i == len(numbers) or numbers[i] != numbers[i - 1] + 1:
            yield range(numbers[start], numbers[i - 1] + 1)
            start = i
