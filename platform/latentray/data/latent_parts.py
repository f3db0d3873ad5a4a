"""The first stage of encoding: a part's samples are read, checked, decoded and cut, on any machine.

Between stages a part travels as a `Parcel`, one row of an Arrow table.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
from typing import Any

import numpy as np
import pyarrow as pa
import safetensors.torch
import torch

from latentray.checkpoint import store
from latentray.data import decode, latents, members, shards
from latentray.data.latent_plan import VARIANTS, Part, Square, squares
from latentray.errors import DataError, DigestMismatch, LatentrayError, SampleRejected, UnsafeMember
from latentray.records import LATENT_MEMBER, PICTURE_SUFFIXES, Damaged

_JPEG = b"\xff\xd8\xff"
FROM_PIXELS, FROM_LATENTS, FROM_RECORD = "pixels", "latents", "record"
"""How a unit comes about: encoded; its latents copied and its captions embedded, for they changed; copied as it is."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SplitJob:
    """One split of a data set, and the stores it becomes: one for each size."""

    data: str
    data_digest: str
    outs: tuple[str, ...]
    older: tuple[str, ...]
    """The store that each of them copies from; none where nothing is reused."""
    parts: str
    """The folder of its parts' files."""
    plan: str
    """Digest of all that decides its shards: part of their sidecars' names."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """What every part of a job shares."""

    splits: tuple[SplitJob, ...]
    samples: int
    """Of all splits."""
    autoencoder: str
    texts: tuple[latents.TextSource, ...]
    sizes: tuple[int, ...]
    variants: tuple[int, ...]
    batch_size: int
    latent_dtype: str
    text_dtype: str
    max_pixels: int
    skip_damaged: bool
    device: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parcel:
    """A part on its way: tensors, and JSON about them."""

    about: dict[str, Any]
    tensors: dict[str, torch.Tensor]

    def to_table(self) -> pa.Table:
        about = json.dumps(self.about, sort_keys=True)
        tensors = safetensors.torch.save({name: t.contiguous() for name, t in self.tensors.items()})
        return pa.table({"about": pa.array([about]), "tensors": pa.array([tensors], pa.large_binary())})

    @classmethod
    def from_table(cls, table: pa.Table) -> Parcel:
        about, tensors = table["about"][0].as_py(), table["tensors"][0].as_py()
        return cls(about=json.loads(about), tensors=safetensors.torch.load(tensors))


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Source:
    """A sample of the data set, its picture not yet decoded."""

    key: str
    picture: bytes
    digest: bytes
    """sha256 of the picture's file."""
    captions: list[str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Unit:
    """What the first stage made of a unit: its `.json` at each size, and its pixels or what was copied."""

    how: str
    shown: list[dict[str, Any]]
    pixels: list[np.ndarray] = dataclasses.field(default_factory=list)
    copied: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)


def read_part(job: Job, part: Part) -> Parcel:
    """Read a part's samples: `pixels.<size>` uint8 (units to be encoded, size, size, 3), `kept.<unit>.<size>...` of others.

    A unit that an older store holds is not decoded; where its captions are the same, its record passes as it is. Raises
    DataError or DigestMismatch for a picture that cannot be used, unless `skip_damaged` lists it as rejected.
    """
    split = job.splits[part.split]
    source = _opened(split.data, "dataset", split.data_digest)
    older = part.older if len(part.older) else np.full((len(part.units), len(job.sizes)), -1)
    units: list[dict[str, Any]] = []
    pixels: dict[int, list[np.ndarray]] = {size: [] for size in job.sizes}
    kept: dict[str, torch.Tensor] = {}
    rejected: list[dict[str, str]] = []
    pairs = zip(part.units.tolist(), older.tolist(), strict=True)
    for row, group in itertools.groupby(pairs, lambda pair: pair[0] // VARIANTS):
        wanted = {unit % VARIANTS: records for unit, records in group}
        try:
            sample = _read(source, row)
            made = _made(job, split, sample, wanted)
        except LatentrayError as error:
            rejected.append(dataclasses.asdict(rejection(error, source, row, skip=job.skip_damaged)))
            continue
        for variant, one in made.items():
            for size, square in zip(job.sizes, one.pixels, strict=False):
                pixels[size].append(square)
            kept |= {f"kept.{len(units)}.{name}": tensor for name, tensor in one.copied.items()}
            about = {"unit": row * VARIANTS + variant, "key": f"{sample.key}_{variant}", "sha256": sample.digest.hex()}
            units.append(about | {"from": one.how, "json": one.shown})
    arrays = {f"pixels.{size}": torch.from_numpy(np.stack(some)) for size, some in pixels.items() if some}
    place = {"split": part.split, "shard": part.shard, "number": part.number}
    return Parcel(about=place | {"units": units, "rejected": rejected}, tensors=arrays | kept)


def rejection(error: LatentrayError, source: shards.IndexedShards, row: int, *, skip: bool) -> Damaged:
    """The damage that leaves a sample out. Raises the error where damage fails the job, or where it is an attack."""
    if isinstance(error, UnsafeMember) or not isinstance(error, DataError | DigestMismatch | SampleRejected):
        raise error
    if not skip and not isinstance(error, SampleRejected):
        raise error
    if not skip:
        raise DataError(
            f"The picture {source.key(row)!r} cannot be used: {error.what}",
            where=store.join(source.uri, source.locate(row)[0].name),
            mend="Build the data set again without it, or set damage.policy=skip.",
        )
    reason = "digest" if isinstance(error, DigestMismatch) else getattr(error, "reason", "decode")
    return Damaged(reason=reason, shard=source.locate(row)[0].name, key=source.key(row), what=error.what)


@functools.lru_cache(maxsize=16)
def _opened(uri: str, kind: str, digest: str) -> shards.IndexedShards:
    """A data set, opened once per process; `digest` tells one that was built again apart."""
    opened = shards.IndexedShards.open(uri, kind=kind)
    if opened.manifest.digest != digest:
        raise DigestMismatch("The data changed while it was read.", where=uri, mend="Start the job again.")
    return opened


def _read(source: shards.IndexedShards, row: int) -> _Source:
    raw = source.read(row)
    pictures = {name: data for name, data in raw.items() if name.lower() in PICTURE_SUFFIXES}
    picture: bytes = members.picture_of(pictures | {"__key__": raw["__key__"], "__url__": raw["__url__"]})
    captions = members.captions_of(members.decode_sample(only_texts(raw)))
    return _Source(key=raw["__key__"], picture=picture, digest=hashlib.sha256(picture).digest(), captions=captions)


def only_texts(sample: dict[str, Any]) -> dict[str, Any]:
    """A raw sample without its picture."""
    return {name: value for name, value in sample.items() if name.startswith("__") or name in ("txt", "json")}


def _made(job: Job, split: SplitJob, sample: _Source, wanted: dict[int, list[int]]) -> dict[int, _Unit]:
    """The wanted variants of a sample, each copied where its rows in the older stores are given, else cut."""
    copies = {v: _copied(split, sample, records) for v, records in wanted.items() if min(records) >= 0}
    missing = [variant for variant in wanted if copies.get(variant) is None]
    cuts = _cut(job, sample, missing) if missing else {}
    return {variant: copies.get(variant) or cuts[variant] for variant in wanted}


def _cut(job: Job, sample: _Source, variants: list[int]) -> dict[int, _Unit]:
    """Decode a picture, and cut its variants at every size."""
    pixels, original = _decoded(job, sample)
    by_size = [squares(pixels[size], original, size, variants, sample.digest) for size in job.sizes]
    return {
        variant: _Unit(
            how=FROM_PIXELS,
            pixels=[of_size[i].pixels for of_size in by_size],
            shown=[_shown(sample, variant, of_size[i]) for of_size in by_size],
        )
        for i, variant in enumerate(variants)
    }


def _decoded(job: Job, sample: _Source) -> tuple[dict[int, np.ndarray], tuple[int, int]]:
    """The picture for each size, and its (height, width) in the file.

    What a size gets does not depend on the others; a JPEG is decoded again only where a smaller scale covers the size.
    """

    def at_least(size: int) -> tuple[np.ndarray, tuple[int, int]]:
        return decode.decode_at_least(sample.picture, size, size, max_pixels=job.max_pixels, where=sample.key)

    largest = max(job.sizes)
    pixels, original = at_least(largest)
    found = {largest: pixels}
    for size in job.sizes:
        smaller = sample.picture.startswith(_JPEG) and min(original) // size > min(original) // largest
        found.setdefault(size, at_least(size)[0] if smaller and min(original) >= 2 * size else pixels)
    return found, original


def _shown(sample: _Source, variant: int, square: Square) -> dict[str, Any]:
    """The `.json` of a record."""
    return {
        "captions": sample.captions,
        "source": sample.key,
        "source_sha256": sample.digest.hex(),
        **{name: list(pair) for name, pair in dataclasses.asdict(square.conditioning).items()},
        "flip": bool(variant % 2),
    }


def _copied(split: SplitJob, sample: _Source, rows: list[int]) -> _Unit | None:
    """A unit from the older stores; None where a record there is damaged, or is of another picture than its index says."""
    shown: list[dict[str, Any]] = []
    records: list[bytes] = []
    same = True
    for uri, row in zip(split.older, rows, strict=True):
        try:
            raw = shards_of(uri).read(row)
        except DigestMismatch:
            return None
        about = json.loads(raw["json"])
        if about["source_sha256"] != sample.digest.hex():
            return None
        same &= about["captions"] == sample.captions
        shown.append(about | {"captions": sample.captions, "source": sample.key})
        records.append(raw[LATENT_MEMBER])
    if same:
        whole = {str(i): torch.frombuffer(bytearray(one), dtype=torch.uint8) for i, one in enumerate(records)}
        return _Unit(how=FROM_RECORD, shown=shown, copied=whole)
    loaded = [safetensors.torch.load(one) for one in records]
    both = {f"{i}.{name}": one[name] for i, one in enumerate(loaded) for name in ("mean", "logvar")}
    return _Unit(how=FROM_LATENTS, shown=shown, copied=both)


@functools.lru_cache(maxsize=16)
def shards_of(uri: str) -> shards.IndexedShards:
    """An older store, opened once per process: it never changes."""
    return shards.IndexedShards.open(uri, kind=latents.KIND)
