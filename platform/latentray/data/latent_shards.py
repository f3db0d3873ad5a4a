"""The last stages of encoding: an encoded part becomes a file of finished records, and a shard's parts become the shard.

An output shard has its input's name. In it records are sorted by bucket, so that a reader of one shape reads neighbours,
then by unit. Its tars, one for each store, are uploaded first and their sidecars last: a sidecar is the commit of its shard,
and holds its entry, its index rows and what was left out.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import io
import json
import tarfile
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import torch

from latentray.checkpoint import store
from latentray.data import index, latents, shards
from latentray.data.latent_parts import FROM_LATENTS, FROM_PIXELS, FROM_RECORD, Job, Parcel, SplitJob
from latentray.data.latent_plan import VARIANTS
from latentray.data.latents import CONDITIONS, LABEL
from latentray.errors import DigestMismatch
from latentray.records import LATENT_MEMBER

_ABOUT = b"latentray.part"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Committed:
    """What a sidecar holds: a finished shard of one store."""

    result: index.ShardResult | None
    """Its entry and index rows; None where every sample was rejected."""
    counts: dict[str, int]
    """How many units were `encoded`, `copied`, or `captioned` anew with copied latents."""
    rejected: list[dict[str, str]]

    def to_bytes(self) -> bytes:
        about = json.dumps({"counts": self.counts, "rejected": self.rejected}, sort_keys=True)
        return about.encode() + b"\n" + (self.result.to_bytes() if self.result else b"")

    @classmethod
    def from_bytes(cls, data: bytes) -> Committed:
        about, _, rest = data.partition(b"\n")
        return cls(result=index.ShardResult.from_bytes(rest) if rest else None, **json.loads(about))


COUNTED = {FROM_PIXELS: "encoded", FROM_LATENTS: "captioned", FROM_RECORD: "copied"}


def sidecar(split: SplitJob, out: str, name: str) -> str:
    """Where the sidecar of a shard is."""
    return store.join(out, f"{name}.{split.plan[:16]}.rows")


def committed(split: SplitJob, name: str) -> bool:
    """True where a shard is finished in every store."""
    return all(store.exists(sidecar(split, out, name)) for out in split.outs)


def write_part(job: Job, parcel: Parcel) -> str:
    """Write an encoded part's records where the shard's assembly finds them; the file's name, which holds its digest."""
    about = parcel.about
    table = pa.Table.from_pylist(list(_records(job, parcel)), schema=_schema(job))
    counts = collections.Counter(COUNTED[unit["from"]] for unit in about["units"])
    meta = json.dumps({"counts": counts, "rejected": about["rejected"]}, sort_keys=True)
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, table.schema.with_metadata({_ABOUT: meta.encode()})) as writer:
        writer.write_table(table)
    data = sink.getvalue()
    name = part_name(about["shard"], about["number"], data)
    store.write_bytes(store.join(job.splits[about["split"]].parts, name), data)
    return name


def part_name(shard: int, number: int, data: bytes) -> str:
    return f"{shard:05d}-{number:05d}-{hashlib.sha256(data).hexdigest()[:16]}.part"


def parts_there(split: SplitJob) -> dict[tuple[int, int], str]:
    """(shard, number) -> file name of the parts that an earlier run of this job left."""
    found = [name for name in store.list_files(split.parts) if name.endswith(".part")]
    return {(int(shard), int(number)): name for name in found for shard, number, _ in [name.split("-")]}


def _schema(job: Job) -> pa.Schema:
    columns = [("bucket", pa.int64()), ("unit", pa.int64()), ("key", pa.large_string())]
    columns += [("source_sha256", pa.binary(32))]
    for store_ in range(job.stores):
        columns += [(f"record.{store_}", pa.large_binary()), (f"json.{store_}", pa.large_binary())]
    return pa.schema(columns)


def _records(job: Job, parcel: Parcel) -> Iterator[dict[str, Any]]:
    places = {caption: i for i, caption in enumerate(parcel.about["captions"])}
    encoded = 0
    for number, unit in enumerate(parcel.about["units"]):
        row = {"bucket": parcel.about["bucket"], "unit": unit["unit"], "key": unit["key"]}
        row["source_sha256"] = bytes.fromhex(unit["sha256"])
        texts = _texts(parcel, [places[c] for c in unit["json"][0]["captions"]] if unit["from"] != FROM_RECORD else [])
        for i in range(job.stores):
            shown = json.dumps(unit["json"][i], sort_keys=True, ensure_ascii=False)
            row[f"json.{i}"] = shown.encode(errors="surrogateescape")
            if unit["from"] == FROM_RECORD:
                row[f"record.{i}"] = parcel.tensors[f"kept.{number}.{i}"].numpy().tobytes()
                continue
            if unit["from"] == FROM_LATENTS:
                both = [parcel.tensors[f"kept.{number}.{i}.{name}"] for name in ("mean", "logvar")]
                seen = _named(parcel, f"kept.{number}.image.")
            else:
                both = [parcel.tensors[f"{name}.{i}"][encoded] for name in ("mean", "logvar")]
                seen = {name: tensor[encoded] for name, tensor in _named(parcel, "image.").items()}
            row[f"record.{i}"] = latents.record(both[0], both[1], texts | seen)[LATENT_MEMBER]
        encoded += unit["from"] == FROM_PIXELS
        yield row


def _named(parcel: Parcel, begin: str) -> dict[str, torch.Tensor]:
    """The tensors whose names begin so, under their names from `image.` on."""
    cut = begin.index("image.")
    return {name[cut:]: tensor for name, tensor in parcel.tensors.items() if name.startswith(begin)}


def _texts(parcel: Parcel, rows: list[int]) -> dict[str, torch.Tensor]:
    return {name: tensor[rows] for name, tensor in parcel.tensors.items() if name.startswith("text.")} if rows else {}


def record_bytes(job: Job, parcel: Parcel) -> int:
    """What an encoded part takes in its shards, tar blocks and all."""
    members = [f"{name}.{i}" for i in range(job.stores) for name in ("record", "json")]
    lengths = (len(row[member]) for row in _records(job, parcel) for member in members)
    return sum(tarfile.BLOCKSIZE * (1 - -length // tarfile.BLOCKSIZE) for length in lengths)


def assemble(job: Job, split_number: int, name: str, parts: Sequence[str]) -> None:
    """Write a shard from its parts, in every store, and commit it.

    Raises DigestMismatch where a part's file was damaged.
    """
    split = job.splits[split_number]
    if committed(split, name):  # by this very task, before its node was lost
        return
    tables = [_read_part(split, part) for part in parts]
    counts: collections.Counter[str] = collections.Counter()
    rejected: dict[str, dict[str, str]] = {}
    for table in tables:
        about = json.loads(table.schema.metadata[_ABOUT])
        counts.update(about["counts"])
        rejected |= {
            one["key"]: one for one in about["rejected"]
        }  # a picture whose variants lie in two parts counts once
    joined = pa.concat_tables([table.replace_schema_metadata(None) for table in tables])
    joined = joined.sort_by([("bucket", "ascending"), ("unit", "ascending")])
    commits = []
    for number, out in enumerate(split.outs):
        result = _write_shard(joined, number, store.join(out, name)) if len(joined) else None
        commits.append(
            Committed(result=result, counts=dict(counts), rejected=[rejected[key] for key in sorted(rejected)])
        )
    for out, one in zip(split.outs, commits, strict=True):
        store.write_bytes(sidecar(split, out, name), one.to_bytes())
    for part in parts:
        store.delete(store.join(split.parts, part))


def _read_part(split: SplitJob, name: str) -> pa.Table:
    where = store.join(split.parts, name)
    data = store.read_bytes(where)
    shard, number, _ = name.split("-")
    if part_name(int(shard), int(number), data) != name:
        store.delete(where)
        raise DigestMismatch(
            "A file of encoded records was damaged, and is deleted.", where=where, mend="Run the job again: it goes on."
        )
    return pa.ipc.open_stream(data).read_all()


def _write_shard(table: pa.Table, number: int, uri: str) -> index.ShardResult:
    with store.staging() as folder:
        path = folder / uri.rsplit("/", 1)[-1]
        result = shards.write_shard(_samples(table, number), path)
        store.upload(path, uri)
    return result


def _samples(table: pa.Table, number: int) -> Iterator[shards.Sample]:
    columns = ("unit", "key", "source_sha256", f"record.{number}", f"json.{number}")
    for i in range(len(table)):
        unit, key, digest, record, shown = (table[name][i].as_py() for name in columns)
        told = json.loads(shown)
        height, width = told["target_size"]
        about = {"width": width, "height": height, "source_sha256": digest, "variant": unit % VARIANTS}
        about |= dict(zip(CONDITIONS, (*told["original_size"], *told["crop_top_left"]), strict=True))
        about |= {name: told[name] for name in latents.OF_CLIPS if name in told} | {LABEL: told.get(LABEL)}
        yield shards.Sample(key=key, members={LATENT_MEMBER: record, "json": shown}, columns=about)
