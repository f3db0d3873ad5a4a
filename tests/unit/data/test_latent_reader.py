"""The latent reader gives what decoding members gives, whatever the layout, the order, or what it gave before."""

import concurrent.futures
import io
import pickle
import tarfile

import numpy as np
import pytest
import safetensors.torch
import torch

from latentray.checkpoint import manifest
from latentray.data import index, latent_reader, members, shards
from latentray.data.latent_batches import latent_batches
from latentray.data.latent_reader import LatentReader
from latentray.data.ordering import Order, Whole
from latentray.data.pipeline import OrderedSource
from latentray.errors import DataError, UnsafeMember
from latentray.records import SampleId

N = 24


def record(number: int, captions: int) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(number)
    tensors = {
        "mean": torch.randn(4, 3, 5, generator=draw).to(torch.bfloat16),
        "logvar": torch.randn(4, 3, 5, generator=draw),
        "text.clip.tokens": torch.randn(captions, 3, 7, generator=draw).half(),
        "text.clip.mask": torch.ones(captions, 3, dtype=torch.uint8),
        "text.clip.pooled": torch.randn(captions, 7, generator=draw).half(),
    }
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def publish(root, first=0, captions=lambda i: 1 + i % 3):
    folder = root / "built"
    folder.mkdir(parents=True)
    made = []
    for shard in range(2):
        some = [
            shards.Sample(
                key=f"{i:05d}_0",
                members={
                    "latent.safetensors": safetensors.torch.save(record(i, captions(i))),
                    "json": b"{}" + b" " * (40 * (i % 5)),
                },
            )
            for i in range(first + shard * N // 2, first + (shard + 1) * N // 2)
        ]
        made.append(shards.write_shard(some, folder / shards.shard_name(shard)))
    index.write(made, folder / index.NAME)
    manifest.publish(folder, root / "set", kind="latents")
    return shards.IndexedShards.open(root / "set", kind="latents")


def ids(xs, dataset=0):
    return [SampleId(epoch=0, dataset=dataset, index=x) for x in xs]


def by_place(rows):
    return {
        place: {name: tensor[row] for name, tensor in one.tensors.items()}
        for one in rows
        for row, place in enumerate(one.places)
    }


def test_it_gives_what_decoding_gives(tmp_path):
    data = publish(tmp_path)
    order = np.random.default_rng(0).permutation(N).tolist()
    rows, found = LatentReader([data]).read(ids(order))
    assert found == [None] * N
    got = by_place(rows)
    for place, x in enumerate(order):
        expected = members.decode_sample(data.read(x))["latent.safetensors"]
        assert got[place].keys() == expected.keys()
        for name, tensor in expected.items():
            assert got[place][name].dtype == tensor.dtype
            assert torch.equal(got[place][name], tensor)


def test_what_it_gave_keeps_its_values(tmp_path):
    data = publish(tmp_path, captions=lambda i: 1)
    reader = LatentReader([data])
    kept = [by_place(reader.read(ids(range(i, i + 4)))[0]) for i in range(N - 4)]
    for i, got in enumerate(kept):
        for place in range(4):
            assert torch.equal(got[place]["logvar"], record(i + place, 1)["logvar"])


def test_what_it_gave_and_nobody_holds_is_used_again_by_the_next_reader_too(tmp_path, monkeypatch):
    monkeypatch.setattr(latent_reader, "_POOL", latent_reader._Pool())
    data = publish(tmp_path, captions=lambda i: 1)
    held = [LatentReader([data]).read(ids(range(4))) for _ in range(3)]
    assert len(latent_reader._POOL) >= 3
    before = len(latent_reader._POOL)
    held.clear()
    for i in range(10):
        LatentReader([data]).read(ids(range(i, i + 4)))
    assert len(latent_reader._POOL) <= before


def test_threads_share_the_buffers_and_no_values(tmp_path):
    data = publish(tmp_path, captions=lambda i: 1)
    wanted = {x: record(x, 1)["mean"] for x in range(N)}

    def read(first: int) -> bool:
        reader = LatentReader([pickle.loads(pickle.dumps(data))])
        for i in range(200):
            xs = [(first + i + k) % N for k in range(4)]
            got = by_place(reader.read(ids(xs))[0])
            if not all(torch.equal(got[place]["mean"], wanted[x]) for place, x in enumerate(xs)):
                return False
        return True

    with concurrent.futures.ThreadPoolExecutor(3) as threads:
        assert all(threads.map(read, (0, 7, 13)))


def test_latents_of_clips_are_read_as_they_are(tmp_path):
    """(T, C, h, w) each; the frames keep their order."""
    made = [
        shards.Sample(
            key=f"{i:05d}_0",
            members={
                "latent.safetensors": safetensors.torch.save(
                    record(i, 1)
                    | {
                        "mean": torch.randn(6, 4, 3, 5, generator=torch.Generator().manual_seed(i)),
                        "logvar": torch.full((6, 4, 3, 5), -float(i)),
                    }
                ),
                "json": b"{}",
            },
        )
        for i in range(N)
    ]
    folder = tmp_path / "built"
    folder.mkdir()
    index.write([shards.write_shard(made, folder / "00000.tar")], folder / index.NAME)
    manifest.publish(folder, tmp_path / "set", kind="latents")
    data = shards.IndexedShards.open(tmp_path / "set", kind="latents")
    for batch in latent_batches(OrderedSource([data], Order.of(N, 1, 8), last_step=3)):
        assert batch.mean_BChw.shape == (8, 6, 4, 3, 5)
        for row, one in enumerate(batch.ids):
            drawn = torch.Generator().manual_seed(one.index)
            assert torch.equal(batch.mean_BChw[row], torch.randn(6, 4, 3, 5, generator=drawn))
            assert (batch.logvar_BChw[row] == -one.index).all()


def test_a_mixture_keeps_the_order_of_the_slots(tmp_path):
    sets = [publish(tmp_path / "a"), publish(tmp_path / "b", first=1000)]
    order = Order.mixture([Whole(N), Whole(N)], [2, 1], 3, (12,))
    for t, batch in enumerate(latent_batches(OrderedSource(sets, order, last_step=6))):
        assert batch.ids == order.step(t).ids
        for row, one in enumerate(batch.ids):
            wanted = record(one.index + 1000 * one.dataset, 1 + (one.index + 1000 * one.dataset) % 3)
            assert torch.equal(batch.mean_BChw[row], wanted["mean"].float())


def test_foreign_members_take_the_careful_way(tmp_path):
    folder = tmp_path / "built"
    folder.mkdir()
    latent = safetensors.torch.save(record(3, 1))
    for name, extra in (("00000.tar", ("txt", b"x")), ("00001.tar", ("pyd", b"x"))):
        with tarfile.open(folder / name, "w", format=tarfile.PAX_FORMAT) as tar:
            for extension, data in (extra, ("latent.safetensors", latent)):
                info = tarfile.TarInfo(f"a_0.{extension}")
                info.size, info.pax_headers = len(data), {"comment": "made elsewhere"}
                tar.addfile(info, io.BytesIO(data))
    results = []
    for name in ("00000.tar", "00001.tar"):
        data = (folder / name).read_bytes().rstrip(b"\0")
        data += bytes(-len(data) % 512)
        import google_crc32c

        row = {"key": "a_0", "offset": 0, "length": len(data), "crc32c": google_crc32c.value(data)}
        (folder / name).write_bytes(data)
        entry = index.ShardEntry(name=name, sha256=manifest.entry_of(folder / name).sha256, bytes=len(data), count=1)
        results.append(index.ShardResult.of(entry, [row]))
    index.write(results, folder / index.NAME)
    manifest.publish(folder, tmp_path / "set", kind="latents")
    reader = LatentReader([shards.IndexedShards.open(tmp_path / "set", kind="latents")], skip_damaged=True)
    rows, _ = reader.read(ids([0]))
    assert torch.equal(by_place(rows)[0]["mean"], record(3, 1)["mean"])
    with pytest.raises(UnsafeMember):
        reader.read(ids([1]))


def test_a_record_that_is_none_is_refused(tmp_path):
    folder = tmp_path / "built"
    folder.mkdir()
    some = [shards.Sample(key="a_0", members={"latent.safetensors": b"\x05\0\0\0\0\0\0\0{nope", "json": b"{}"})]
    index.write([shards.write_shard(some, folder / "00000.tar")], folder / index.NAME)
    manifest.publish(folder, tmp_path / "set", kind="latents")
    with pytest.raises(DataError, match="header"):
        LatentReader([shards.IndexedShards.open(tmp_path / "set", kind="latents")]).read(ids([0]))
