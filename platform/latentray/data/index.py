"""The index of a data set: one Arrow file beside the data, mapped into memory, so that nothing ever needs a scan.

`index.arrow` is an Arrow IPC file, uncompressed, in one record batch. It has a row per sample in canonical order (shards by
name, then offset): key, byte range, CRC-32C of the range, and what columns the maker adds; and, in its schema's metadata, an
entry per shard (name, sha256, bytes, count, and where it is, if not beside the index). Opening it maps it: columns are
read where they are used, and processes on one machine share them.
"""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from latentray.checkpoint import manifest, store
from latentray.errors import ArtifactError

NAME = "index.arrow"
VERSION = 2
_SHARDS_KEY, _VERSION_KEY = b"latentray.shards", b"latentray.index_version"
_PLACE = {"key": pa.large_string(), "offset": pa.int64(), "length": pa.uint32(), "crc32c": pa.uint32()}
PLACE = frozenset(_PLACE)
"""The columns that say where a sample is."""
_TYPES = _PLACE | {"sha256": pa.binary(32), "width": pa.int32(), "height": pa.int32()}
_TYPES |= {"frames": pa.int32(), "fps": pa.float64(), "steps": pa.int32()}
_TYPES |= {"label": pa.int32()}
_UNKNOWN = {"label": -1}
"""Columns that a sample may lack, and what then stands there; a shard in which all lack it has no such column."""
_TYPES |= dict.fromkeys(("original_height", "original_width", "crop_top", "crop_left"), pa.int32())


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardEntry:
    """What the index knows of a shard."""

    name: str
    """Its file's name; canonical order is by it."""
    sha256: str
    bytes: int
    count: int
    uri: str = ""
    """Where it is; empty for beside the index. Only adopted shards are elsewhere."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardResult:
    """A written or scanned shard, and the index rows of its samples in the order of their offsets."""

    entry: ShardEntry
    table: pa.Table

    @classmethod
    def of(cls, entry: ShardEntry, rows: Sequence[dict[str, Any]]) -> ShardResult:
        """Rows of equal keys: `key`, `offset`, `length`, `crc32c` and the maker's own columns."""
        own = [name for name in (rows[0] if rows else {}) if name not in _PLACE]
        names = [*_PLACE, *(n for n in own if n not in _UNKNOWN or any(row[n] is not None for row in rows))]
        columns = {name: pa.array([row[name] for row in rows], _TYPES.get(name)) for name in names}
        return cls(entry=entry, table=pa.table(columns))

    def to_bytes(self) -> bytes:
        sink = io.BytesIO()
        meta = {_SHARDS_KEY: json.dumps(dataclasses.asdict(self.entry)).encode()}
        with pa.ipc.new_stream(sink, self.table.schema.with_metadata(meta)) as writer:
            writer.write_table(self.table)
        return sink.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes) -> ShardResult:
        table = pa.ipc.open_stream(data).read_all()
        entry = ShardEntry(**json.loads(table.schema.metadata[_SHARDS_KEY]))
        return cls(entry=entry, table=table.replace_schema_metadata(None))


class Range(NamedTuple):
    """Where a sample's bytes are."""

    shard: int
    """Number of its shard."""
    offset: int
    length: int
    """Bytes."""
    crc32c: int


def write(results: Sequence[ShardResult], path: Path) -> None:
    """Write the index of all shards, in canonical order: by shard name, then offset."""
    results = sorted(results, key=lambda r: r.entry.name)
    entries = json.dumps([dataclasses.asdict(r.entry) for r in results], sort_keys=True)
    tables = [r.table for r in results]
    table = pa.concat_tables(tables, promote_options="permissive") if tables else pa.table({}, pa.schema({}))
    for name in _UNKNOWN.keys() & set(table.column_names):
        filled = table[name].fill_null(_UNKNOWN[name])
        table = table.set_column(table.column_names.index(name), name, filled)
    table = table.replace_schema_metadata({_SHARDS_KEY: entries.encode(), _VERSION_KEY: str(VERSION).encode()})
    with pa.ipc.new_file(path, table.schema) as writer:
        for batch in table.combine_chunks().to_batches():
            writer.write_batch(batch)


class Index:
    """An opened index. It can be pickled: another process maps the file anew."""

    def __init__(self, path: Path):
        self.path = path
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        meta = table.schema.metadata or {}
        version = meta.get(_VERSION_KEY, b"none").decode()
        if version != str(VERSION):
            raise ArtifactError(
                f"The index has version {version}; this version of latentray reads {VERSION}.",
                where=str(path),
                mend="Build the data set again.",
            )
        self.table = table
        self.shards = tuple(ShardEntry(**entry) for entry in json.loads(meta[_SHARDS_KEY]))
        self.first = np.concatenate([[0], np.cumsum([entry.count for entry in self.shards], dtype=np.int64)])
        """Position of each shard's first sample; one more, the count, at the end."""
        self._offset, self._length, self._crc32c = (self.numbers(name) for name in ("offset", "length", "crc32c"))

    @classmethod
    def open(cls, uri: str, listing: manifest.Manifest) -> Index:
        """The index of an artifact, checked against its manifest; fetched once per node where it is remote.

        Raises ArtifactError for another version or none, DigestMismatch where it is missing or damaged.
        """
        if NAME not in listing.files:
            raise ArtifactError(
                "The data set has no index of this version.", where=uri, mend="Build the data set again."
            )
        return cls(manifest.fetch_file(uri, NAME, listing))

    @property
    def count(self) -> int:
        return int(self.first[-1])

    def numbers(self, name: str) -> np.ndarray:
        """A column of numbers, one per sample: a view of the mapped file, not a copy."""
        chunks = self.table[name].chunks
        assert len(chunks) <= 1, "an index is written in one record batch"
        return chunks[0].to_numpy() if chunks else np.empty(0, np.int64)

    def locate(self, x: int) -> Range:
        """Where sample x is."""
        shard = int(np.searchsorted(self.first, x, side="right")) - 1
        return Range(shard, int(self._offset[x]), int(self._length[x]), int(self._crc32c[x]))

    def locate_all(self, xs: Sequence[int]) -> Iterator[Range]:
        """Where several samples are."""
        at = np.asarray(xs, np.int64)
        shards = np.searchsorted(self.first, at, side="right") - 1
        columns = (shards, self._offset[at], self._length[at], self._crc32c[at])
        return map(Range._make, zip(*(column.tolist() for column in columns), strict=True))

    def rows_of(self, shard: int) -> range:
        """Positions of a shard's samples."""
        return range(int(self.first[shard]), int(self.first[shard + 1]))

    def __reduce__(self) -> tuple[Any, ...]:
        return Index, (self.path,)


def shard_uri(uri: str, entry: ShardEntry) -> str:
    """Where a shard of the data set at `uri` is."""
    return entry.uri or store.join(uri, entry.name)
