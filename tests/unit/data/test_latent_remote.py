"""Parts of remote shards: their ranges come side by side, once each, and give the same pixels as from a disk."""

import functools
import hashlib
import io
import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image

from latentray.checkpoint import manifest, store
from latentray.data import index, latent_parts, latent_plan, shards
from latentray.data.blocks import BlockCache
from latentray.data.latent_parts import Job, SplitJob
from latentray.data.latent_plan import Part
from latentray.errors import DigestMismatch, StorageFailed

N, BLOCK = 40, 1 << 13


class Watched:
    """Reads from the store, slowly; what was asked for, and how many requests were on their way at a time."""

    def __init__(self) -> None:
        self.lock, self.now, self.most, self.asked, self.broken = threading.Lock(), 0, 0, [], False
        self.read = store.read_range

    def __call__(self, uri: str, offset: int, length: int) -> bytes:
        with self.lock:
            self.now += 1
            self.most = max(self.most, self.now)
            self.asked.append((uri, offset, length))
        try:
            time.sleep(0.05)  # a request's latency
            if self.broken:
                raise OSError("503 slow down")
            return self.read(uri, offset, length)
        finally:
            with self.lock:
                self.now -= 1


def picture(number: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 255, (64, 64 + number % 3 * 32, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


@pytest.fixture
def watched(monkeypatch, tmp_path) -> Watched:
    monkeypatch.setenv("LATENTRAY_CACHE", str(tmp_path / "cache"))
    one = Watched()
    for name, value in (("read", one), ("block_bytes", BLOCK)):
        monkeypatch.setitem(BlockCache.__init__.__kwdefaults__, name, value)
    yield one
    store._ranged.cache_clear()
    latent_parts._opened.cache_clear()


@pytest.fixture
def splits(tmp_path, moto_s3, watched) -> tuple[SplitJob, SplitJob]:
    """The same data on this machine and in an object store."""
    samples = [
        shards.Sample(
            key=f"k{i:03d}", members={"png": picture(i), "txt": b"x"},
            columns={"sha256": hashlib.sha256(picture(i)).digest()},
        )
        for i in range(N)
    ]  # fmt: skip
    (tmp_path / "built").mkdir()
    index.write([shards.write_shard(samples, tmp_path / "built" / "00000.tar")], tmp_path / "built" / index.NAME)
    make = functools.partial(SplitJob, outs=("unused",), older=(), parts="unused", plan="0" * 64)
    uris = [str(tmp_path / "data"), moto_s3.uri("data")]
    digests = [manifest.publish(tmp_path / "built", uri, kind="dataset").digest for uri in uris]
    return tuple(make(data=uri, data_digest=digest) for uri, digest in zip(uris, digests, strict=True))


def job(split: SplitJob) -> Job:
    return Job(
        splits=(split,), samples=N, autoencoder="", texts=(), shapes=(((64, 64),),), window=None, variants=(0,),
        batch_size=N, latent_dtype="float32", text_dtype="float32", max_pixels=10**6, skip_damaged=False, device="cpu",
    )  # fmt: skip


def part(rows: list[int]) -> Part:
    units = np.array(rows, np.int64) * latent_plan.VARIANTS
    return Part(split=0, shard=0, number=0, bucket=0, units=units, older=np.empty((0, 1), np.int64))


@pytest.mark.parametrize("rows", [list(range(N)), list(range(0, N, 3)), [N - 1]])
def test_the_ranges_of_a_part_come_side_by_side_and_once(splits, watched, rows):
    near, far = (latent_parts.read_part(job(split), part(rows)) for split in splits)
    assert torch.equal(near.tensors["pixels.0"], far.tensors["pixels.0"])
    assert near.about["units"] == far.about["units"]
    blocks = [n for _, offset, length in watched.asked for n in range(offset // BLOCK, -(-(offset + length) // BLOCK))]
    opened = shards.IndexedShards.open(splits[0].data)
    places = [opened.locate(x) for x in rows]
    needed = {n for _, at, length in places for n in range(at // BLOCK, (at + length - 1) // BLOCK + 1)}
    assert sorted(blocks) == sorted(needed)  # nothing twice, and nothing that no sample of the part needs
    assert all(length <= 4 * BLOCK for _, _, length in watched.asked)
    assert watched.most == min(8, len(watched.asked))
    latent_parts.read_part(job(splits[1]), part(rows))
    assert len(watched.asked) == len(set(watched.asked))  # a second reader finds them on this machine


def test_records_of_an_older_store_come_side_by_side_too(splits, watched):
    _, far = splits
    opened = shards.IndexedShards.open(far.data)
    opened.load_all([])
    assert not watched.asked
    opened.load_all(range(N))
    assert watched.most == min(8, len(watched.asked))
    asked = len(watched.asked)
    assert [opened.read(x)["txt"] for x in range(N)] == [b"x"] * N
    assert len(watched.asked) == asked


def test_a_store_that_is_down_is_told_as_such(splits, watched):
    opened = shards.IndexedShards.open(splits[1].data, budget_s=0.2)
    watched.broken = True
    began = time.perf_counter()
    with pytest.raises(StorageFailed, match="could not be read for 0.2 s"):
        opened.load_all(range(N))
    assert time.perf_counter() - began < 5


def test_damage_is_found_where_the_sample_is_read_and_no_sooner(splits, watched, moto_s3):
    victim = moto_s3.uri("data", "00000.tar")
    whole = store.read_bytes(victim)
    opened = shards.IndexedShards.open(splits[1].data)
    store.write_bytes(victim, whole[: len(whole) // 2])
    opened.load_all(range(N))
    store.delete(victim)
    opened.load_all(range(N))
    with pytest.raises(DigestMismatch, match="missing"):
        opened.read(N - 1)
