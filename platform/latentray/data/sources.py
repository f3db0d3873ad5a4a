"""Where a user's pictures and captions come from: a folder, or a table.

The driver lists, workers read; an entry is plain JSON, so that a plan of shards travels to any worker.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

import pyarrow.parquet as pq

from latentray.checkpoint import store
from latentray.config.build_shards import SourceConfig
from latentray.data import members
from latentray.errors import ConfigError, DataError, InputMissing, SampleRejected
from latentray.records import PICTURE_SUFFIXES

Entry = dict[str, Any]
"""`name` (unique in its source; what splits and reports know it by), `uri` of the picture, and either `captions` (list)
or `caption_uri` (a text file, one caption per line); both None where there is no caption."""


def entries(config: SourceConfig) -> list[Entry]:
    """All entries of a folder or a table, in a fixed order.

    Raises InputMissing where the path is not there or holds nothing, ConfigError for an unknown column or table format,
    DataError for a table that cannot be read.
    """
    assert config.path is not None
    members.check_url(config.path)
    path = store.absolute(config.path)
    store.require_readable([path])
    found = SOURCES[config.name](path, config)
    if not found:
        raise InputMissing("There are no pictures.", where=path, mend=_WANTED[config.name])
    return found


def _folder(path: str, config: SourceConfig) -> list[Entry]:
    if not store.is_remote(path) and store.local_path(path).is_file():
        raise InputMissing(
            "It is a file, not a folder.", where=path, mend="Give a folder, or source=table for a table."
        )
    names = store.list_files(path)
    known = set(names)
    found = []
    for name in names:
        if PurePosixPath(name).suffix.lower().lstrip(".") not in PICTURE_SUFFIXES:
            continue
        text = PurePosixPath(name).with_suffix(".txt").as_posix()
        caption_uri = store.join(path, text) if text in known else None
        found.append({"name": name, "uri": store.join(path, name), "captions": None, "caption_uri": caption_uri})
    return found


def _table(path: str, config: SourceConfig) -> list[Entry]:
    if not store.is_remote(path) and store.local_path(path).is_dir():
        raise InputMissing(
            "It is a folder, not a table.", where=path, mend="Give a table, or source=folder for a folder."
        )
    suffix = PurePosixPath(path).suffix.lower()
    if suffix not in READERS:
        raise ConfigError(
            f"A table is one of {', '.join(READERS)}; this is {suffix!r}.",
            where=path,
            mend="Convert it to one of these.",
        )
    folder = path.rsplit("/", 1)[0]
    found = []
    try:
        for row in READERS[suffix](path, config):
            picture = row[config.path_column]
            if picture is None or not str(picture).strip():
                picture = ""
            found.append(
                {
                    "name": str(picture),
                    "uri": _resolve(str(picture), folder),
                    "captions": _captions(row[config.caption_column]),
                    "caption_uri": None,
                }
            )
    except ConfigError:  # a missing column; a ValueError too
        raise
    except (csv.Error, ValueError, OSError) as error:  # json's, unicode's and pyarrow's errors are ValueErrors
        raise DataError(f"The table cannot be read: {error}", where=path, mend="Write the table again.") from None
    return found


def _resolve(picture: str, folder: str) -> str:
    """A picture's URI: a path that is not absolute is relative to the table."""
    members.check_url(picture)
    if not picture or "://" in picture or picture.startswith("/"):
        return picture
    return store.join(folder, picture)


def _captions(value: Any) -> list[str] | None:
    """The captions of a table's cell: a text, or a list of texts; None where it is empty."""
    texts = value if isinstance(value, list) else [] if value is None else [value]
    kept = [str(text).strip() for text in texts if text is not None and str(text).strip()]
    return kept or None


def _csv_rows(path: str, config: SourceConfig) -> Iterator[dict[str, Any]]:
    text = store.read_bytes(path).decode("utf-8-sig")
    reader = csv.DictReader(io.StringIO(text, newline=""))
    _require_columns(reader.fieldnames or (), path, config)
    yield from reader


def _jsonl_rows(path: str, config: SourceConfig) -> Iterator[dict[str, Any]]:
    lines = [line for line in store.read_bytes(path).decode("utf-8-sig").split("\n") if line.strip()]
    for number, line in enumerate(lines, start=1):
        row = json.loads(line)
        if not isinstance(row, dict):
            raise ValueError(f"line {number} is no JSON object")
        if number == 1:
            _require_columns(row, path, config)
        yield {config.path_column: row.get(config.path_column), config.caption_column: row.get(config.caption_column)}


def _parquet_rows(path: str, config: SourceConfig) -> Iterator[dict[str, Any]]:
    file = pq.ParquetFile(store.fetch(path))
    _require_columns(file.schema_arrow.names, path, config)
    for batch in file.iter_batches(columns=[config.path_column, config.caption_column]):
        yield from batch.to_pylist()


READERS = {".csv": _csv_rows, ".jsonl": _jsonl_rows, ".parquet": _parquet_rows}
"""Suffix of a table -> its rows."""


def _require_columns(names: Any, path: str, config: SourceConfig) -> None:
    for key in ("path_column", "caption_column"):
        wanted = getattr(config, key)
        if wanted not in names:
            raise ConfigError(
                f"The table {path} has no column {wanted!r}.",
                where=f"source.{key}",
                mend=f"Set source.{key} to one of its columns: {', '.join(names)}.",
            )


SOURCES = {"folder": _folder, "table": _table}
"""Sources of a user's own pictures; `shapes` is drawn, not listed."""

_WANTED = {
    "folder": "Put JPEG, PNG or WebP pictures there, with a .txt of captions beside each.",
    "table": "Give a table with at least one row.",
}


def read(entry: Entry) -> tuple[bytes, list[str]]:
    """The picture's bytes and the captions of an entry (at least one).

    Raises SampleRejected with reason `missing_caption`, `unreadable_caption` or `missing_file`.
    """
    name = entry["name"]
    captions = entry["captions"]
    if entry["caption_uri"] is not None:
        try:
            captions = _captions(store.read_bytes(entry["caption_uri"]).decode("utf-8-sig").splitlines())
        except (UnicodeDecodeError, InputMissing, OSError) as error:
            raise SampleRejected("unreadable_caption", f"The caption cannot be read: {error}", where=name) from None
    if not captions:
        raise SampleRejected("missing_caption", "The picture has no caption.", where=name)
    try:
        if not entry["uri"]:
            raise InputMissing("The table's cell is empty.")
        return store.read_bytes(entry["uri"]), captions
    except InputMissing:
        raise SampleRejected("missing_file", "The picture is not there.", where=name) from None
    except OSError as error:
        raise SampleRejected("missing_file", f"The picture cannot be read: {error}", where=name) from None
