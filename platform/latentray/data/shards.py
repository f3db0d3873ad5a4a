"""Indexed data sets: WebDataset tars, and an index that finds, checks and counts every sample without a scan.

Layout of the artifact (kind `dataset` or `latents`): `00000.tar`, `00001.tar`, ..., `index.arrow`, `manifest.json`.
The tars are plain USTAR that any WebDataset reader takes, equal bytes for equal samples. The index is `index.py`'s.

Damaged tars lose samples silently in tar readers; here a read is a byte range whose CRC-32C must match.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import functools
import os
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pyarrow as pa
import webdataset

from latentray.checkpoint import manifest, store
from latentray.data import index, members, tars
from latentray.data.blocks import BlockCache
from latentray.errors import DigestMismatch, StorageFailed

CACHE_BYTES = 64 << 30
_OPEN_FILES = 64
_HASH_BYTES = 8 << 30
_FETCHERS = 8
_TOGETHER = 4
"""Neighbouring blocks of a remote shard that one request asks for, at most."""
_MEND = "Restore the file from a good copy, or build the data set again."


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
    """One sample to be written."""

    key: str
    """Unique in its data set; no dot in its last part, where WebDataset splits names."""
    members: dict[str, bytes]
    """Extension -> content."""
    columns: dict[str, Any] = dataclasses.field(default_factory=dict)
    """What the index records of this sample beyond its place: equal names in every sample of a data set."""


def shard_name(number: int) -> str:
    return f"{number:05d}.tar"


def write_shard(samples: Iterable[Sample], path: Path) -> index.ShardResult:
    """Write one tar, of deterministic bytes, and return its entry and index rows.

    Raises UnsafeMember for a member name that no reader of ours would take.
    """
    rows: list[dict[str, Any]] = []
    with open(path, "wb") as file, webdataset.TarWriter(file, encoder=False, mtime=0, user="", group="") as writer:
        writer.tarstream.format = tarfile.USTAR_FORMAT  # TarWriter's own argument for it has no effect
        for sample in samples:
            for extension in sample.members:
                key, _ = members.split_name(f"{sample.key}.{extension}", shard=path.name)
                assert key == sample.key, f"{sample.key}: WebDataset splits names at the first dot"
            assert not index.PLACE & sample.columns.keys(), f"{sample.key}: a column hides where the sample is"
            start = writer.tarstream.offset
            writer.write({"__key__": sample.key, **sample.members})
            rows.append(
                {"key": sample.key, "offset": start, "length": writer.tarstream.offset - start, **sample.columns}
            )
    with open(path, "rb") as written:
        for row in rows:
            row["crc32c"] = google_crc32c.value(os.pread(written.fileno(), row["length"], row["offset"]))
    entry = index.ShardEntry(name=path.name, sha256=store.sha256_of(path), bytes=path.stat().st_size, count=len(rows))
    return index.ShardResult.of(entry, rows)


class IndexedShards:
    """Random access to the samples of an indexed data set; sample x is row x of its index.

    Opening reads manifest and index, never the shards. Local shards are read in place, remote ones by ranges through this
    node's bounded cache of blocks. It can be pickled: another process opens its own file handles. One object serves one
    thread; only `load` may be called by others.
    """

    def __init__(self, uri: str, listing: manifest.Manifest, opened: index.Index, blocks: BlockCache):
        self.uri, self.manifest, self.index, self.blocks = uri, listing, opened, blocks
        self.shards = opened.shards
        self._files: collections.OrderedDict[int, int] = collections.OrderedDict()
        self._paths: dict[int, Path] = {}

    @classmethod
    def open(
        cls, uri: str | Path, kind: str = "dataset", *, cache_bytes: int = CACHE_BYTES, budget_s: float = 120.0
    ) -> IndexedShards:
        """Open the data set at a URI.

        Args:
            cache_bytes: the most that this node keeps of remote shards.
            budget_s: how long a range of a remote shard is tried for.

        Raises InputMissing without a manifest, ArtifactError for another kind or index version, DigestMismatch where
        index and manifest disagree or the index was damaged.
        """
        members.check_url(str(uri))
        where = store.absolute(uri)
        listing = manifest.read(where, kind=kind)
        blocks = BlockCache(store.cache_dir() / "blocks", capacity_bytes=cache_bytes, budget_s=budget_s)
        opened = cls(where, listing, index.Index.open(where, listing), blocks)
        for entry in opened.shards:
            listed = listing.files.get(entry.name)
            if not entry.uri and (listed is None or listed.sha256 != entry.sha256):
                raise DigestMismatch(
                    "The index and the manifest disagree about a shard.",
                    where=store.join(where, entry.name),
                    mend=_MEND,
                )
        return opened

    @property
    def count(self) -> int:
        """Number of samples."""
        return self.index.count

    @property
    def digest(self) -> str:
        """sha256 of the index: it covers every sample's bytes by its CRC-32C and every shard's by its sha256."""
        return self.manifest.files[index.NAME].sha256

    @functools.cached_property
    def is_remote(self) -> bool:
        """Whether any shard is read over a network."""
        return any(store.is_remote(index.shard_uri(self.uri, entry)) for entry in self.shards)

    def column(self, name: str) -> pa.ChunkedArray:
        """A column of the index (`key`, `sha256`, `width`, ...), one value per sample."""
        return self.index.table[name]

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the index's columns."""
        return tuple(self.index.table.column_names)

    def key(self, x: int) -> str:
        return self.index.table["key"][x].as_py()

    def locate(self, x: int) -> tuple[index.ShardEntry, int, int]:
        """The shard of sample x, and the offset and length in bytes of its range there."""
        number, offset, length, _ = self.index.locate(x)
        return self.shards[number], offset, length

    def read(self, x: int) -> dict[str, Any]:
        """Sample x as a raw WebDataset sample: `__key__`, `__url__` and extension -> bytes.

        Raises DigestMismatch naming shard and key where the bytes differ from the index, UnsafeMember for a member that
        is not decoded, StorageFailed where a remote shard cannot be read.
        """
        number, offset, length, crc32c = self.index.locate(x)
        where = index.shard_uri(self.uri, self.shards[number])
        data = self._bytes(number, offset, length)
        if not _matches(data, length, crc32c) and self._is_cached(number):
            self.blocks.forget(where, offset, length)  # the cache's disk may be at fault, not the shard
            data = self._bytes(number, offset, length)
        if not _matches(data, length, crc32c):
            raise DigestMismatch(
                f"The sample {self.key(x)!r} differs from the index: the shard was damaged or cut.",
                where=where,
                mend=_MEND,
            )
        return {"__key__": self.key(x), "__url__": where} | tars.contents(data, shard=where)[1]

    def read_into(self, buffer: np.ndarray, shard: int, offset: int) -> None:
        """Fill uint8 (length,) with a shard's bytes, unchecked; what a cut or missing shard has not got stays as it is."""
        handle = self._files.get(shard)  # the quick way: this is called for every sample of a training step
        if handle is not None:
            os.preadv(handle, (buffer.data,), offset)
            return
        try:
            data = self._bytes(shard, offset, len(buffer))
        except DigestMismatch:
            return
        buffer[: len(data)] = np.frombuffer(data, np.uint8)

    def verify(self, *, hash_bytes: int = _HASH_BYTES) -> None:
        """Check every shard's existence and size, and the sha256 of local ones up to `hash_bytes`, spread evenly.

        Raises DigestMismatch naming the shard. A remote shard's sha256 is checked when it is fetched whole, and every
        sample's CRC-32C whenever it is read: hashing here only finds damage before a cluster starts.
        """
        share = min(1.0, hash_bytes / max(sum(entry.bytes for entry in self.shards), 1))
        for number, entry in enumerate(self.shards):
            where = index.shard_uri(self.uri, entry)
            filesystem, path = store.filesystem(where)
            info = filesystem.get_file_info(path)
            if not info.is_file:
                raise _missing(where)
            if info.size != entry.bytes:
                raise DigestMismatch(
                    f"A shard has {info.size} bytes; the index says {entry.bytes}.", where=where, mend=_MEND
                )
            if not store.is_remote(where) and int((number + 1) * share) > int(number * share):
                self.fetch(number)

    def load(self, x: int) -> None:
        """Bring sample x into this node's cache, where its shard is remote. Any thread may call it."""
        number, offset, length, _ = self.index.locate(x)
        if self._is_cached(number):
            self._bytes(number, offset, length)

    def load_all(self, xs: Sequence[int]) -> None:
        """Bring samples into this node's cache, where their shards are remote: neighbours together, others side by side.

        Raises StorageFailed; damage is found where a sample is read.
        """
        if not self.is_remote:
            return
        block = self.blocks.block
        wanted = {
            (one.shard, number)
            for one in self.index.locate_all(xs)
            if self._is_cached(one.shard)
            for number in range(one.offset // block, (one.offset + max(one.length, 1) - 1) // block + 1)
        }
        with concurrent.futures.ThreadPoolExecutor(_FETCHERS) as pool:
            loads = [
                pool.submit(self._bytes, shard, run.start * block, len(run) * block)
                for shard, run in _runs(sorted(wanted))
            ]
        for failed in (load.exception() for load in loads):
            if isinstance(failed, StorageFailed):
                raise failed

    def fetch(self, number: int) -> None:
        """Take a whole shard to this node, its sha256 checked; its samples are read from there."""
        entry = self.shards[number]
        where = index.shard_uri(self.uri, entry)
        path = store.fetch(where, sha256=entry.sha256)
        got = store.sha256_of(path)
        if got != entry.sha256:
            raise DigestMismatch(
                f"A shard differs from the index: sha256 {got[:12]}, recorded {entry.sha256[:12]}.",
                where=where,
                mend=_MEND,
            )
        self._paths[number] = path

    def close(self) -> None:
        """Close all file handles; reading opens them again."""
        while self._files:
            os.close(self._files.popitem()[1])

    def _is_cached(self, number: int) -> bool:
        """True for a remote shard that is read by ranges."""
        return number not in self._paths and store.is_remote(index.shard_uri(self.uri, self.shards[number]))

    def _bytes(self, number: int, offset: int, length: int) -> bytes:
        if not self._is_cached(number):
            return os.pread(self._open(number), length, offset)
        entry = self.shards[number]
        where = index.shard_uri(self.uri, entry)
        try:
            return self.blocks.read(where, entry.bytes, offset, length)
        except FileNotFoundError:
            raise _missing(where) from None
        except EOFError as error:
            raise DigestMismatch(
                f"The shard was cut: {error}; the index says {entry.bytes}.", where=where, mend=_MEND
            ) from None
        except OSError as error:
            raise StorageFailed(
                f"The shard could not be read for {self.blocks.budget_s:g} s: {error}",
                where=where,
                mend="Check the network and the credentials, or raise fetch.budget_s; then resume the run.",
            ) from None

    def _open(self, number: int) -> int:
        """The file descriptor of a local shard, from a least-recently-used cache."""
        if number in self._files:
            self._files.move_to_end(number)
            return self._files[number]
        where = index.shard_uri(self.uri, self.shards[number])
        path = self._paths.get(number) or store.local_path(where)
        try:
            handle = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            raise _missing(where) from None
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_RANDOM)  # read-ahead would fetch many times what is used
        self._files[number] = handle
        if len(self._files) > _OPEN_FILES:
            os.close(self._files.popitem(last=False)[1])
        return handle

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_files": collections.OrderedDict(), "_paths": {}}

    def __del__(self) -> None:
        if "_files" in self.__dict__:
            self.close()


def _runs(places: Sequence[tuple[int, int]]) -> Iterator[tuple[int, range]]:
    """Ascending (shard, block) as neighbours of one shard, a few at a time."""
    first = 0
    for i in range(1, len(places) + 1):
        shard, block = places[first]
        if i == len(places) or places[i] != (shard, block + i - first) or i - first == _TOGETHER:
            yield shard, range(block, block + i - first)
            first = i


def _matches(data: bytes, length: int, crc32c: int) -> bool:
    return len(data) == length and google_crc32c.value(data) == crc32c


def _missing(where: str) -> DigestMismatch:
    return DigestMismatch("A shard of the data set is missing.", where=where, mend=_MEND)
