"""The first stage of encoding: a part's samples are read, checked, decoded and cut, on any machine.

Between stages a part travels as a `Parcel`, one row of an Arrow table.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
from typing import Any

import numpy as np
import pyarrow as pa
import safetensors.torch
import torch

from latentray.checkpoint import store
from latentray.conditioning.images import Preprocessing
from latentray.data import latent_sources, latents, shards
from latentray.data.kinds import CLIPS, PICTURES
from latentray.data.latent_plan import VARIANTS, Cut, Part, Shape
from latentray.data.latent_sources import Source, Window
from latentray.errors import DataError, DigestMismatch, LatentrayError, SampleRejected, UnsafeMember
from latentray.records import LATENT_MEMBER, Damaged

FROM_PIXELS, FROM_LATENTS, FROM_RECORD = "pixels", "latents", "record"
"""How a unit comes about: encoded; its latents copied and its captions embedded, for they changed; copied as it is."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SplitJob:
    """One split of a data set, and the stores it becomes: one for each size of squares, or one of all buckets."""

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
    views: dict[str, Preprocessing] = dataclasses.field(default_factory=dict)
    """By vision encoder: how it is shown a picture."""
    shapes: tuple[tuple[Shape, ...], ...]
    """Of each bucket, what a unit is cut to for each store; there is one bucket where there are only squares."""
    window: Window | None
    """Of clips; None for pictures."""
    variants: tuple[int, ...]
    batch_size: int
    """Pictures or frames that are encoded together."""
    precision: str = "fp32"
    """What the autoencoder computes in."""
    latent_dtype: str
    text_dtype: str
    max_pixels: int
    skip_damaged: bool
    device: str

    @property
    def kind(self) -> str:
        """Of the data set."""
        return CLIPS if self.window else PICTURES

    @property
    def frames(self) -> int:
        """Pictures that a unit is at each shape."""
        return self.window.frames if self.window else 1

    @property
    def units_per_part(self) -> int:
        """So many units fill a batch, or one unit several."""
        return max(self.batch_size // self.frames, 1)

    @property
    def stores(self) -> int:
        """Stores of each split."""
        return len(self.shapes[0])

    @property
    def part_bytes(self) -> int:
        """Of a full part's pixels, where they are most."""
        most = max(sum(3 * height * width for height, width in of_bucket) for of_bucket in self.shapes)
        return most * self.units_per_part * self.frames


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
class _Unit:
    """What the first stage made of a unit: its `.json` for each store, and its pixels or what was copied."""

    how: str
    shown: list[dict[str, Any]]
    pixels: list[np.ndarray] = dataclasses.field(default_factory=list)
    views: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    copied: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)


def read_part(job: Job, part: Part) -> Parcel:
    """Read a part's samples: `pixels.<store>` uint8 (units to be encoded, H, W, 3) or (..., T, H, W, 3); of other units
    `kept.<unit>.<store>...`; for each vision encoder `view.<encoder>` (units to be encoded, h, w, 3).

    A unit that an older store holds is not decoded; where its captions are the same, its record passes as it is. Raises
    DataError or DigestMismatch for a sample that cannot be used, unless `skip_damaged` lists it as rejected.
    """
    split = job.splits[part.split]
    source = _opened(split.data, "dataset", split.data_digest)
    source.load_all(np.unique(part.units // VARIANTS).tolist())
    for uri, rows in zip(split.older, part.older.T.tolist(), strict=False):
        shards_of(uri).load_all(rows)
    older = part.older if len(part.older) else np.full((len(part.units), job.stores), -1)
    units: list[dict[str, Any]] = []
    pixels: dict[int, list[np.ndarray]] = {number: [] for number in range(job.stores)}
    views: dict[str, list[np.ndarray]] = {name: [] for name in job.views}
    kept: dict[str, torch.Tensor] = {}
    rejected: list[dict[str, str]] = []
    pairs = zip(part.units.tolist(), older.tolist(), strict=True)
    for row, group in itertools.groupby(pairs, lambda pair: pair[0] // VARIANTS):
        wanted = {unit % VARIANTS: records for unit, records in group}
        try:
            sample = latent_sources.read(source, row, job.kind)
            made = _made(job, split, sample, wanted, job.shapes[part.bucket])
        except LatentrayError as error:
            rejected.append(dataclasses.asdict(rejection(error, source, row, skip=job.skip_damaged)))
            continue
        for variant, one in made.items():
            for number, cut in enumerate(one.pixels):
                pixels[number].append(cut)
            for name, view in one.views.items():
                views[name].append(view)
            kept |= {f"kept.{len(units)}.{name}": tensor for name, tensor in one.copied.items()}
            about = {"unit": row * VARIANTS + variant, "key": f"{sample.key}_{variant}", "sha256": sample.digest.hex()}
            units.append(about | {"from": one.how, "json": one.shown})
    arrays = {f"pixels.{number}": torch.from_numpy(np.stack(some)) for number, some in pixels.items() if some}
    arrays |= {f"view.{name}": torch.from_numpy(np.stack(some)) for name, some in views.items() if some}
    place = {"split": part.split, "shard": part.shard, "number": part.number, "bucket": part.bucket}
    return Parcel(about=place | {"units": units, "rejected": rejected}, tensors=arrays | kept)


def rejection(error: LatentrayError, source: shards.IndexedShards, row: int, *, skip: bool) -> Damaged:
    """The damage that leaves a sample out. Raises the error where damage fails the job, or where it is an attack."""
    if isinstance(error, UnsafeMember) or not isinstance(error, DataError | DigestMismatch | SampleRejected):
        raise error
    if not skip and not isinstance(error, SampleRejected):
        raise error
    if not skip:
        raise DataError(
            f"The sample {source.key(row)!r} cannot be used: {error.what}",
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


def _made(
    job: Job, split: SplitJob, sample: Source, wanted: dict[int, list[int]], shapes: tuple[Shape, ...]
) -> dict[int, _Unit]:
    """The wanted variants of a sample, each copied where its rows in the older stores are given, else cut."""
    copies = {v: _copied(split, sample, records) for v, records in wanted.items() if min(records) >= 0}
    missing = [variant for variant in wanted if copies.get(variant) is None]
    cuts: dict[int, _Unit] = {}
    if missing:
        views = latent_sources.views(sample, job.views, max_pixels=job.max_pixels)
        made = latent_sources.CUT[job.kind](sample, shapes, missing, max_pixels=job.max_pixels, window=job.window)
        for variant, several in made.items():
            shown = [_shown(sample, variant, one, job.window) for one in several]
            cuts[variant] = _Unit(how=FROM_PIXELS, pixels=[one.pixels for one in several], shown=shown, views=views)
    return {variant: copies.get(variant) or cuts[variant] for variant in wanted}


def _shown(sample: Source, variant: int, cut: Cut, window: Window | None) -> dict[str, Any]:
    """The `.json` of a record."""
    told: dict[str, Any] = {
        "captions": sample.captions,
        "source": sample.key,
        "source_sha256": sample.digest.hex(),
        **{name: list(pair) for name, pair in dataclasses.asdict(cut.conditioning).items()},
        "flip": bool(variant % 2),
    } | _labelled(sample)
    return told | (dataclasses.asdict(window) | {"begin": cut.begin} if window else {})


def _labelled(sample: Source) -> dict[str, int]:
    return {} if sample.label is None else {"label": sample.label}


def _copied(split: SplitJob, sample: Source, rows: list[int]) -> _Unit | None:
    """A unit from the older stores; None where a record there is damaged, or is of another file than its index says."""
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
        about.pop("label", None)
        shown.append(about | {"captions": sample.captions, "source": sample.key} | _labelled(sample))
        records.append(raw[LATENT_MEMBER])
    if same:
        whole = {str(i): torch.frombuffer(bytearray(one), dtype=torch.uint8) for i, one in enumerate(records)}
        return _Unit(how=FROM_RECORD, shown=shown, copied=whole)
    loaded = [safetensors.torch.load(one) for one in records]
    both = {f"{i}.{name}": one[name] for i, one in enumerate(loaded) for name in ("mean", "logvar")}
    both |= {name: tensor for name, tensor in loaded[0].items() if name.startswith("image.")}
    return _Unit(how=FROM_LATENTS, shown=shown, copied=both)


@functools.lru_cache(maxsize=16)
def shards_of(uri: str) -> shards.IndexedShards:
    """An older store, opened once per process: it never changes."""
    return shards.IndexedShards.open(uri, kind=latents.KIND)
