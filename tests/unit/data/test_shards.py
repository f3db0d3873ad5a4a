"""Indexed shards: deterministic bytes, exact reads, and no damage that goes unnoticed."""

import json
import pickle
import tarfile

import google_crc32c
import pytest
import webdataset

from latentray.checkpoint import manifest
from latentray.data import index, shards, tars
from latentray.errors import ArtifactError, DigestMismatch, InputMissing, UnsafeMember


def samples(n: int, first: int = 0) -> list[shards.Sample]:
    return [
        shards.Sample(
            key=f"{i:09d}",
            members={"png": bytes([i % 256]) * (100 + 97 * i), "txt": f"text {i}".encode(), "json": b"{}"},
            columns={"width": i, "sha256": i.to_bytes(32)},
        )
        for i in range(first, first + n)
    ]


@pytest.fixture
def data_set(tmp_path):
    """7 samples in two shards."""
    folder, uri = tmp_path / "built", tmp_path / "set"
    folder.mkdir()
    results = [
        shards.write_shard(samples(4), folder / "00000.tar"),
        shards.write_shard(samples(3, first=4), folder / "00001.tar"),
    ]
    index.write(results[::-1], folder / index.NAME)
    manifest.publish(folder, uri, kind="dataset")
    return uri


def test_bytes_are_deterministic_plain_ustar(tmp_path):
    results = [shards.write_shard(samples(5), tmp_path / name) for name in ("a.tar", "b.tar")]
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()
    assert results[0].table == results[1].table
    with tarfile.open(tmp_path / "a.tar") as tar:
        for member in tar:
            assert (member.mtime, member.uname, member.gname, member.uid) == (0, "", "", 0)
            assert member.pax_headers == {}


def test_long_and_foreign_keys(tmp_path):
    folder = tmp_path / "built"
    folder.mkdir()
    keys = ["d" * 90 + "/" + "k" * 60, "é中"]
    made = [shards.Sample(key=key, members={"txt": key.encode()}) for key in keys]
    index.write([shards.write_shard(made, folder / "00000.tar")], folder / index.NAME)
    manifest.publish(folder, tmp_path / "set", kind="dataset")
    opened = shards.IndexedShards.open(tmp_path / "set")
    assert [opened.read(x)["txt"].decode() for x in range(2)] == keys


def test_read_gives_what_was_written_in_canonical_order(data_set):
    opened = shards.IndexedShards.open(data_set)
    assert opened.count == 7
    assert [e.count for e in opened.shards] == [4, 3]
    for i, sample in enumerate(samples(7)):
        raw = opened.read(i)
        assert raw.pop("__key__") == sample.key
        assert raw.pop("__url__").endswith("00000.tar" if i < 4 else "00001.tar")
        assert raw == sample.members
    assert opened.column("width").to_pylist() == list(range(7))
    assert [opened.index.rows_of(n) for n in range(2)] == [range(4), range(4, 7)]
    opened.verify()


def test_index_locates_byte_ranges(data_set):
    opened = shards.IndexedShards.open(data_set)
    entry, offset, length = opened.locate(5)
    data = (data_set / entry.name).read_bytes()
    assert len(data) == entry.bytes
    assert length % 512 == 0
    assert data[offset:].startswith(b"000000005.json")
    assert google_crc32c.value(data[offset : offset + length]) == opened.index.table["crc32c"][5].as_py()
    assert opened.digest == manifest.read(data_set).files[index.NAME].sha256


def test_webdataset_reads_the_same(data_set, monkeypatch):
    monkeypatch.setenv("WDS_SECURE", "1")
    urls = [str(data_set / "00000.tar"), str(data_set / "00001.tar")]
    found = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert [s["__key__"] for s in found] == [s.key for s in samples(7)]
    assert found[6]["txt"] == b"text 6"


def test_pickled_object_reads_on(data_set):
    opened = shards.IndexedShards.open(data_set)
    opened.read(0)
    assert pickle.loads(pickle.dumps(opened)).read(6)["txt"] == b"text 6"
    opened.close()
    assert opened.read(0)["txt"] == b"text 0"


def test_few_file_handles_are_held(data_set, monkeypatch):
    monkeypatch.setattr(shards, "_OPEN_FILES", 1)
    opened = shards.IndexedShards.open(data_set)
    for x in (0, 6, 1, 5):
        assert opened.read(x)["txt"] == f"text {x}".encode()
        assert len(opened._files) == 1


@pytest.mark.parametrize("within", [0, 600, 1100])
def test_a_flipped_byte_is_refused_naming_shard_and_key(data_set, within):
    opened = shards.IndexedShards.open(data_set)
    entry, offset, _ = opened.locate(2)
    data = bytearray((data_set / entry.name).read_bytes())
    data[offset + within] ^= 1
    (data_set / entry.name).write_bytes(data)
    with pytest.raises(DigestMismatch, match="'000000002'") as caught:
        opened.read(2)
    assert caught.value.where.endswith("00000.tar")
    assert opened.read(1)["txt"] == b"text 1"
    with pytest.raises(DigestMismatch) as caught:
        opened.verify()
    assert caught.value.where.endswith("00000.tar")
    assert caught.value.mend


def test_a_cut_or_missing_shard_is_refused(data_set):
    path = data_set / "00001.tar"
    whole = path.read_bytes()
    path.write_bytes(whole[:1024])
    opened = shards.IndexedShards.open(data_set)
    with pytest.raises(DigestMismatch, match="00000000"):
        opened.read(6)
    with pytest.raises(DigestMismatch, match="bytes"):
        opened.verify()
    path.unlink()
    fresh = shards.IndexedShards.open(data_set)
    for call in (fresh.verify, lambda: fresh.read(6)):
        with pytest.raises(DigestMismatch, match="missing"):
            call()


def test_a_damaged_index_is_refused(data_set):
    path = data_set / index.NAME
    data = bytearray(path.read_bytes())
    data[40] ^= 1
    path.write_bytes(data)
    with pytest.raises(DigestMismatch):
        shards.IndexedShards.open(data_set)


def test_a_manifest_that_disagrees_with_the_index_is_refused(data_set):
    raw = json.loads((data_set / manifest.NAME).read_text())
    files = {name: manifest.FileEntry(**entry) for name, entry in raw["files"].items()}
    files["00000.tar"] = manifest.FileEntry(size=files["00000.tar"].size, sha256="0" * 64)
    manifest.seal(data_set, files, kind="dataset")
    with pytest.raises(DigestMismatch, match="disagree") as caught:
        shards.IndexedShards.open(data_set)
    assert caught.value.where.endswith("00000.tar")


def test_wrong_kind_missing_and_pipe_are_refused(data_set, tmp_path):
    with pytest.raises(ArtifactError):
        shards.IndexedShards.open(data_set, kind="latents")
    with pytest.raises(InputMissing):
        shards.IndexedShards.open(tmp_path / "nothing")
    with pytest.raises(UnsafeMember):
        shards.IndexedShards.open("pipe:cat x")


def test_unsafe_members_are_neither_written_nor_read(tmp_path, data_set):
    bad = shards.Sample(key="a", members={"pkl": b"x"})
    with pytest.raises(UnsafeMember):
        shards.write_shard([bad], tmp_path / "bad.tar")
    with pytest.raises(UnsafeMember):
        shards.write_shard([shards.Sample(key="../a", members={"txt": b"x"})], tmp_path / "bad.tar")
    with open(tmp_path / "bad.tar", "wb") as file, webdataset.TarWriter(file, encoder=False, mtime=0) as writer:
        writer.write({"__key__": "a", "pyd": b"x"})
    with pytest.raises(UnsafeMember, match=r"a\.pyd"):
        tars.contents((tmp_path / "bad.tar").read_bytes()[:1024], shard="bad.tar")


def test_latents_use_the_same_layout(tmp_path):
    folder = tmp_path / "built"
    folder.mkdir()
    made = [shards.Sample(key="a_0", members={"latent.safetensors": b"1", "json": b"{}"}, columns={"source": "a"})]
    index.write([shards.write_shard(made, folder / "00000.tar")], folder / index.NAME)
    manifest.publish(folder, tmp_path / "set", kind="latents")
    opened = shards.IndexedShards.open(tmp_path / "set", kind="latents")
    assert set(opened.read(0)) == {"__key__", "__url__", "latent.safetensors", "json"}
    assert opened.column("source").to_pylist() == ["a"]
