"""Parts' files and shards: equal bytes however often and in whatever order, committed once."""

import dataclasses
import itertools
import json

import pytest
import torch

from latentray.checkpoint import store
from latentray.data import index, latent_shards, members, tars
from latentray.data.latent_parts import FROM_LATENTS, FROM_PIXELS, FROM_RECORD, Job, Parcel, SplitJob
from latentray.data.latent_plan import VARIANTS
from latentray.data.latent_shards import Committed
from latentray.errors import DigestMismatch, InputMissing

SIZES = (64, 32)


@pytest.fixture
def job(tmp_path) -> Job:
    split = SplitJob(
        data="unused", data_digest="", outs=(str(tmp_path / "64"), str(tmp_path / "32")), older=(),
        parts=str(tmp_path / "64" / "parts-x"), plan="a" * 64,
    )  # fmt: skip
    return Job(
        splits=(split,), samples=9, autoencoder="", texts=(), shapes=(tuple((size, size) for size in SIZES),),
        window=None, variants=(0,), batch_size=4,
        latent_dtype="float32", text_dtype="float32", max_pixels=1, skip_damaged=True, device="cpu",
    )  # fmt: skip


def parcel(number: int, rows: list[int], rejected: tuple[str, ...] = (), bucket: int = 0) -> Parcel:
    """An encoded part whose latents are filled with their rows."""
    units = [
        {"unit": row * VARIANTS, "key": f"k{row}_0", "sha256": f"{row:064x}", "from": FROM_PIXELS,
         "json": [{"captions": [f"c{row % 2}"], "target_size": [size, size], "original_size": [90, 70], "crop_top_left": [row, 0]}
                  for size in SIZES]}
        for row in rows
    ]  # fmt: skip
    tensors = {"text.clip.tokens": torch.tensor([0.0, 1.0])[:, None]}
    for nth, size in enumerate(SIZES):
        values = torch.tensor([float(row) for row in rows])[:, None, None, None].expand(-1, 2, size // 8, size // 8)
        tensors |= {f"mean.{nth}": values, f"logvar.{nth}": -values}
    listed = [{"key": key, "reason": "format", "shard": "s", "what": "w"} for key in rejected]
    place = {"split": 0, "shard": 0, "number": number, "bucket": bucket}
    return Parcel(about=place | {"units": units, "captions": ["c0", "c1"], "rejected": listed}, tensors=tensors)


def test_a_shard_has_the_same_bytes_in_whatever_order_its_parts_come(job, tmp_path):
    parts = [parcel(0, [0, 3, 6]), parcel(1, [1, 4]), parcel(2, [5], rejected=("k2",))]
    seen = set()
    for order in itertools.permutations(parts):
        names = [latent_shards.write_part(job, one) for one in order]
        assert latent_shards.parts_there(job.splits[0]) == {(0, int(name.split("-")[1])): name for name in names}
        assert not latent_shards.committed(job.splits[0], "00000.tar")
        latent_shards.assemble(job, 0, "00000.tar", names)
        assert latent_shards.committed(job.splits[0], "00000.tar") and not latent_shards.parts_there(job.splits[0])
        found = []
        for out in job.splits[0].outs:
            sidecar = latent_shards.sidecar(job.splits[0], out, "00000.tar")
            one = Committed.from_bytes(store.read_bytes(sidecar))
            assert one.result.entry.sha256 == store.sha256_of(store.local_path(out) / "00000.tar")
            assert one.result.table["key"].to_pylist() == [f"k{row}_0" for row in (0, 1, 3, 4, 5, 6)]
            assert one.counts == {"encoded": 6} and [r["key"] for r in one.rejected] == ["k2"]
            found.append(one.result.entry.sha256)
            store.delete(sidecar)
        seen.add(tuple(found))
    assert len(seen) == 1


def test_records_are_sorted_by_bucket_and_then_by_unit(job, tmp_path):
    parts = [parcel(0, [1, 4], bucket=1), parcel(1, [0, 6], bucket=0), parcel(2, [2], bucket=1)]
    latent_shards.assemble(job, 0, "00000.tar", [latent_shards.write_part(job, one) for one in parts])
    sidecar = store.read_bytes(latent_shards.sidecar(job.splits[0], job.splits[0].outs[0], "00000.tar"))
    table = Committed.from_bytes(sidecar).result.table
    assert table["key"].to_pylist() == [f"k{row}_0" for row in (0, 6, 1, 2, 4)]
    assert table["offset"].to_pylist() == sorted(table["offset"].to_pylist())


def test_a_record_has_its_own_latent_and_the_embeddings_of_its_captions(job, tmp_path):
    latent_shards.assemble(job, 0, "00000.tar", [latent_shards.write_part(job, parcel(0, [2, 5]))])
    for size, out in zip(SIZES, job.splits[0].outs, strict=True):
        sidecar = store.read_bytes(latent_shards.sidecar(job.splits[0], out, "00000.tar"))
        table = Committed.from_bytes(sidecar).result.table
        assert table["crop_top"].to_pylist() == [2, 5]
        assert set(table["original_height"].to_pylist()) == {90}
        assert table["source_sha256"].to_pylist() == [bytes.fromhex(f"{row:064x}") for row in (2, 5)]
        data = (store.local_path(out) / "00000.tar").read_bytes()
        for row, offset, length in zip((2, 5), table["offset"].to_pylist(), table["length"].to_pylist(), strict=True):
            sample = members.decode_sample(tars.contents(data[offset : offset + length], shard="x")[1])
            tensors = sample["latent.safetensors"]
            assert tensors["mean"].shape == (2, size // 8, size // 8)
            assert (tensors["mean"] == row).all() and (tensors["logvar"] == -row).all()
            assert tensors["text.clip.tokens"].tolist() == [[float(row % 2)]]
            assert sample["json"]["target_size"] == [size, size]


def test_a_finished_shard_is_not_assembled_again(job, tmp_path):
    names = [latent_shards.write_part(job, parcel(0, [0, 1]))]
    latent_shards.assemble(job, 0, "00000.tar", names)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.tar")}
    latent_shards.assemble(job, 0, "00000.tar", names)  # its parts are gone: a task that Ray tries again
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.tar")} == before
    with pytest.raises(InputMissing):
        latent_shards.assemble(job, 0, "00001.tar", names)


def test_a_damaged_part_is_refused_and_makes_way(job, tmp_path):
    name = latent_shards.write_part(job, parcel(0, [0, 1]))
    path = store.local_path(job.splits[0].parts) / name
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DigestMismatch) as caught:
        latent_shards.assemble(job, 0, "00000.tar", [name])
    assert name in caught.value.where and not path.exists()


def test_a_shard_of_which_nothing_is_usable_is_committed_without_a_tar(job, tmp_path):
    latent_shards.assemble(job, 0, "00000.tar", [latent_shards.write_part(job, parcel(0, [], rejected=("a", "b")))])
    assert not list(tmp_path.rglob("*.tar"))
    sidecar = latent_shards.sidecar(job.splits[0], job.splits[0].outs[0], "00000.tar")
    found = Committed.from_bytes(store.read_bytes(sidecar))
    assert found.result is None and [one["key"] for one in found.rejected] == ["a", "b"]


def test_a_sidecar_survives_its_bytes():
    entry = index.ShardEntry(name="x", sha256="y", bytes=3, count=1)
    rows = [{"key": "k", "offset": 0, "length": 3, "crc32c": 7, "source_sha256": b"\n\0", "variant": 2}]
    one = Committed(result=index.ShardResult.of(entry, rows), counts={"encoded": 1}, rejected=[{"what": "a\nb"}])
    again = Committed.from_bytes(one.to_bytes())
    assert again.result.table.equals(one.result.table) and again.result.entry == entry
    assert dataclasses.replace(again, result=None) == dataclasses.replace(one, result=None)


def test_the_bytes_of_a_part_are_those_of_its_tars(job, tmp_path):
    one = parcel(0, [0, 1, 2])
    latent_shards.assemble(job, 0, "00000.tar", [latent_shards.write_part(job, one)])
    written = sum(path.stat().st_size for path in tmp_path.rglob("*.tar"))
    blocks = latent_shards.record_bytes(job, one)
    assert blocks <= written <= blocks + 2 * 10_240  # a tar is padded to records of 20 blocks


def test_copied_records_pass_and_copied_latents_get_new_text(job, tmp_path):
    one = parcel(0, [0, 1, 2])
    for unit, how in zip(one.about["units"], (FROM_RECORD, FROM_LATENTS, FROM_PIXELS), strict=True):
        unit["from"] = how
    one.about["units"][2]["json"][0]["captions"] = ["c1"]
    kept = {f"kept.0.{i}": torch.tensor(list(b"whole record"), dtype=torch.uint8) for i in range(2)}
    copied = {f"kept.1.{i}.{name}": torch.full((2, 4, 4), 9.0) for i in range(2) for name in ("mean", "logvar")}
    encoded = {name: t[2:] if name[0] in "ml" else t for name, t in one.tensors.items()}
    given = Parcel(about=one.about, tensors=encoded | kept | copied)
    rows = list(latent_shards._records(job, given))
    assert rows[0]["record.0"] == rows[0]["record.1"] == b"whole record"
    second, third = (
        members.decode_sample({"latent.safetensors": row["record.0"]})["latent.safetensors"] for row in rows[1:]
    )
    assert (second["mean"] == 9).all() and second["text.clip.tokens"].tolist() == [[1.0]]
    assert (third["mean"] == 2).all() and third["text.clip.tokens"].tolist() == [[1.0]]
    assert json.loads(rows[2]["json.0"])["captions"] == ["c1"]
