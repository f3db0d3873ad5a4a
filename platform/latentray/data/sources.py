"""Where a user's pictures and captions come from: a folder, a table, or WebDataset tars.

The driver lists parts of the input, workers read them: a part is a stretch of a table, some names of a folder, or a tar, and
plain values, so that it travels. The driver holds no captions: of a table it keeps where every few thousandth row begins, of a
folder the names (some 150 bytes a picture), of tars their URIs.
"""

from __future__ import annotations

import fnmatch
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import PurePosixPath
from typing import Any

from latentray.checkpoint import store
from latentray.config.build_shards import SourceConfig
from latentray.data import members, tables, tars
from latentray.data.parts import PART_ROWS, Part
from latentray.errors import DataError, InputMissing, SampleRejected
from latentray.records import PICTURE_SUFFIXES

Entry = dict[str, Any]
"""`name` (unique in its source; what splits and reports know it by), `uri` of the picture, and either `captions` (list)
or `caption_uri` (a text file, one caption per line); both None where there is no caption. `label`: a class label, or None.
`about`: what else the table says."""

_PEEKED_BYTES = 16 << 20


def parts(config: SourceConfig) -> list[Part]:
    """All parts of the input, in a fixed order.

    Raises InputMissing where the path is not there or holds nothing, ConfigError for an unknown column or table format,
    DataError for a table that cannot be read.
    """
    assert config.path is not None
    members.check_url(config.path)
    found = list(SOURCES[config.name](store.absolute(config.path), config))
    if not found:
        raise InputMissing("There are no pictures.", where=store.absolute(config.path), mend=_WANTED[config.name])
    return found


def columns(config: SourceConfig, found: Sequence[Part]) -> list[str]:
    """What the input says of its samples: a table's columns; the keys of the first `.json` files of the first tar."""
    if config.name == "table":
        return tables.columns(found[0].uri)
    return _json_keys(found[0]) if config.name == "webdataset" else []


def entries(
    part: Part, config: SourceConfig, rows: Sequence[int] | None = None, asked: Iterable[str] = ()
) -> Iterator[Entry]:
    """The entries of a part of a folder or a table, all or the given rows (ascending), with the `asked` columns in `about`."""
    if config.name == "folder":
        yield from _folder_entries(part, range(part.count) if rows is None else rows)
        return
    folder = store.parent(part.uri)
    label = config.label
    wanted = list(dict.fromkeys([config.path_column, config.caption_column, *([label] if label else []), *asked]))
    for row in tables.rows(part, wanted, rows):
        picture = row[config.path_column]
        name = "" if picture is None or not str(picture).strip() else str(picture)
        yield {
            "name": name,
            "uri": _resolve(name, folder),
            "captions": captions_of(row[config.caption_column]),
            "caption_uri": None,
            "label": label_of(_plain(row[label], part.uri)) if label else None,
            "about": {column: _plain(row[column], part.uri) for column in asked},
        }


def read(entry: Entry) -> tuple[bytes, list[str]]:
    """The picture's bytes and the captions of an entry (at least one).

    Raises SampleRejected with reason `missing_caption`, `unreadable_caption` or `missing_file`.
    """
    captions = read_captions(entry)
    return read_picture(entry), captions


def read_captions(entry: Entry) -> list[str]:
    """As `read`, the captions alone."""
    name, captions = entry["name"], entry["captions"]
    if entry["caption_uri"] is not None:
        try:
            captions = captions_of(store.read_bytes(entry["caption_uri"]).decode("utf-8-sig").splitlines())
        except (UnicodeDecodeError, InputMissing, OSError) as error:
            raise SampleRejected("unreadable_caption", f"The caption cannot be read: {error}", where=name) from None
    if not captions:
        raise SampleRejected("missing_caption", "The picture has no caption.", where=name)
    return captions


def read_picture(entry: Entry) -> bytes:
    """As `read`, the picture alone."""
    name = entry["name"]
    try:
        if not entry["uri"]:
            raise InputMissing("The table's cell is empty.")
        return store.read_bytes(entry["uri"])
    except InputMissing:
        raise SampleRejected("missing_file", "The picture is not there.", where=name) from None
    except OSError as error:
        raise SampleRejected("missing_file", f"The picture cannot be read: {error}", where=name) from None


def local_size(uri: str) -> int:
    """Bytes of a local picture; 0 where it is remote or not there."""
    if not uri or store.is_remote(uri):
        return 0
    try:
        return os.stat(uri.removeprefix("file://")).st_size
    except OSError:
        return 0


def captions_of(value: Any) -> list[str] | None:
    """The captions of a table's cell: a text, or a list of texts; None where it is empty."""
    texts = value if isinstance(value, list) else [] if value is None else [value]
    kept = [_sound(str(text).strip()) for text in texts if text is not None and str(text).strip()]
    return kept or None


def label_of(value: Any) -> int | None:
    """A class label as a whole number that is not negative; None for all else."""
    if isinstance(value, float) and value.is_integer():  # what a table makes of whole numbers where some are missing
        value = int(value)
    is_label = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31
    return value if is_label else None


def _sound(text: str) -> str:
    """Half a surrogate pair, which JSON can hold and UTF-8 cannot, becomes a question mark."""
    return text.encode(errors="replace").decode()


# Folders


def _folder_parts(path: str, config: SourceConfig) -> Iterator[Part]:
    store.require_readable([path])
    if not store.is_remote(path) and store.local_path(path).is_file():
        raise InputMissing(
            "It is a file, not a folder.", where=path, mend="Give a folder, or source=table for a table."
        )
    found = store.list_files(path)
    known = set(found)
    pictures = [name for name in found if PurePosixPath(name).suffix.lower().lstrip(".") in PICTURE_SUFFIXES]
    classes = _classes_of(pictures, path) if config.label else ()
    listed = iter(pictures)
    while names := tuple(itertools.islice(listed, PART_ROWS)):
        captioned = tuple(_text_beside(name) in known for name in names)
        yield Part(uri=path, names=names, captioned=captioned, count=len(names), classes=classes)


def _classes_of(pictures: Sequence[str], path: str) -> tuple[str, ...]:
    """The folders directly below, each a class. Raises DataError for a picture that lies in none."""
    for name in pictures:
        if "/" not in name:
            raise DataError(
                f"The picture {name!r} lies in no folder of a class.",
                where=path,
                mend="Move it into one, or leave source.label out.",
            )
    return tuple(sorted({name.split("/", 1)[0] for name in pictures}))


def _folder_entries(part: Part, rows: Iterable[int]) -> Iterator[Entry]:
    for row in rows:
        name = part.names[row]
        text = store.join(part.uri, _text_beside(name)) if part.captioned[row] else None
        of = name.split("/", 1)[0] if part.classes else None
        yield {
            "name": name,
            "uri": store.join(part.uri, name),
            "captions": None if of is None or text else [of],  # a class of its own name describes it
            "caption_uri": text,
            "label": None if of is None else part.classes.index(of),
            "about": {},
        }


def _text_beside(name: str) -> str:
    return PurePosixPath(name).with_suffix(".txt").as_posix()


# Tars


def base_of(path: str) -> str:
    """The folder of tars: the path itself, the one that holds a single tar, or the part of a pattern before its wildcards."""
    if _is_pattern(path):
        return "/".join(itertools.takewhile(lambda step: not _is_pattern(step), path.split("/")))
    return store.parent(path) if path.endswith(".tar") else path


def _is_pattern(path: str) -> bool:
    return any(letter in path for letter in "*?[")


def _tar_parts(path: str, config: SourceConfig) -> Iterator[Part]:
    base = base_of(path)
    if not _is_pattern(path):
        store.require_readable([path])
    if path.endswith(".tar") and not _is_pattern(path):
        yield Part(uri=path, name=path.rsplit("/", 1)[-1])
        return
    pattern = path[len(base) + 1 :] if _is_pattern(path) else ""
    found = [name for name in store.list_files(base) if (_matches(name, pattern) if pattern else name.endswith(".tar"))]
    flat = len({name.rsplit("/", 1)[-1] for name in found}) == len(found)
    names = {name: name.rsplit("/", 1)[-1] if flat else name.replace("/", "--") for name in found}
    for name in sorted(found, key=names.__getitem__):
        yield Part(uri=store.join(base, name), name=names[name])


def _matches(name: str, pattern: str) -> bool:
    """Whether a name fits a pattern folder by folder: `*` does not reach into folders."""
    steps, wanted = name.split("/"), pattern.split("/")
    return len(steps) == len(wanted) and all(map(fnmatch.fnmatchcase, steps, wanted))


def _json_keys(part: Part) -> list[str]:
    filesystem, path = store.filesystem(part.uri)
    with filesystem.open_input_file(path) as file:
        start = file.read_at(min(_PEEKED_BYTES, file.size()), 0)
    keys: dict[str, None] = {}
    try:
        for member in tars.walk(start):
            if member.is_file and member.name.lower().endswith(".json"):
                keys |= dict.fromkeys(json.loads(start[member.data : member.data + member.size]))
    except (SampleRejected, ValueError):
        pass  # the stretch ends within a member; what is damaged the survey finds
    return list(keys)


# Tables


def _table_parts(path: str, config: SourceConfig) -> Iterator[Part]:
    wanted = {"source.path_column": config.path_column, "source.caption_column": config.caption_column}
    if config.label:
        wanted["source.label"] = config.label
    yield from tables.parts(path, wanted)


def _plain(value: Any, table: str) -> Any:
    """A cell as a number where it is one: CSV knows only text."""
    if isinstance(value, str) and table.endswith(".csv"):
        for kind in (int, float):
            try:
                return kind(value)
            except ValueError:
                continue
    return value


def _resolve(picture: str, folder: str) -> str:
    """A picture's URI: a path that is not absolute is relative to the table."""
    members.check_url(picture)
    if not picture or "://" in picture or picture.startswith("/"):
        return picture
    return store.join(folder, picture)


SOURCES: dict[str, Callable[[str, SourceConfig], Iterator[Part]]] = {
    "folder": _folder_parts,
    "table": _table_parts,
    "webdataset": _tar_parts,
}
"""Sources of a user's own pictures; `shapes` is drawn, not listed."""

_WANTED = {
    "folder": "Put JPEG, PNG or WebP pictures there, with a .txt of captions beside each.",
    "table": "Give a table with at least one row.",
    "webdataset": "Give a folder of .tar files, one of them, or a pattern such as 'laion/*.tar'.",
}
