"""What a sample of a user's tars says, in img2dataset's and LAION's layout: its picture, its metadata, its captions."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import mmap
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import google_crc32c
from PIL import Image

from latentray.checkpoint import store
from latentray.data import decode, sources, tars
from latentray.data.captions import Captions
from latentray.errors import SampleRejected
from latentray.records import PICTURE_SUFFIXES

Place = tuple[int, int, int]
"""Offset, length and CRC-32C of a sample's byte range in its tar."""

_READ_BYTES = 32 << 20
_GAP_BYTES = 256 << 10
_OPENED_AS = ("JPEG", "PNG", "WEBP")
_ORIENTATION = 0x0112
_TURNED = (5, 6, 7, 8)
"""EXIF orientations that swap width and height."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TarSample:
    """A sample's members, by extension in lower case."""

    name: str
    """Its tar's name and its key: unique in the input."""
    key: str
    contents: Mapping[str, bytes]

    def picture(self) -> bytes:
        """Raises SampleRejected with reason `no_picture`."""
        for suffix in PICTURE_SUFFIXES:
            if suffix in self.contents:
                return self.contents[suffix]
        raise SampleRejected("no_picture", "The sample has no picture.", where=self.name)

    def metadata(self) -> dict[str, Any]:
        """The `.json`. Raises SampleRejected with reason `unreadable_json`."""
        try:
            found = json.loads(self.contents.get("json", b"{}"))
        except (ValueError, RecursionError) as error:
            raise SampleRejected("unreadable_json", f"The .json cannot be read: {error}", where=self.name) from None
        return found if isinstance(found, dict) else {}

    def label(self, metadata: Mapping[str, Any], key: str) -> int | None:
        """The class label: `key` of the `.json`, else the `.cls`; None where neither is a whole number."""
        found = sources.label_of(metadata.get(key))
        if found is None and self.contents.get("cls", b"").strip().isdigit():
            found = sources.label_of(int(self.contents["cls"]))
        return found

    def captions(self, metadata: Mapping[str, Any]) -> list[str]:
        """`captions` of the `.json`, else the `.txt`, else its `caption`. Raises SampleRejected, `missing_caption`."""
        text = self.contents.get("txt", b"").decode("utf-8", "replace")
        for value in (metadata.get("captions"), text, metadata.get("caption")):
            if found := sources.captions_of(value):
                return found
        raise SampleRejected("missing_caption", "The picture has no caption.", where=self.name)

    def captions_by(self, captions: Captions | None, join: str, metadata: Mapping[str, Any], sha256: str) -> list[str]:
        """As `captions`, but those of the table that replaces them, where there is one."""
        if captions is None:
            return self.captions(metadata)
        key = {"key": self.key, "name": self.name, "sha256": sha256}[join]
        if found := captions.of(key):
            return found
        raise SampleRejected("missing_caption", f"source.captions has no {join} {key!r}.", where=self.name)


@contextlib.contextmanager
def mapped(uri: str) -> Iterator[tars.Buffer]:
    """A tar, mapped into memory; a remote one is on this node's disk meanwhile."""
    path = store.fetch(uri)
    try:
        if path.stat().st_size == 0:
            yield b""
            return
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as tar:
            yield tar
    finally:
        if store.is_remote(uri):
            path.unlink(missing_ok=True)


def read(uri: str, name: str, places: Sequence[Place]) -> Iterator[TarSample | SampleRejected]:
    """The samples at ascending places of a tar, neighbours by one read; a sample that is not as it was, as what says so."""
    filesystem, path = store.filesystem(uri)
    with filesystem.open_input_file(path) as file:
        for run in runs(places):
            first = run[0][0]
            data = file.read_at(run[-1][0] + run[-1][1] - first, first)
            for offset, length, crc32c in run:
                stretch = data[offset - first : offset - first + length]
                if google_crc32c.value(stretch) != crc32c:
                    yield SampleRejected("changed", f"The tar changed at byte {offset} while it was read.", where=name)
                    continue
                key, contents = tars.contents(stretch, shard=uri)
                yield TarSample(name=f"{name}/{key}", key=key, contents=contents)


def runs(places: Sequence[Place]) -> Iterator[list[Place]]:
    """Ascending places in groups that are read at once: little lies between neighbours, and a group is not large."""
    run: list[Place] = []
    for place in places:
        if run:
            end = run[-1][0] + run[-1][1]
            if place[0] - end > _GAP_BYTES or place[0] + place[1] - run[0][0] > _READ_BYTES:
                yield run
                run = []
        run.append(place)
    if run:
        yield run


def size_of(data: bytes, *, max_pixels: int, where: str) -> tuple[int, int]:
    """Upright width and height by a picture's header, without decoding it.

    Raises SampleRejected with the reasons of `decode.decode`; damage behind the header goes unnoticed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=_OPENED_AS) as image:
                width, height = image.size
                turned = _orientation(image) in _TURNED
    except Exception as error:  # what Pillow raises: decoding gives it a reason
        decode.decode(data, max_pixels=max_pixels, where=where)
        raise SampleRejected("unreadable", f"The picture's header is damaged: {error}", where=where) from None
    if width * height > max_pixels:
        raise SampleRejected("too_many_pixels", f"{width} x {height} pixels; max_pixels is {max_pixels}.", where=where)
    return (height, width) if turned else (width, height)


def _orientation(image: Image.Image) -> int:
    try:
        exif = Image.Exif()
        exif.load(image.info.get("exif", b""))  # image.getexif() would decode a PNG to look behind its pixels
        return exif.get(_ORIENTATION, 1)
    except Exception:  # damaged metadata on a good picture
        return 1
