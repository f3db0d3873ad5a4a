"""The first pass over the input: which samples are taken, how large they are, and what tells duplicates apart.

One task surveys one part and returns columns, never pictures or captions: 20 bytes a sample, and 16 more for a tar's sample,
12 or 16 for finding duplicates, some 70 for an index of adopted tars.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import io
import json
from typing import Any

import google_crc32c
import pyarrow as pa

from latentray.config.build_shards import BuildShards
from latentray.data import decode, duplicates, sources, tar_samples, tars
from latentray.data.captions import Captions
from latentray.data.filters import Filter
from latentray.data.parts import Part
from latentray.errors import SampleRejected
from latentray.randomness import Purpose, mix

Reject = dict[str, Any]
"""`name`, `reason` and `what`; `samples` where it stands for several, or for a number that is estimated."""

EXAMPLES = 20
_TAR_COLUMNS = {"offset": pa.int64(), "length": pa.uint32(), "crc32c": pa.uint32()}
_INDEX_COLUMNS = {"key": pa.large_string(), "sha256": pa.binary(32), "width": pa.int32(), "height": pa.int32()}
_INDEX_COLUMNS |= {"label": pa.int32()}
_DUPLICATE_COLUMNS: dict[str, dict[str, pa.DataType]] = {
    "none": {},
    "exact": {"digest": pa.binary(16)},
    "near": {"look": pa.uint64(), "red": pa.uint8(), "green": pa.uint8(), "blue": pa.uint8()},
}


def schema_of(config: BuildShards) -> pa.Schema:
    """The columns of a survey: `row` in the part, `draw` in [0, 1) that chooses the split, `bytes`, and what the job asks for."""
    columns = {"row": pa.int32(), "draw": pa.float64(), "bytes": pa.int64()}
    if config.source.name == "webdataset":
        columns |= _TAR_COLUMNS | (_INDEX_COLUMNS if config.source.index_only else {})
    return pa.schema(columns | _DUPLICATE_COLUMNS[config.duplicates])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Survey:
    """What a part holds."""

    part: int
    """Its number."""
    table: pa.Table
    """A row per sample that is taken, in the part's order."""
    rejected: list[Reject]
    filtered: dict[str, int]
    """Reason -> samples."""
    examples: list[tuple[str, str]]
    """Names and reasons of the first that were filtered."""
    skipped: dict[str, int]
    """Extension -> members of a tar that are not decoded."""
    tar_sha256: str = ""
    """Of an adopted tar."""
    tar_bytes: int = 0

    def to_bytes(self) -> bytes:
        sink = io.BytesIO()
        about = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "table"}
        with pa.ipc.new_stream(sink, self.table.schema.with_metadata({"about": json.dumps(about)})) as writer:
            writer.write_table(self.table)
        return sink.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes) -> Survey:
        table = pa.ipc.open_stream(data).read_all()
        about = json.loads(table.schema.metadata[b"about"])
        about["examples"] = [(name, reason) for name, reason in about["examples"]]
        return cls(table=table.replace_schema_metadata(None), **about)


def split_draw(name: str, seed: int) -> float:
    """A number in [0, 1) that belongs to a name: it decides the split."""
    word = int.from_bytes(hashlib.sha256(name.encode(errors="surrogateescape")).digest()[:8], "big")
    return mix(seed, Purpose.SPLIT, word) * 2.0**-64


def reads_pictures(config: BuildShards) -> bool:
    """Whether a survey reads the pictures of a folder or a table, not their names alone."""
    return config.duplicates != "none" or Filter(config.filter).needs_picture


def reads_files(config: BuildShards) -> bool:
    """Whether a survey reads more than names and tables: then workers do it."""
    captions_in_files = config.source.name == "folder" and Filter(config.filter).needs_caption
    return config.source.name == "webdataset" or captions_in_files or reads_pictures(config)


def survey(number: int, part: Part, config: BuildShards, captions: Captions | None = None) -> Survey:
    """Survey a part. A sample that cannot be used is rejected and listed; one that a filter leaves out is counted.

    Raises UnsafeMember for a tar with members whose decoding could run code, DataError for one whose samples' members do
    not follow each other.
    """
    surveyor = _Surveyor(config, captions)
    about: dict[str, Any] = {}
    if config.source.name == "webdataset":
        about = surveyor.tar(part)
    else:
        surveyor.entries(part)
    return Survey(
        part=number,
        table=pa.Table.from_pylist(surveyor.rows, schema_of(config)),
        rejected=surveyor.rejected,
        filtered=dict(surveyor.filtered),
        examples=surveyor.examples,
        skipped=dict(surveyor.skipped),
        **about,
    )


class _Surveyor:
    """What the survey of a part finds, as it goes."""

    def __init__(self, config: BuildShards, captions: Captions | None):
        self.config, self.captions = config, captions
        self.wanted, self.reading = Filter(config.filter), reads_pictures(config)
        self.rows: list[dict[str, Any]] = []
        self.rejected: list[Reject] = []
        self.filtered: collections.Counter[str] = collections.Counter()
        self.skipped: collections.Counter[str] = collections.Counter()
        self.examples: list[tuple[str, str]] = []

    def entries(self, part: Part) -> None:
        for row, entry in enumerate(sources.entries(part, self.config.source, asked=sorted(self.wanted.names))):
            try:
                about, found = entry["about"] | {"name": entry["name"]}, {}
                if self.wanted.needs_caption:
                    about["caption"] = sources.read_captions(entry)[0]
                reason = self.wanted.reason_of_metadata(about)
                if reason is None and self.reading:
                    data = sources.read_picture(entry)
                    found = self._looked(data, hashlib.sha256(data).digest(), entry["name"]) | {"bytes": len(data)}
                    reason = self.wanted.reason_of_picture(about | found)
            except SampleRejected as error:
                self._reject(entry["name"], error)
                continue
            size = found.get("bytes") or sources.local_size(entry["uri"])
            self._take(entry["name"], reason, found | {"row": row, "bytes": size})

    def tar(self, part: Part) -> dict[str, Any]:
        """Returns `tar_bytes` and, where the tar is adopted, `tar_sha256`."""
        seen = end = 0
        with tar_samples.mapped(part.uri) as tar:
            try:
                for seen, grouped in enumerate(tars.samples(tar, shard=part.uri, skipped=self.skipped), start=1):
                    end = grouped.offset + grouped.length
                    self._sample(seen - 1, tar, grouped, part)
            except SampleRejected as error:
                lost = max(1, round((len(tar) - end) * seen / end)) if seen else 1
                what = f"{error.what} The {seen} samples before are taken, about {lost} lost."
                self._reject(part.name, SampleRejected(error.reason, what), samples=lost)
            digest = hashlib.sha256(tar).hexdigest() if self.config.source.index_only else ""
            return {"tar_sha256": digest, "tar_bytes": len(tar)}

    def _sample(self, row: int, tar: tars.Buffer, grouped: tars.Grouped, part: Part) -> None:
        contents = {extension: tar[at : at + size] for extension, (at, size) in grouped.places.items()}
        sample = tar_samples.TarSample(name=f"{part.name}/{grouped.key}", key=grouped.key, contents=contents)
        try:
            data = sample.picture()
            digest = hashlib.sha256(data).digest()
            about, found = self._about(sample, digest.hex()), {}
            reason = self.wanted.reason_of_metadata(about)
            if reason is None:
                found = self._looked(data, digest, sample.name)
                reason = self.wanted.reason_of_picture(about | found)
        except SampleRejected as error:
            self._reject(sample.name, error)
            return
        stretch = tar[grouped.offset : grouped.offset + grouped.length]
        place = {"offset": grouped.offset, "length": grouped.length, "crc32c": google_crc32c.value(stretch)}
        key = {"row": row, "bytes": grouped.length, "key": grouped.key, "sha256": digest}
        if self.config.source.index_only:
            key["label"] = self._label(sample)
        self._take(sample.name, reason, found | key | place)

    def _about(self, sample: tar_samples.TarSample, sha256: str) -> dict[str, Any]:
        """What the filters ask for that is known before the picture is read."""
        if not _is_sound(sample.name):
            raise SampleRejected("unreadable_name", "The key is no UTF-8.")
        about = sample.metadata() if self.wanted.names or self.wanted.needs_caption else {}
        if self.wanted.needs_caption:
            about = about | {"caption": sample.captions_by(self.captions, self.config.source.join, about, sha256)[0]}
        return about | {"name": sample.name}

    def _label(self, sample: tar_samples.TarSample) -> int | None:
        try:
            return sample.label(sample.metadata(), self.config.source.label or "label")
        except SampleRejected:  # what an adopted tar's .json is good for, its readers find
            return None

    def _looked(self, data: bytes, digest: bytes, name: str) -> dict[str, Any]:
        """What filters, duplicates and an index want of a picture: `width`, `height`, `digest`, its look."""
        found: dict[str, Any] = {"digest": digest[:16]}
        limit = self.config.max_pixels
        if self.config.duplicates == "near":
            pixels = decode.decode(data, max_pixels=limit, where=name)
            look, colour = duplicates.look(pixels)
            found |= {"look": look, **dict(zip(("red", "green", "blue"), colour.tolist(), strict=True))}
            found |= {"width": pixels.shape[1], "height": pixels.shape[0]}
        elif self.config.source.index_only or self.wanted.needs_picture:
            width, height = tar_samples.size_of(data, max_pixels=limit, where=name)
            found |= {"width": width, "height": height}
        return found

    def _take(self, name: str, reason: str | None, row: dict[str, Any]) -> None:
        if reason is None:
            self.rows.append(row | {"draw": split_draw(name, self.config.seed)})
            return
        self.filtered[reason] += 1
        if len(self.examples) < EXAMPLES:
            self.examples.append((name, reason))

    def _reject(self, name: str, error: SampleRejected, **more: int) -> None:
        self.rejected.append({"name": name, "reason": error.reason, "what": error.what, **more})


def _is_sound(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
