"""Tables as streams: CSV, JSONL and Parquet in parts of a few thousand rows, each read from where it begins.

The driver keeps where parts begin; a task reads the rows it needs: from a byte on in text, of one row group in Parquet.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import io
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import PurePosixPath
from typing import Any

import pyarrow.parquet as pq

from latentray.checkpoint import store
from latentray.data.parts import PART_ROWS, Part
from latentray.errors import ConfigError, DataError, InputMissing

Row = dict[str, Any]


def parts(path: str, wanted: dict[str, str]) -> list[Part]:
    """The parts of a table that has the wanted columns (setting -> column).

    Raises InputMissing where it is not there, ConfigError for an unknown column or format, DataError where it cannot be read.
    """
    store.require_readable([path])
    if not store.is_remote(path) and store.local_path(path).is_dir():
        raise InputMissing(
            "It is a folder, not a table.", where=path, mend="Give a table, or source=folder for a folder."
        )
    if _suffix_of(path) not in FORMATS:
        raise ConfigError(
            f"A table is one of {', '.join(FORMATS)}; this is {_suffix_of(path)!r}.",
            where=path,
            mend="Convert it to one of these.",
        )
    table = FORMATS[_suffix_of(path)]
    try:
        known = table.columns(path)
        for key, column in wanted.items():
            if known and column not in known:
                raise ConfigError(
                    f"The table {path} has no column {column!r}.",
                    where=key,
                    mend=f"Set {key} to one of its columns: {', '.join(known)}.",
                )
        return list(table.parts(path))
    except ConfigError:  # a ValueError too
        raise
    except (csv.Error, ValueError, OSError) as error:
        raise _unreadable(path, error) from None


def columns(path: str) -> list[str]:
    """The columns of a table; of JSONL the keys of its first row."""
    return FORMATS[_suffix_of(path)].columns(path)


def rows(part: Part, wanted: Sequence[str], numbers: Sequence[int] | None = None) -> Iterator[Row]:
    """The wanted columns of a table's part, all rows or the given ones (ascending).

    Raises DataError where the table cannot be read.
    """
    try:
        yield from FORMATS[_suffix_of(part.uri)].rows(part, list(wanted), numbers)
    except (csv.Error, ValueError, OSError) as error:  # json's, unicode's and pyarrow's errors are ValueErrors
        raise _unreadable(part.uri, error) from None


def _unreadable(path: str, error: Exception) -> DataError:
    return DataError(f"The table cannot be read: {error}", where=path, mend="Write the table again.")


def _suffix_of(path: str) -> str:
    return PurePosixPath(path).suffix.lower()


class _Lines:
    """The lines of a file from a byte on, as text; `at` is where the next one begins."""

    def __init__(self, path: str, at: int = 0):
        filesystem, inner = store.filesystem(path)
        raw = filesystem.open_input_file(inner)
        raw.seek(at)
        self._file, self.at = io.BufferedReader(raw, 1 << 20), at

    def __iter__(self) -> Iterator[str]:
        for line in self._file:
            encoding = "utf-8-sig" if self.at == 0 else "utf-8"
            self.at += len(line)
            yield line.decode(encoding)


def _csv_columns(path: str) -> list[str]:
    return next((row for row in csv.reader(_Lines(path)) if row), [])


def _csv_parts(path: str) -> Iterator[Part]:
    lines = _Lines(path)
    reader = csv.reader(lines)
    header = tuple(next((row for row in reader if row), []))
    for part in _counted(path, lines, (row for row in reader if row)):
        yield dataclasses.replace(part, header=header)


def _csv_rows(part: Part, wanted: list[str], numbers: Sequence[int] | None) -> Iterator[Row]:
    records = (row for row in csv.reader(_Lines(part.uri, part.at)) if row)
    for record in _picked(records, part, numbers):
        row = dict(zip(part.header, record, strict=False))
        yield {column: row.get(column) for column in wanted}


def _jsonl_columns(path: str) -> list[str]:
    return next((list(_object(line, 1)) for line in _Lines(path) if line.strip()), [])


def _jsonl_parts(path: str) -> Iterator[Part]:
    lines = _Lines(path)
    yield from _counted(path, lines, (line for line in lines if line.strip()))


def _jsonl_rows(part: Part, wanted: list[str], numbers: Sequence[int] | None) -> Iterator[Row]:
    lines = (line for line in _Lines(part.uri, part.at) if line.strip())
    for number, line in zip(numbers or range(part.count), _picked(lines, part, numbers), strict=False):
        row = _object(line, part.first + number + 1)
        yield {column: row.get(column) for column in wanted}


def _object(line: str, number: int) -> Row:
    row = json.loads(line)
    if not isinstance(row, dict):
        raise ValueError(f"line {number} is no JSON object")
    return row


def _counted(path: str, lines: _Lines, records: Iterator[Any]) -> Iterator[Part]:
    """Parts of PART_ROWS records, each with the byte where it begins."""
    first = 0
    while True:
        at = lines.at
        count = sum(1 for _ in itertools.islice(records, PART_ROWS))
        if not count:
            return
        yield Part(uri=path, first=first, count=count, at=at)
        first += count


def _picked(records: Iterator[Any], part: Part, numbers: Sequence[int] | None) -> Iterator[Any]:
    at = 0
    for number in range(part.count) if numbers is None else numbers:
        yield from itertools.islice(records, number - at, number - at + 1)
        at = number + 1


def _parquet_columns(path: str) -> list[str]:
    return list(_parquet(path).schema_arrow.names)


def _parquet_parts(path: str) -> Iterator[Part]:
    metadata = _parquet(path).metadata
    first = 0
    for group in range(metadata.num_row_groups):
        held = metadata.row_group(group).num_rows
        for begin in range(0, held, PART_ROWS):
            yield Part(uri=path, first=first + begin, count=min(PART_ROWS, held - begin))
        first += held


def _parquet_rows(part: Part, wanted: list[str], numbers: Sequence[int] | None) -> Iterator[Row]:
    metadata = _parquet(part.uri).metadata
    first = 0
    for group in range(metadata.num_row_groups):
        last = first + metadata.row_group(group).num_rows
        if first <= part.first < last:
            table = _row_group(part.uri, group, tuple(wanted)).slice(part.first - first, part.count)
            yield from (table if numbers is None else table.take(list(numbers))).to_pylist()
            return
        first = last


@functools.lru_cache(maxsize=2)
def _parquet(path: str) -> pq.ParquetFile:
    filesystem, inner = store.filesystem(path)
    return pq.ParquetFile(filesystem.open_input_file(inner))


@functools.lru_cache(maxsize=1)  # several parts lie in one row group, which can only be read whole
def _row_group(path: str, group: int, wanted: tuple[str, ...]) -> Any:
    return _parquet(path).read_row_group(group, columns=list(wanted))


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Format:
    """A table's format."""

    columns: Callable[[str], list[str]]
    parts: Callable[[str], Iterator[Part]]
    rows: Callable[[Part, list[str], Sequence[int] | None], Iterator[Row]]


FORMATS = {
    ".csv": _Format(columns=_csv_columns, parts=_csv_parts, rows=_csv_rows),
    ".jsonl": _Format(columns=_jsonl_columns, parts=_jsonl_parts, rows=_jsonl_rows),
    ".parquet": _Format(columns=_parquet_columns, parts=_parquet_parts, rows=_parquet_rows),
}
"""Suffix of a table -> how it is read."""
