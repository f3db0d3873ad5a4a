"""A part of the input of `build_shards`: what one task reads. Plain values, so that it travels."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

PART_ROWS = 4096
"""Rows of a table, or names of a folder, in one part."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """A stretch of the input that one task reads."""

    uri: str
    """The folder, the table, or the tar."""
    name: str = ""
    """Tar: what its samples' names begin with, unique in the input."""
    names: tuple[str, ...] = ()
    """Folder: the pictures, relative to it."""
    captioned: tuple[bool, ...] = ()
    """Folder: which of them have a `.txt` beside."""
    classes: tuple[str, ...] = ()
    """Folder: the names of all classes, where folders are classes."""
    first: int = 0
    """Table: the number of its first row."""
    count: int = 0
    """Table: its rows. Folder: its pictures."""
    at: int = 0
    """CSV and JSONL: the byte where its first row begins."""
    header: tuple[str, ...] = ()
    """CSV: the columns."""

    @classmethod
    def of(cls, values: dict[str, Any]) -> Part:
        """From the lists that JSON makes of tuples."""
        plain: dict[str, Any] = {k: tuple(value) if isinstance(value, list) else value for k, value in values.items()}
        return cls(**plain)

    def narrowed(self, rows: Sequence[int]) -> tuple[Part, list[int]]:
        """The part for those rows alone, as small as it gets, and the rows' numbers in it."""
        if not self.names:
            return self, list(rows)
        names, captioned = tuple(self.names[row] for row in rows), tuple(self.captioned[row] for row in rows)
        return dataclasses.replace(self, names=names, captioned=captioned, count=len(names)), list(range(len(names)))
