"""A user's tars: adopted where they are, packed anew, given new captions; and no damage or loss that is not told."""

import collections
import hashlib
import io
import json
import os
import pickle
import tarfile

import numpy as np
import pytest
import webdataset
from PIL import Image

from latentray.checkpoint import manifest, store
from latentray.config.build_shards import BuildShards, FilterConfig, SourceConfig
from latentray.data import shard_building, shards
from latentray.errors import ConfigError, DataError, DigestMismatch, EnvironmentRefused


@pytest.fixture(autouse=True)
def in_process(monkeypatch):
    """Survey and pack in this process: the graphs' functions, without Ray."""

    def run(task, jobs, config, captions):
        for job in reversed(jobs):  # workers finish in any order
            row = shard_building._row({"job": json.dumps(job)}, task=task, config=config, captions=captions)
            if row["error"]:
                raise pickle.loads(row["error"])
            yield row

    monkeypatch.setattr(shard_building, "_run", run)


def picture(seed: int, size=(20, 12), kind: str = "JPEG", **options) -> bytes:
    low = np.random.default_rng(seed).integers(0, 255, (4, 4, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(low).resize(size, Image.Resampling.BICUBIC).save(buffer, kind, **options)
    return buffer.getvalue()


def sample(number: int) -> dict[str, bytes]:
    """A sample as img2dataset writes it."""
    about = {"key": f"{number:09d}", "caption": f"caption {number}", "aesthetic": number / 10, "status": "success"}
    return {"jpg": picture(number), "json": json.dumps(about).encode(), "txt": f"caption {number}".encode()}


def write_tar(path, samples: dict[str, dict[str, bytes]], format=tarfile.USTAR_FORMAT) -> None:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for key, members in samples.items():
            for extension, data in members.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


@pytest.fixture
def laion(tmp_path):
    """Three tars of ten samples."""
    for number in range(3):
        held = range(number * 10, number * 10 + 10)
        write_tar(tmp_path / "laion" / f"{number:05d}.tar", {f"{i:09d}": sample(i) for i in held})
    return tmp_path / "laion"


def config(path, out=None, **options) -> BuildShards:
    source = {"name": "webdataset", "path": str(path)}
    source |= {key: options.pop(key) for key in ("index_only", "captions", "join") if key in options}
    options = {"validation_fraction": 0.2, "samples_per_shard": 12} | options
    return BuildShards(source=SourceConfig(**source), out=out and str(out), **options)


def opened(uris) -> list[shards.IndexedShards]:
    return [shards.IndexedShards.open(uri) for uri in uris]


def all_samples(uris) -> dict[str, dict]:
    """Source of each sample -> what it holds."""
    found = [one.read(x) for one in opened(uris) for x in range(one.count)]
    return {json.loads(raw["json"])["source"]: raw for raw in found}


def test_adopted_tars_stay_as_they_are_and_every_sample_is_read_by_its_place(laion):
    before = {path: path.read_bytes() for path in laion.iterdir()}
    uris = shard_building.build(config(laion, index_only=True))
    assert uris == [str(laion / "train"), str(laion / "validation")]
    assert {path: path.read_bytes() for path in laion.glob("*.tar")} == before
    train, validation = opened(uris)
    keys = [one.key(x) for one in (train, validation) for x in range(one.count)]
    assert sorted(keys) == [f"{i:09d}" for i in range(30)]
    assert validation.count >= 1
    for one in (train, validation):
        one.verify()
        for x in range(one.count):
            raw = one.read(x)
            assert {ext: raw[ext] for ext in ("jpg", "json", "txt")} == sample(int(one.key(x)))
            assert one.column("sha256")[x].as_py() == hashlib.sha256(raw["jpg"]).digest()
        assert set(one.column("width").to_pylist()) == {20}
        assert set(one.column("height").to_pylist()) == {12}
        assert sorted(p.name for p in (laion / one.uri.rsplit("/", 1)[1]).iterdir()) == sorted(
            ["index.arrow", "manifest.json", shard_building.REJECTED]
        )


def test_damage_after_adoption_is_refused_by_name(laion, tmp_path):
    (uri,) = shard_building.build(config(laion, tmp_path / "out", index_only=True, validation_fraction=0.0))
    (one,) = opened([uri])
    entry, offset, _ = one.locate(13)
    data = bytearray((laion / entry.name).read_bytes())
    data[offset + 700] ^= 1
    (laion / entry.name).write_bytes(data)
    with pytest.raises(DigestMismatch, match=one.key(13)):
        one.read(13)
    with pytest.raises(DigestMismatch):
        one.verify()


def test_adoption_and_packing_split_alike_and_filters_apply_to_both(laion, tmp_path):
    chosen = {"filter": FilterConfig(scores={"aesthetic": [0.5, 2.0]}, where="key != '000000007'")}
    adopted = opened(shard_building.build(config(laion, tmp_path / "a", index_only=True, **chosen)))
    packed = shard_building.build(config(laion, tmp_path / "p", **chosen))
    expected = [f"{i:09d}" for i in range(5, 21) if i != 7]
    for number, uri in enumerate(packed):
        held = [name.rsplit("/", 1)[1] for name in all_samples([uri])]
        assert held == [adopted[number].key(x) for x in range(adopted[number].count)]
    assert sorted(one.key(x) for one in adopted for x in range(one.count)) == expected
    assert adopted[0].manifest.meta["filtered"] == {"scores.aesthetic": 14, "where": 1}
    assert opened(packed)[0].shards[0].count == 12


def test_packing_anew_keeps_pictures_captions_and_metadata(laion, tmp_path):
    found = all_samples(shard_building.build(config(laion, tmp_path / "out")))
    assert len(found) == 30
    raw = found["00001.tar/000000013"]
    about = json.loads(raw["json"])
    assert raw["jpg"] == picture(13)
    assert raw["txt"] == b"caption 13"
    assert (about["captions"], about["aesthetic"], about["width"]) == (["caption 13"], 1.3, 20)


def test_tars_of_webdatasets_own_writer_are_packed_whatever_headers_it_writes(tmp_path):
    keys = ["a" * 150, "é", "folder/b"]
    with open(tmp_path / "0.tar", "wb") as file, webdataset.TarWriter(file, encoder=False) as writer:
        for number, key in enumerate(keys):
            writer.write({"__key__": key, **sample(number)})
    (uri,) = shard_building.build(config(tmp_path / "0.tar", tmp_path / "out", validation_fraction=0.0))
    assert sorted(all_samples([uri])) == sorted(f"0.tar/{key}" for key in keys)


@pytest.mark.parametrize("join", ["key", "name", "sha256"])
def test_captions_of_a_table_replace_those_in_the_tars(laion, tmp_path, join):
    names = {
        "key": lambda i: f"{i:09d}",
        "name": lambda i: f"{i // 10:05d}.tar/{i:09d}",
        "sha256": lambda i: hashlib.sha256(picture(i)).hexdigest(),
    }
    rows = [{join: names[join](i), "caption": f"{text} {i}"} for text in ("new", "other") for i in reversed(range(29))]
    (tmp_path / "new.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recaptioned = {"captions": str(tmp_path / "new.jsonl"), "join": join, "max_bad_fraction": 0.1}
    uris = shard_building.build(config(laion, tmp_path / "out", **recaptioned))
    found = all_samples(uris)
    assert len(found) == 29
    for raw in found.values():
        number = int(json.loads(raw["json"])["key"])
        assert json.loads(raw["json"])["captions"] == [f"new {number}", f"other {number}"]
    rejected = collections.Counter()
    for one in opened(uris):
        rejected.update(one.manifest.meta["rejected"])
    assert rejected == {"missing_caption": 1}
    assert not (tmp_path / "out" / shard_building.CAPTIONS).exists()
    with pytest.raises(DataError, match="missing_caption: 1"):
        shard_building.build(config(laion, tmp_path / "x", **recaptioned | {"max_bad_fraction": 0.0}))


def test_bad_samples_are_listed_and_left_out(tmp_path):
    turned = Image.Exif()
    turned[0x0112] = 6
    write_tar(
        tmp_path / "t" / "0.tar",
        {
            "good": sample(0),
            "turned": {"jpg": picture(1, exif=turned)},
            "alone": {"txt": b"no picture"},
            "gif": {"jpg": picture(2, kind="GIF"), "txt": b"x"},
            "cut": {"png": picture(3, kind="PNG")[:20], "txt": b"x"},
            "large": {"png": picture(4, (200, 200), kind="PNG"), "txt": b"x"},
        },
    )
    limits = {"max_bad_fraction": 0.9, "max_pixels": 1000, "validation_fraction": 0.0}
    (uri,) = shard_building.build(config(tmp_path / "t", index_only=True, **limits))
    (one,) = opened([uri])
    assert [one.key(x) for x in range(one.count)] == ["good", "turned"]
    assert one.column("width").to_pylist() == [20, 12]  # upright
    reasons = {"no_picture": 1, "format": 1, "unreadable": 1, "too_many_pixels": 1}
    assert one.manifest.meta["rejected"] == reasons
    listed = store.read_bytes(f"{uri}/{shard_building.REJECTED}").decode().splitlines()
    assert {json.loads(line)["name"] for line in listed} == {f"0.tar/{key}" for key in ("alone", "gif", "cut", "large")}
    (uri,) = shard_building.build(config(tmp_path / "t", tmp_path / "packed", **limits))
    assert manifest.read(uri).meta["rejected"] == reasons | {"missing_caption": 1}


@pytest.mark.parametrize("index_only", [True, False])
@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_a_damaged_tar_counts_as_what_it_lost(laion, tmp_path, damage, index_only):
    path = laion / "00001.tar"
    data = bytearray(path.read_bytes())
    (whole,) = opened(shard_building.build(config(laion, tmp_path / "w", index_only=True, validation_fraction=0.0)))
    _, offset, _ = whole.locate(14)
    if damage == "cut":
        path.write_bytes(data[:offset])
    else:
        data[offset + 1] ^= 1
        path.write_bytes(data)
    options = {"index_only": index_only, "validation_fraction": 0.0}
    with pytest.raises(DataError, match=r"7 of 30 .*damaged_tar: 7.*00001\.tar"):
        shard_building.build(config(laion, tmp_path / "out", **options))
    assert not (tmp_path / "out").exists()
    (uri,) = shard_building.build(config(laion, tmp_path / "out", max_bad_fraction=0.3, **options))
    assert opened([uri])[0].count == 23
    (line,) = store.read_bytes(f"{uri}/{shard_building.REJECTED}").decode().splitlines()
    assert json.loads(line)["name"] == "00001.tar"
    assert f"{offset}" in json.loads(line)["what"]
    assert manifest.read(uri).meta["rejected"] == {"damaged_tar": 7}


def test_near_copies_of_other_tars_are_left_out(laion, tmp_path):
    copy = Image.open(io.BytesIO(picture(3))).resize((40, 24), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    copy.save(buffer, "PNG")
    write_tar(laion / "00009.tar", {"copy": {"png": buffer.getvalue(), "txt": b"c"}, "same": {"jpg": picture(5)}})
    for duplicates, left in (("none", 32), ("exact", 31), ("near", 30)):
        uris = shard_building.build(config(laion, tmp_path / duplicates, index_only=True, duplicates=duplicates))
        assert sum(one.count for one in opened(uris)) == left


def test_keys_need_not_be_unique_and_repeats_are_told(tmp_path, capsys):
    for number in range(2):
        write_tar(tmp_path / "t" / f"{number}.tar", {f"{i}": sample(number * 10 + i) for i in range(4)})
    (uri,) = shard_building.build(config(tmp_path / "t", index_only=True, validation_fraction=0.0))
    assert "4 samples have a key that an earlier one has" in capsys.readouterr().out
    (one,) = opened([uri])
    assert one.read(5)["txt"] == b"caption 11"


def test_members_apart_are_refused_and_other_members_are_counted(tmp_path, capsys):
    write_tar(tmp_path / "t" / "0.tar", {"a": sample(0) | {"npy": b"1"}, "b": sample(1)})
    shard_building.build(config(tmp_path / "t", tmp_path / "out"))
    assert "not decoded: .npy: 1" in capsys.readouterr().out
    with tarfile.open(tmp_path / "t" / "0.tar", "a") as tar:
        tar.addfile(tarfile.TarInfo("a.webp"))
    with pytest.raises(DataError, match="'a'"):
        shard_building.build(config(tmp_path / "t", tmp_path / "again"))


def test_json_that_no_reader_takes_rejects_its_sample_alone(tmp_path):
    bad = {str(i): sample(i) | {"json": data} for i, data in enumerate([b"{", b"[" * 9999, b'{"x": "\\ud800"}', b"3"])}
    write_tar(tmp_path / "t" / "0.tar", bad)
    (uri,) = shard_building.build(
        config(tmp_path / "t", tmp_path / "out", max_bad_fraction=0.5, validation_fraction=0.0)
    )
    assert sorted(all_samples([uri])) == ["0.tar/2", "0.tar/3"]
    assert manifest.read(uri).meta["rejected"] == {"unreadable_json": 2}


def test_rejects_of_a_split_without_samples_are_listed_with_the_other(tmp_path):
    bad = {f"bad{i}": {"txt": b"no picture"} for i in range(20)}
    write_tar(tmp_path / "t" / "0.tar", {"good": sample(0)} | bad)
    for index_only in (True, False):
        out = tmp_path / f"out{index_only}"
        built = config(tmp_path / "t", out, index_only=index_only, max_bad_fraction=1.0, validation_fraction=0.9)
        (uri,) = shard_building.build(built)
        assert len(store.read_bytes(f"{uri}/{shard_building.REJECTED}").decode().splitlines()) == 20
        assert manifest.read(uri).meta["planned"] == 21


def test_a_folder_that_cannot_be_written_asks_for_out(laion, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(EnvironmentRefused, match="beside") as caught:
        shard_building.build(config(laion, index_only=True))
    assert "out=" in caught.value.mend


def test_a_score_that_no_sample_has_is_refused_naming_the_keys(laion, tmp_path):
    with pytest.raises(ConfigError, match="'aestetic'") as caught:
        shard_building.build(config(laion, tmp_path / "out", filter=FilterConfig(scores={"aestetic": [1, 2]})))
    assert "aesthetic, caption" in caught.value.mend


def test_tars_in_a_bucket_are_adopted_and_packed(laion, moto_s3, tmp_path, monkeypatch):
    for path in laion.iterdir():
        store.upload(path, moto_s3.uri("laion", path.name))
    monkeypatch.setenv("LATENTRAY_CACHE", str(tmp_path / "cache"))
    (uri,) = shard_building.build(config(moto_s3.uri("laion"), index_only=True, validation_fraction=0.0))
    assert uri == moto_s3.uri("laion", "train")
    assert not any(path.is_file() for path in (tmp_path / "cache").rglob("*"))  # a scanned tar is not kept
    (one,) = opened([uri])
    assert one.read(12)["txt"] == b"caption 12"
    packed = shard_building.build(
        config(moto_s3.uri("laion", "0000[01].tar"), moto_s3.uri("out"), validation_fraction=0.0)
    )
    assert len(all_samples(packed)) == 20


def test_tars_of_webdatasets_own_writer_are_read_where_they_are(tmp_path):
    folder = tmp_path / "stock"
    folder.mkdir()
    with webdataset.TarWriter(str(folder / "00000.tar")) as writer:  # a PAX header before every member
        for i in range(12):
            writer.write({"__key__": f"{i:09d}", **sample(i), "npy": b"3"})
    uris = shard_building.build(config(folder, index_only=True))
    found = {}
    for uri in uris:
        opened = shards.IndexedShards.open(uri)
        opened.verify()
        for x in range(opened.count):
            one = opened.read(x)
            found[one["__key__"]] = {name: data for name, data in one.items() if not name.startswith("__")}
    assert found == {f"{i:09d}": sample(i) for i in range(12)}
