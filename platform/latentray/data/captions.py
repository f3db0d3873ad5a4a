"""Captions that replace those of a data set: a table joined by key, sorted once, so that any task finds a key by bisection.

The driver reads the table as a stream into an Arrow file (the text itself, and some 20 bytes a row, in memory while it is
sorted); a task maps the file, fetched once per node, and holds none of it.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from latentray.checkpoint import store
from latentray.config.build_shards import SourceConfig
from latentray.data import sources, tables
from latentray.data.parts import Part
from latentray.errors import DataError

_BATCH = 65536
_SCHEMA = pa.schema({"key": pa.large_string(), "captions": pa.list_(pa.large_string()), "row": pa.int64()})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Place:
    """Where the sorted captions are."""

    uri: str
    sha256: str


def sort(config: SourceConfig, uri: str) -> Place:
    """Write the sorted captions of `source.captions` to a URI.

    Raises InputMissing, ConfigError or DataError where the table is not there, lacks a column, or holds nothing.
    """
    assert config.captions is not None
    path = store.absolute(config.captions)
    wanted = {"source.join": config.join, "source.caption_column": config.caption_column}
    parts = tables.parts(path, wanted)
    table = pa.Table.from_batches(_batches(parts, config), _SCHEMA)
    if not len(table):
        raise DataError("The table holds no captions.", where=path, mend="Give one with at least one row.")
    order = pc.sort_indices(table, sort_keys=[("key", "ascending"), ("row", "ascending")])
    ordered = table.take(order).combine_chunks()
    with store.staging() as folder:
        file = folder / "captions.arrow"
        with pa.ipc.new_file(file, ordered.schema) as writer:
            writer.write_table(ordered)
        place = Place(uri=uri, sha256=store.sha256_of(file))
        store.upload(file, uri)
    return place


def _batches(parts: list[Part], config: SourceConfig) -> Iterator[pa.RecordBatch]:
    rows = (row for part in parts for row in tables.rows(part, [config.join, config.caption_column]))
    kept: list[dict[str, object]] = []
    for number, row in enumerate(rows):
        if row[config.join] is not None and (texts := sources.captions_of(row[config.caption_column])):
            kept.append({"key": str(row[config.join]), "captions": texts, "row": number})
        if len(kept) == _BATCH:
            yield pa.RecordBatch.from_pylist(kept, _SCHEMA)
            kept = []
    if kept:
        yield pa.RecordBatch.from_pylist(kept, _SCHEMA)


class Captions:
    """Sorted captions, opened."""

    def __init__(self, path: Path):
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        self._keys, self._captions = table["key"], table["captions"]

    @classmethod
    def open(cls, place: Place) -> Captions:
        return cls(store.fetch(place.uri, sha256=place.sha256))

    def of(self, key: str) -> list[str]:
        """All captions of a key, in the table's order; empty where it has none."""
        at = bisect.bisect_left(range(len(self._keys)), key, key=lambda row: self._keys[row].as_py())
        found: list[str] = []
        while at < len(self._keys) and self._keys[at].as_py() == key:
            found += self._captions[at].as_py()
            at += 1
        return found
