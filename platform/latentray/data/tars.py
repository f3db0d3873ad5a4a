"""Where the members of a tar are: a walk over its headers that stops at damage, where tar readers go on or end in silence.

Reads USTAR, GNU long names and PAX headers: a member begins at the first header block of its own, extensions included.
"""

from __future__ import annotations

import collections
import dataclasses
import mmap
import tarfile
from collections.abc import Iterator

from latentray.data import members
from latentray.errors import DataError, SampleRejected

Buffer = bytes | mmap.mmap
BLOCK = tarfile.BLOCKSIZE
DAMAGED = "damaged_tar"
"""What a tar that is cut or whose headers are damaged is counted under."""

UNSAFE = frozenset({"pyd", "pkl", "pickle", "pth", "pt", "dill", "joblib"})
"""Extensions of what decodes by running code: never skipped, always refused."""

_NAME_HEADERS = {tarfile.GNUTYPE_LONGNAME}
_PAX_HEADERS = {tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE}
_OTHER_HEADERS = {tarfile.GNUTYPE_LONGLINK, tarfile.XGLTYPE}
_EMPTY = {tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.DIRTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE}
"""Types without content, whatever size they state."""

_CHUNK = 1 << 20


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Member:
    """One member, by bytes from the tar's beginning."""

    name: str
    start: int
    """Its first header block, GNU and PAX headers of its own included."""
    data: int
    size: int
    is_file: bool

    @property
    def end(self) -> int:
        return self.data + _padded(self.size)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grouped:
    """A sample: consecutive members of one key. Its range begins and ends with members that are decoded."""

    key: str
    offset: int
    length: int
    places: dict[str, tuple[int, int]]
    """Extension in lower case -> where its content begins, from the tar's beginning, and its bytes."""


def walk(tar: Buffer, *, is_archive: bool = True) -> Iterator[Member]:
    """The members in order. `is_archive=False` takes a stretch of a tar, which has no end marker.

    Raises SampleRejected with reason `damaged_tar` where a header is damaged, the tar is cut, has no end marker, or goes on
    behind it: what comes after that byte is lost.
    """
    at = 0
    start: int | None = None
    name = size = None
    while at < len(tar):
        block = tar[at : at + BLOCK]
        if block.count(0) == BLOCK:
            _require_zeros(tar, at)
            return
        header = _header(block, at)
        data, kind = at + BLOCK, header.type
        size_here = 0 if kind in _EMPTY else header.size if size is None else size
        if data + _padded(size_here) > len(tar):
            raise _damaged(f"it is cut inside the member at byte {at}")
        begin = at if start is None else start
        at = data + _padded(size_here)
        if kind in _OTHER_HEADERS:
            start = None if kind == tarfile.XGLTYPE else begin
        elif kind in _NAME_HEADERS:
            name, start = _text(tar[data : data + size_here].rstrip(b"\0")), begin
        elif kind in _PAX_HEADERS:
            found = _pax(tar[data : data + size_here], begin)
            name, start = found.get("path", name), begin
            size = _length(found["size"], begin) if "size" in found else None
        else:
            yield Member(
                name=header.name if name is None else name,
                start=begin,
                data=data,
                size=size_here,
                is_file=kind in tarfile.REGULAR_TYPES and kind != tarfile.GNUTYPE_SPARSE,
            )
            start = name = size = None
    if is_archive:
        raise _damaged(f"it ends at byte {at} without an end marker")


def samples(tar: Buffer, *, shard: str, skipped: collections.Counter[str]) -> Iterator[Grouped]:
    """The samples of a tar in order; members that are not decoded are left out and counted by extension in `skipped`.

    Raises SampleRejected with reason `damaged_tar` as `walk` does, without the sample it was at, which may not be whole;
    UnsafeMember for a member whose decoding could run code, or whose path leaves the tar; DataError where a sample's members
    do not follow each other.
    """
    seen: set[str] = set()
    group: list[tuple[str, Member]] = []
    current: str | None = None
    for member in walk(tar):
        if not member.is_file:
            continue
        key, extension = _split(member.name, shard)
        if extension not in members.DECODERS or not key.rsplit("/", 1)[-1]:
            skipped[f".{extension}"] += 1
            continue
        if key != current:
            if current is not None:
                yield _grouped(current, group)
            if key in seen:
                raise _scattered(key, shard)
            seen.add(key)
            current, group = key, []
        if any(extension == one for one, _ in group):
            raise _scattered(key, shard)
        group.append((extension, member))
    if current is not None:
        yield _grouped(current, group)


def contents(stretch: bytes, *, shard: str) -> tuple[str, dict[str, bytes]]:
    """Of a sample's byte range: its key, and extension in lower case -> content of its decoded members."""
    found, key = {}, ""
    for member in walk(stretch, is_archive=False):
        here, extension = _split(member.name, shard)
        if member.is_file and extension in members.DECODERS:
            key = here
            found[extension] = stretch[member.data : member.data + member.size]
    return key, found


def _split(name: str, shard: str) -> tuple[str, str]:
    """Key and extension in lower case. Raises UnsafeMember for an unsafe extension or a path that leaves the tar."""
    folder, slash, last = name.rpartition("/")
    stem, _, extension = last.partition(".")
    key, _ = members.split_name(f"{folder}{slash}{stem}.txt", shard=shard)
    if not UNSAFE.isdisjoint(extension.lower().split(".")):
        members.split_name(name, shard=shard)
    return key, extension.lower()


def _grouped(key: str, group: list[tuple[str, Member]]) -> Grouped:
    offset = group[0][1].start
    places = {extension: (member.data, member.size) for extension, member in group}
    return Grouped(key=key, offset=offset, length=group[-1][1].end - offset, places=places)


def _scattered(key: str, shard: str) -> DataError:
    return DataError(
        f"The members of {key!r} do not follow each other, or the key stands for two samples.",
        where=shard,
        mend="Write the tar again with the members of a sample together (tar --sort=name), each key once.",
    )


def _header(block: bytes, at: int) -> tarfile.TarInfo:
    try:
        header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        raise _damaged(f"the header at byte {at}: {error}") from None
    if header.size < 0:
        raise _damaged(f"the header at byte {at}: a negative size")
    return header


def _pax(records: bytes, at: int) -> dict[str, str]:
    """PAX records: `length key=value\\n`, the length in bytes and of the whole record (POSIX.1-2001, pax)."""
    found = {}
    while records:
        digits = records.split(b" ", 1)[0]
        length = _length(digits.decode("ascii", "replace"), at)
        if not len(digits) + 2 < length <= len(records):
            raise _damaged(f"the PAX header at byte {at}")
        key, _, value = records[len(digits) + 1 : length - 1].partition(b"=")
        found[_text(key)] = _text(value)
        records = records[length:]
    return found


def _length(digits: str, at: int) -> int:
    if not digits.isascii() or not digits.isdigit():
        raise _damaged(f"the PAX header at byte {at}")
    return int(digits)


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


def _require_zeros(tar: Buffer, at: int) -> None:
    for begin in range(at, len(tar), _CHUNK):
        part = tar[begin : begin + _CHUNK]
        if part.count(0) != len(part):
            raise _damaged(f"it goes on behind its end marker at byte {at}: two tars in one file, or a damaged header")


def _damaged(why: str) -> SampleRejected:
    return SampleRejected(DAMAGED, f"The tar is damaged: {why}.")


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK
