"""Indexed data sets: WebDataset tars, and an index that finds, checks and counts every sample without a scan.

Layout of the artifact (kind `dataset` or `latents`): `00000.tar`, `00001.tar`, ..., `index.parquet`, `manifest.json`.
The tars are plain USTAR that any WebDataset reader takes, equal bytes for equal samples. `index.parquet` has a row per
sample (key, shard number, byte range, CRC-32C of the range, and what columns the maker adds) and, in its schema's
metadata, an entry per shard (name, sha256, bytes, count).

Damaged tars lose samples silently in tar readers; here a read is a byte range whose CRC-32C must match.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import os
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import webdataset

from latentray.checkpoint import manifest, store
from latentray.data import members
from latentray.errors import ArtifactError, DigestMismatch

INDEX = "index.parquet"
INDEX_VERSION = 1
_SHARDS_KEY, _VERSION_KEY = b"latentray.shards", b"latentray.index_version"
_OPEN_FILES = 64
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardEntry:
    """What the index knows of a shard."""

    name: str
    sha256: str
    bytes: int
    count: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardResult:
    """A written shard, and the index rows of its samples in the order of their offsets."""

    entry: ShardEntry
    rows: list[dict[str, Any]]

    def to_dict(self) -> dict[str, Any]:
        return {"entry": dataclasses.asdict(self.entry), "rows": self.rows}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ShardResult:
        return cls(entry=ShardEntry(**values["entry"]), rows=values["rows"])


def shard_name(number: int) -> str:
    return f"{number:05d}.tar"


def write_shard(samples: Iterable[Sample], path: Path) -> ShardResult:
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
            start = writer.tarstream.offset
            writer.write({"__key__": sample.key, **sample.members})
            rows.append(
                {"key": sample.key, "offset": start, "length": writer.tarstream.offset - start, **sample.columns}
            )
    with open(path, "rb") as written:
        for row in rows:
            row["crc32c"] = google_crc32c.value(os.pread(written.fileno(), row["length"], row["offset"]))
    entry = ShardEntry(name=path.name, sha256=store.sha256_of(path), bytes=path.stat().st_size, count=len(rows))
    return ShardResult(entry=entry, rows=rows)


def write_index(results: Sequence[ShardResult], path: Path) -> None:
    """Write `index.parquet` of all shards, in canonical order: by shard name, then offset."""
    results = sorted(results, key=lambda r: r.entry.name)
    rows = [{"shard": number, **row} for number, result in enumerate(results) for row in result.rows]
    fixed = {"key": pa.string(), "shard": pa.int32(), "offset": pa.int64(), "length": pa.int64(), "crc32c": pa.uint32()}
    extra = [name for name in (rows[0] if rows else {}) if name not in fixed]
    columns = {name: pa.array([row[name] for row in rows], kind) for name, kind in fixed.items()}
    columns |= {name: pa.array([row[name] for row in rows]) for name in extra}
    entries = json.dumps([dataclasses.asdict(r.entry) for r in results], sort_keys=True)
    metadata = {_SHARDS_KEY: entries.encode(), _VERSION_KEY: str(INDEX_VERSION).encode()}
    pq.write_table(pa.table(columns).replace_schema_metadata(metadata), path, compression="zstd")


class IndexedShards:
    """Random access to the samples of an indexed data set; sample x is row x of its index.

    Opening reads manifest and index, never the shards. Local shards are read in place; remote ones are fetched whole,
    once per node, and their sha256 is checked then. It can be pickled: another process opens its own file handles. One
    object serves one thread.
    """

    def __init__(self, uri: str, listing: manifest.Manifest, table: pa.Table):
        self.uri, self.manifest = uri, listing
        self._table = table
        meta = table.schema.metadata or {}
        self.shards = tuple(ShardEntry(**entry) for entry in json.loads(meta[_SHARDS_KEY]))
        self._shard, self._offset, self._length, self._crc32c = (
            table[name].to_numpy() for name in ("shard", "offset", "length", "crc32c")
        )
        self._files: collections.OrderedDict[int, int] = collections.OrderedDict()
        self._paths: dict[int, Path] = {}

    @classmethod
    def open(cls, uri: str | Path, kind: str = "dataset") -> IndexedShards:
        """Open the data set at a URI.

        Raises InputMissing without a manifest, ArtifactError for another kind or index version, DigestMismatch where
        index and manifest disagree or the index was damaged.
        """
        members.check_url(str(uri))
        where = store.absolute(uri)
        listing = manifest.read(where, kind=kind)
        table = pq.read_table(manifest.fetch_file(where, INDEX, listing))
        version = (table.schema.metadata or {}).get(_VERSION_KEY, b"none").decode()
        if version != str(INDEX_VERSION):
            raise ArtifactError(
                f"The index has version {version}; this version of latentray reads {INDEX_VERSION}.",
                where=store.join(where, INDEX),
                mend="Build the data set again.",
            )
        opened = cls(where, listing, table)
        for entry in opened.shards:
            listed = listing.files.get(entry.name)
            if listed is None or listed.sha256 != entry.sha256:
                raise DigestMismatch(
                    "The index and the manifest disagree about a shard.",
                    where=store.join(where, entry.name),
                    mend=_MEND,
                )
        return opened

    @property
    def count(self) -> int:
        """Number of samples."""
        return len(self._shard)

    @property
    def digest(self) -> str:
        """sha256 of the index: it covers every sample's bytes by its CRC-32C and every shard's by its sha256."""
        return self.manifest.files[INDEX].sha256

    def column(self, name: str) -> pa.ChunkedArray:
        """A column of the index (`key`, `sha256`, `width`, ...), one value per sample."""
        return self._table[name]

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the index's columns."""
        return tuple(self._table.column_names)

    @property
    def shard_numbers(self) -> np.ndarray:
        """Shard number of each sample, int32 (count,): what a job that works shard by shard groups by."""
        return self._shard

    def key(self, x: int) -> str:
        return self._table["key"][x].as_py()

    def locate(self, x: int) -> tuple[ShardEntry, int, int]:
        """The shard of sample x, and the offset and length in bytes of its range there."""
        return self.shards[self._shard[x]], int(self._offset[x]), int(self._length[x])

    def read(self, x: int) -> dict[str, Any]:
        """Sample x as a raw WebDataset sample: `__key__`, `__url__` and extension -> bytes.

        Raises DigestMismatch naming shard and key where the bytes differ from the index, UnsafeMember for a member that
        is not decoded.
        """
        entry, offset, length = self.locate(x)
        where = store.join(self.uri, entry.name)
        data = os.pread(self._open(int(self._shard[x])), length, offset)
        if len(data) != length or google_crc32c.value(data) != self._crc32c[x]:
            raise DigestMismatch(
                f"The sample {self.key(x)!r} differs from the index: the shard was damaged or cut.",
                where=where,
                mend=_MEND,
            )
        return {"__key__": self.key(x), "__url__": where} | _members(data, where)

    def verify(self) -> None:
        """Check every shard: existence, size and, where it is local, sha256. Raises DigestMismatch naming the shard.

        A remote shard's sha256 is checked when it is fetched.
        """
        for number, entry in enumerate(self.shards):
            where = store.join(self.uri, entry.name)
            filesystem, path = store.filesystem(where)
            info = filesystem.get_file_info(path)
            if not info.is_file:
                raise DigestMismatch("A shard of the data set is missing.", where=where, mend=_MEND)
            if info.size != entry.bytes:
                raise DigestMismatch(
                    f"A shard has {info.size} bytes; the index says {entry.bytes}.", where=where, mend=_MEND
                )
            if not store.is_remote(where):
                self._paths[number] = manifest.fetch_file(self.uri, entry.name, self.manifest)

    def close(self) -> None:
        """Close all file handles; reading opens them again."""
        while self._files:
            os.close(self._files.popitem()[1])

    def _open(self, number: int) -> int:
        """The file descriptor of a shard, from a least-recently-used cache."""
        if number in self._files:
            self._files.move_to_end(number)
            return self._files[number]
        entry = self.shards[number]
        where = store.join(self.uri, entry.name)
        if number not in self._paths:
            remote = store.is_remote(where)  # a local shard's samples are each checked by CRC: no need to hash it all
            self._paths[number] = (
                manifest.fetch_file(self.uri, entry.name, self.manifest) if remote else store.local_path(where)
            )
        try:
            handle = os.open(self._paths[number], os.O_RDONLY)
        except FileNotFoundError:
            raise DigestMismatch("A shard of the data set is missing.", where=where, mend=_MEND) from None
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


def _members(data: bytes, where: str) -> dict[str, bytes]:
    """Extension -> content of the members in a sample's byte range."""
    found: dict[str, bytes] = {}
    at = 0
    while at < len(data):
        header = tarfile.TarInfo.frombuf(data[at : at + tarfile.BLOCKSIZE], "utf-8", "surrogateescape")
        _, extension = members.split_name(header.name, shard=where)
        begin = at + tarfile.BLOCKSIZE
        found[extension] = data[begin : begin + header.size]
        at = begin + -(-header.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    return found
