"""Tars read from front to back, some MiB at a time, from a disk or over a network: a shard is never in memory as a whole."""

from __future__ import annotations

import concurrent.futures
import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator

import tenacity

from latentray.checkpoint import store
from latentray.data import ranges
from latentray.data.blocks import BlockCache
from latentray.errors import SampleRejected, StorageFailed

STRETCH = 8 << 20
"""Bytes that are read at a time."""


class Tar:
    """A tar as `tars.walk` takes it, of which the two latest stretches are in memory."""

    def __init__(self, read: Callable[[int, int], bytes], size: int) -> None:
        self._read, self._size = read, size
        self._held: list[tuple[int, bytes]] = []

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, part: slice) -> bytes:
        start, stop, _ = part.indices(self._size)
        for begin, data in self._held:
            if begin <= start and stop <= begin + len(data):
                return data[start - begin : stop - begin]
        data = self._read(start, min(max(stop - start, STRETCH), self._size - start))
        if len(data) < stop - start:
            raise _missing("The shard became shorter while it was read.")
        self._held = [(start, data), *self._held[:1]]
        return data[: stop - start]

    def sha256(self) -> str:
        hashed = hashlib.sha256()
        for begin in range(0, self._size, STRETCH):
            hashed.update(self[begin : begin + STRETCH])
        return hashed.hexdigest()


def opened(uri: str, blocks: BlockCache) -> contextlib.AbstractContextManager[Tar]:
    """A tar at a URI. Opening and reading it raise SampleRejected, `missing`, where it is not there or no longer whole.

    And StorageFailed where a remote one cannot be read within the budget of `blocks`.
    """
    return _remote(uri, blocks) if store.is_remote(uri) else _local(uri)


@contextlib.contextmanager
def _local(uri: str) -> Iterator[Tar]:
    try:
        handle = os.open(store.local_path(uri), os.O_RDONLY)
    except FileNotFoundError:
        raise _missing("The shard is missing.") from None
    try:
        yield Tar(lambda offset, length: os.pread(handle, length, offset), os.fstat(handle).st_size)
    finally:
        os.close(handle)


@contextlib.contextmanager
def _remote(uri: str, blocks: BlockCache) -> Iterator[Tar]:
    """Through this node's cache of blocks, the next stretch being fetched meanwhile."""
    size = _size_at(uri, blocks.budget_s)
    with concurrent.futures.ThreadPoolExecutor(1) as ahead:

        def read(offset: int, length: int) -> bytes:
            data = _from(blocks, uri, size, offset, length)
            ahead.submit(blocks.read, uri, size, offset + length, STRETCH)  # what fails is met again where it is wanted
            return data

        yield Tar(read, size)


def _from(blocks: BlockCache, uri: str, size: int, offset: int, length: int) -> bytes:
    try:
        return blocks.read(uri, size, offset, length)
    except FileNotFoundError:
        raise _missing("The shard is missing.") from None
    except EOFError as error:
        raise _missing(f"The shard became shorter while it was read: {error}.") from None
    except OSError as error:
        raise _failed(uri, blocks.budget_s, error) from None


def _size_at(uri: str, budget_s: float) -> int:
    """Bytes of a remote file."""
    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception(lambda e: isinstance(e, OSError) and not isinstance(e, FileNotFoundError)),
        wait=tenacity.wait_random_exponential(multiplier=0.1, max=10.0),
        stop=tenacity.stop_after_delay(budget_s),
        reraise=True,
    )
    try:
        return retrying(ranges.size_of, uri)
    except FileNotFoundError:
        raise _missing("The shard is missing.") from None
    except OSError as error:
        raise _failed(uri, budget_s, error) from None


def _missing(what: str) -> SampleRejected:
    return SampleRejected("missing", what)


def _failed(uri: str, budget_s: float, error: OSError) -> StorageFailed:
    return StorageFailed(
        f"The shard could not be read for {budget_s:g} s: {error}",
        where=uri,
        mend="Check the network and the credentials, or raise fetch.budget_s; then resume the run.",
    )
