"""Latents, a batch at a time: what a training step reads several times as fast as by decoding tar members.

Byte ranges are read into one buffer, each checked by its CRC-32C. Records of equal length mostly have equal safetensors
headers, so a header is parsed once, and the tensors of a batch are views of the buffer, a row apart. What is otherwise
takes the careful way of `shards.py`, which refuses what is not decoded.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import threading
from collections.abc import Iterator, Sequence

import google_crc32c
import numpy as np
import torch

from latentray.data.damage import DAMAGED, damaged
from latentray.data.shards import IndexedShards
from latentray.errors import DataError, LatentrayError
from latentray.records import LATENT_MEMBER, Damaged, SampleId

_BLOCK = 512
_ALIGN = 64
_UNUSED = 3
"""References to a buffer that only its pool knows: the pool's, the loop's and the question's own."""
_SUFFIX = f".{LATENT_MEMBER}".encode()
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Field:
    """Where a tensor stands in a record's payload."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rows:
    """Records of one layout: their places in what was asked for, and their tensors, (n, ...) each."""

    places: list[int]
    tensors: dict[str, torch.Tensor]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Form:
    """What ranges of one length look like."""

    head: np.ndarray
    """The safetensors header with its length, uint8."""
    begin: int
    """Where it stands in the range."""

    @property
    def payload(self) -> int:
        return self.begin + len(self.head)


class _Pool:
    """Buffers of this process, each used again when nothing refers to it.

    Memory that is new to a process costs several times the reading into it: the system clears each page, and on a virtual
    machine may have to ask its host for it. So buffers outlive their reader; those too small for the latest batch go.
    """

    def __init__(self) -> None:
        self._buffers: list[np.ndarray] = []
        self._lock = threading.Lock()

    def take(self, size: int) -> np.ndarray:
        """uint8 (size,), of any content."""
        with self._lock:
            for buffer in self._buffers:
                if len(buffer) >= size and sys.getrefcount(buffer) <= _UNUSED:
                    return buffer[:size]
            self._buffers = [one for one in self._buffers if sys.getrefcount(one) > _UNUSED]
            self._buffers.append(np.empty(size + size // 8, np.uint8))
            return self._buffers[-1][:size]

    def __len__(self) -> int:
        return len(self._buffers)


_POOL = _Pool()


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Ranges:
    """Byte ranges of one length, by column."""

    length: int
    places: list[int]
    """In what was asked for."""
    datasets: list[int]
    shards: list[int]
    offsets: list[int]
    crc32c: np.ndarray


class LatentReader:
    """Reads records of data sets; one object serves one thread.

    Tensors it has given out keep their values: a buffer is only used again when nothing refers to it.
    """

    def __init__(self, sets: Sequence[IndexedShards], *, skip_damaged: bool = False) -> None:
        self.sets, self.skip_damaged = tuple(sets), skip_damaged
        self._columns = [[one.index.numbers(name) for name in ("offset", "length", "crc32c")] for one in sets]
        self._layouts: dict[bytes, dict[str, Field]] = {}
        self._forms: dict[int, _Form] = {}

    def read(self, ids: Sequence[SampleId]) -> tuple[list[Rows], list[Damaged | None]]:
        """The records of `ids`, by layout, and the damage of each id.

        Raises DigestMismatch or DataError for a damaged record, unless `skip_damaged`; UnsafeMember always.
        """
        rows: list[Rows] = []
        single: list[int] = []
        for alike in self._ranges(ids):
            together, odd = self._together(alike)
            rows += together
            single += odd
        careful, found = self._careful_rows([(place, ids[place]) for place in single], len(ids))
        return rows + careful, found

    def _ranges(self, ids: Sequence[SampleId]) -> Iterator[_Ranges]:
        """Where records are, those of equal length together."""
        datasets = np.array([one.dataset for one in ids], np.int64)
        xs = np.array([one.index for one in ids], np.int64)
        shard, offset, length, crc32c = found = np.empty((4, len(ids)), np.int64)
        for number, columns in enumerate(self._columns):
            mine = datasets == number
            at = xs[mine]
            shard[mine] = np.searchsorted(self.sets[number].index.first, at, side="right") - 1
            for values, column in zip(found[1:], columns, strict=True):
                values[mine] = column[at]
        for one in np.unique(length).tolist():
            places = np.flatnonzero(length == one)
            yield _Ranges(
                length=one,
                places=places.tolist(),
                datasets=datasets[places].tolist(),
                shards=shard[places].tolist(),
                offsets=offset[places].tolist(),
                crc32c=crc32c[places],
            )

    def _together(self, alike: _Ranges) -> tuple[list[Rows], list[int]]:
        """Ranges of one length as one Rows, and the places of those that are damaged or look otherwise."""
        form = self._form(alike)
        if form is None:
            return [], alike.places
        shift = -form.payload % _ALIGN
        stride = -(-(shift + alike.length) // _ALIGN) * _ALIGN
        count = len(alike.places)
        block = _POOL.take(count * stride).reshape(count, stride)
        stretches = block[:, shift : shift + alike.length]
        sums = self._read_into(stretches, alike)
        good = sums == alike.crc32c
        good &= (stretches[:, form.begin : form.payload] == form.head).all(axis=1)
        payload = torch.from_numpy(stretches)[:, form.payload :]
        places, odd = alike.places, []
        if not good.all():
            payload = payload[torch.from_numpy(good)]
            places = [place for place, fine in zip(alike.places, good.tolist(), strict=True) if fine]
            odd = [place for place, fine in zip(alike.places, good.tolist(), strict=True) if not fine]
        return ([Rows(places=places, tensors=self._tensors(form.head[8:].tobytes(), payload))] if places else []), odd

    def _read_into(self, stretches: np.ndarray, alike: _Ranges) -> np.ndarray:
        """Fill (n, length) and return the CRC-32C of each, taken while its bytes are in the processor's cache."""
        sums = []
        for stretch, dataset, shard, offset in zip(stretches, alike.datasets, alike.shards, alike.offsets, strict=True):
            self.sets[dataset].read_into(stretch, shard, offset)
            sums.append(google_crc32c.value(stretch))
        return np.array(sums, np.int64)

    def _form(self, alike: _Ranges) -> _Form | None:
        """How ranges of a length look, learnt from the first that can be read."""
        length = alike.length
        if length not in self._forms:
            for row, crc32c in enumerate(alike.crc32c.tolist()):
                read = np.zeros(length, np.uint8)
                self.sets[alike.datasets[row]].read_into(read, alike.shards[row], alike.offsets[row])
                data = read.tobytes()
                if google_crc32c.value(data) == crc32c:
                    begin, end = _header(data)
                    if end:
                        self._forms[length] = _Form(head=read[begin:end], begin=begin)
                    break
        return self._forms.get(length)

    def _careful_rows(self, single: list[tuple[int, SampleId]], count: int) -> tuple[list[Rows], list[Damaged | None]]:
        """One by one, through the data set's own checks."""
        payloads: dict[bytes, tuple[list[int], list[bytes]]] = {}
        found: list[Damaged | None] = [None] * count
        for place, one in single:
            shards = self.sets[one.dataset]
            try:
                header, payload = self._careful(shards, one.index)
            except LatentrayError as error:
                if not self.skip_damaged:
                    raise
                found[place] = _damage(error, shards, one.index)
                continue
            places, parts = payloads.setdefault(header, ([], []))
            places.append(place)
            parts.append(payload)
        rows = []
        for header, (places, parts) in payloads.items():
            joined = torch.frombuffer(bytearray().join(parts), dtype=torch.uint8).view(len(parts), -1)
            rows.append(Rows(places=places, tensors=self._tensors(header, joined)))
        return rows, found

    def _careful(self, shards: IndexedShards, x: int) -> tuple[bytes, bytes]:
        sample = shards.read(x)  # raises what there is to say of the range
        if LATENT_MEMBER not in sample:
            raise DataError(
                f"The sample {sample['__key__']!r} has no latent.",
                where=sample["__url__"],
                mend="Give precomputed latents.",
            )
        return _split(sample[LATENT_MEMBER])

    def _tensors(self, header: bytes, payload: torch.Tensor) -> dict[str, torch.Tensor]:
        """Payloads (n, bytes) -> tensors (n, ...): views where the bytes are aligned."""
        layout = self._layouts.get(header)
        if layout is None:
            layout = self._layouts[header] = _layout(header)
        found = {}
        for name, field in layout.items():
            part = payload[:, field.begin : field.end]
            if (part.storage_offset() | part.stride(0)) % field.dtype.itemsize:
                part = part.clone().flatten().view(len(part), -1)
            found[name] = part.view(field.dtype).view(len(part), *field.shape)
        return found


def _header(data: bytes) -> tuple[int, int]:
    """Where a latent's safetensors header, with its length, begins and ends in a sample's range; 0, 0 where there is none.

    Only what `shards.write_shard` writes is understood: plain files, of which all but the latent are JSON.
    """
    at = 0
    while at + _BLOCK < len(data):
        size, name = int(data[at + 124 : at + 135], 8), data[at : at + 100].rstrip(b"\0")
        if data[at + 156] != ord("0") or not name.endswith((_SUFFIX, b".json")):
            return 0, 0
        begin = at + _BLOCK
        if name.endswith(_SUFFIX):
            return begin, begin + 8 + int.from_bytes(data[begin : begin + 8], "little")
        at = begin + -(-size // _BLOCK) * _BLOCK
    return 0, 0


def _split(record: bytes) -> tuple[bytes, bytes]:
    """A safetensors file -> its header and its payload."""
    start = 8 + int.from_bytes(record[:8], "little")
    return record[8:start], record[start:]


def _layout(header: bytes) -> dict[str, Field]:
    try:
        listed = json.loads(header)
        return {
            name: Field(
                dtype=_DTYPES[one["dtype"]],
                shape=tuple(one["shape"]),
                begin=one["data_offsets"][0],
                end=one["data_offsets"][1],
            )
            for name, one in listed.items()
            if name != "__metadata__"
        }
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise DataError(
            f"A latent record's header cannot be read: {error!r}", mend="Precompute the latents again."
        ) from None


def _damage(error: LatentrayError, shards: IndexedShards, x: int) -> Damaged:
    about = {"__id__": x, "__step__": 0, "__bucket__": 0, "__traffic__": None}
    where = {"__key__": shards.key(x), "__url__": shards.locate(x)[0].name}
    return damaged(error, about | where)[DAMAGED]
