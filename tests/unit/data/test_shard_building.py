"""Building data sets: what is packed, rejected, refused and committed; once through Ray Data."""

import collections
import dataclasses
import hashlib
import io
import json
import pickle
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from latentray.checkpoint import manifest, store
from latentray.config.build_shards import BuildShards, FilterConfig, SourceConfig
from latentray.data import clips, decode, episodes, members, shard_building, shards, synthetic
from latentray.errors import AlreadyExists, ConfigError, DataError, DigestMismatch, EnvironmentRefused, UnsafeMember


@pytest.fixture(scope="module")
def ray_local():
    """A small Ray cluster in this process, as the job starts it."""
    import ray

    from latentray.data import cluster

    cluster.connect(None)
    yield
    ray.shutdown()


@pytest.fixture
def in_process(monkeypatch):
    """Survey and pack in this process: the graphs' functions, without Ray."""
    calls = []

    def run(task, jobs, config, captions):
        for job in reversed(jobs):  # workers finish in any order
            calls.append(task.__name__)
            row = shard_building._row({"job": json.dumps(job)}, task=task, config=config, captions=captions)
            if row["error"]:
                raise pickle.loads(row["error"])
            yield row

    monkeypatch.setattr(shard_building, "_run", run)
    return calls


def picture(seed: int, kind: str = "PNG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (8, 12, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path):
    """20 good pictures, one without a caption, one damaged, one bomb, one that is a GIF in disguise."""
    root = tmp_path / "pictures"
    root.mkdir()
    for i in range(20):
        (root / f"{i:02d}.png").write_bytes(picture(i))
        (root / f"{i:02d}.txt").write_text(f"first {i}\nsecond {i}\n")
    (root / "x_alone.png").write_bytes(picture(90))
    for name, data in (
        ("x_cut.png", picture(91)[:100]),
        ("x_large.png", picture(92)),
        ("x_gif.png", picture(93, "GIF")),
        ("y_jpeg.png", picture(94, "JPEG")),
    ):
        (root / name).write_bytes(data)
        (root / name).with_suffix(".txt").write_text("c")
    buffer = io.BytesIO()
    Image.new("1", (4000, 3000)).save(buffer, "PNG")  # some 1.5 kB of file
    (root / "x_large.png").write_bytes(buffer.getvalue())
    return root


def config(folder, tmp_path, **options) -> BuildShards:
    options = {
        "max_bad_fraction": 0.5,
        "validation_fraction": 0.2,
        "samples_per_shard": 6,
        "max_pixels": 10**6,
    } | options
    return BuildShards(source=SourceConfig(name="folder", path=str(folder)), out=str(tmp_path / "out"), **options)


@pytest.mark.parametrize("form", ["frames", "mp4"])
def test_clips_are_drawn_in_any_number_of_shards(tmp_path, in_process, form):
    found = []
    for per_shard in (4, 6):
        source = SourceConfig(name="moving_shapes", n=6, n_validation=3, frames=8, fps=4.0, form=form)
        out = str(tmp_path / f"{form}{per_shard}")
        uris = shard_building.build(BuildShards(source=source, out=out, samples_per_shard=per_shard, seed=2))
        opened = shards.IndexedShards.open(uris[0])
        opened.verify()
        found.append([members.decode_sample(opened.read(x)) for x in range(opened.count)])
        assert opened.column("frames").to_pylist() == [8] * 6
    for one, other in zip(*found, strict=True):
        clip, same = (clips.read_clip(sample, frames=8, fps=4.0) for sample in (one, other))
        np.testing.assert_array_equal(clip.frames_THWC, same.frames_THWC)
        assert (clip.frames_THWC.shape, clip.captions) == ((8, 64, 64, 3), same.captions)


def test_episodes_are_drawn_and_differ_between_the_splits(tmp_path, in_process):
    source = SourceConfig(name="gate", n=5, n_validation=5)
    uris = shard_building.build(BuildShards(source=source, out=str(tmp_path / "out"), samples_per_shard=3))
    train, validation = (shards.IndexedShards.open(uri) for uri in uris)
    read = [
        [episodes.read_episode(members.decode_sample(one.read(x))) for x in range(one.count)]
        for one in (train, validation)
    ]
    assert train.column("steps").to_pylist() == [len(one.actions_TA) for one in read[0]]
    assert all(not np.array_equal(a.actions_TA, b.actions_TA) for a, b in zip(*read, strict=True))


def test_shapes_through_ray(ray_local, tmp_path, capsys):
    out = tmp_path / "out"
    uris = shard_building.build(
        BuildShards(source=SourceConfig(n=60, n_validation=54), out=str(out), samples_per_shard=32, seed=5)
    )
    assert uris == [str(out / "train"), str(out / "validation")]
    train, validation = (shards.IndexedShards.open(uri) for uri in uris)
    assert (train.count, validation.count) == (60, 54)
    assert [entry.count for entry in train.shards] == [32, 28]
    for opened in (train, validation):
        opened.verify()
    raw = train.read(40)
    about = json.loads(raw["json"])
    np.testing.assert_array_equal(
        decode.decode(raw["png"]), synthetic.draw(synthetic.kind_of("train", 40), 5, 40, split="train")
    )
    assert about["captions"] == [raw["txt"].decode()] == [synthetic.caption(synthetic.kind_of("train", 40))]
    assert train.column("sha256")[40].as_py().hex() == hashlib.sha256(raw["png"]).hexdigest() == about["sha256"]
    assert train.manifest.meta["unseen"] == [synthetic.caption(kind) for kind in synthetic.UNSEEN]
    texts = {train.read(x)["txt"].decode() for x in range(60)}
    assert texts.isdisjoint(train.manifest.meta["unseen"])
    assert len(texts) == 51
    assert f"python -m jobs.train stage=autoencoder data={out}" in capsys.readouterr().out


def test_tars_through_ray_and_an_unsafe_one_is_refused_by_name(ray_local, tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for i in range(30):
            for extension, data in (("png", picture(i)), ("txt", b"c")):
                info = tarfile.TarInfo(f"{i}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    source = SourceConfig(name="webdataset", path=str(tmp_path / "a.tar"))
    built = BuildShards(
        source=source, out=str(tmp_path / "out"), duplicates="near", filter=FilterConfig(where="width > 1")
    )
    uris = shard_building.build(built)
    assert sum(shards.IndexedShards.open(uri).count for uri in uris) == 30
    with tarfile.open(tmp_path / "a.tar", "a") as tar:
        tar.addfile(tarfile.TarInfo("x.pkl"))
    with pytest.raises(UnsafeMember, match=r"x\.pkl"):
        shard_building.build(dataclasses.replace(built, out=str(tmp_path / "again")))
    assert not (tmp_path / "again").exists()


def test_rejects_are_counted_and_listed_and_the_rest_goes_on(folder, tmp_path, in_process):
    uris = shard_building.build(config(folder, tmp_path))
    opened = [shards.IndexedShards.open(uri) for uri in uris]
    assert sum(o.count for o in opened) == 21
    reasons = collections.Counter()
    for o, uri in zip(opened, uris, strict=True):
        reasons.update(o.manifest.meta["rejected"])
        listed = [json.loads(line) for line in Path(uri, shard_building.REJECTED).read_text().splitlines()]
        assert collections.Counter(r["reason"] for r in listed) == o.manifest.meta["rejected"]
        assert o.manifest.meta["samples"] + len(listed) == o.manifest.meta["planned"]
    assert reasons == {"missing_caption": 1, "unreadable": 1, "too_many_pixels": 1, "format": 1}
    raw = [o.read(x) for o in opened for x in range(o.count)]
    by_source = {json.loads(sample["json"])["source"]: sample for sample in raw}
    assert json.loads(by_source["03.png"]["json"])["captions"] == ["first 3", "second 3"]
    assert by_source["03.png"]["png"] == (folder / "03.png").read_bytes()
    assert by_source["y_jpeg.png"]["jpg"] == (folder / "y_jpeg.png").read_bytes()
    assert opened[0].column("width").to_pylist() == [12] * opened[0].count


def test_the_same_input_gives_the_same_digests(folder, tmp_path, in_process):
    first = shard_building.build(config(folder, tmp_path))
    (tmp_path / "out").rename(tmp_path / "before")
    again = shard_building.build(config(folder, tmp_path))
    digests = [manifest.read(str(tmp_path / "before" / uri.rsplit("/", 1)[1])).digest for uri in first]
    assert digests == [manifest.read(uri).digest for uri in again]


def test_too_many_rejects_commit_nothing(folder, tmp_path, in_process):
    with pytest.raises(DataError, match="4 of 25") as caught:
        shard_building.build(config(folder, tmp_path, max_bad_fraction=0.1))
    assert "missing_caption: 1" in caught.value.what
    assert "max_bad_fraction" in caught.value.mend
    assert not (tmp_path / "out").exists()


def test_a_crash_leaves_nothing(folder, tmp_path, in_process, monkeypatch):
    monkeypatch.setattr(shard_building.index, "write", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        shard_building.build(config(folder, tmp_path))
    assert not (tmp_path / "out").exists()


def test_refused_before_any_work(folder, tmp_path, in_process, monkeypatch):
    (tmp_path / "out" / "train").mkdir(parents=True)
    manifest.seal(tmp_path / "out" / "train", {}, kind="dataset")
    with pytest.raises(AlreadyExists):
        shard_building.build(config(folder, tmp_path))
    (tmp_path / "out" / "train" / manifest.NAME).unlink()
    full = shutil.disk_usage(tmp_path)._replace(free=1 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
    with pytest.raises(EnvironmentRefused, match="too full"):
        shard_building.build(config(folder, tmp_path))
    assert in_process == []


def test_filters_and_duplicates_leave_out_and_count_but_are_not_bad(folder, tmp_path, in_process):
    shutil.copy(folder / "03.png", folder / "z_copy.png")
    (folder / "z_copy.txt").write_text("again")
    Image.open(folder / "05.png").crop((0, 0, 4, 4)).save(folder / "05.png")
    chosen = FilterConfig(min_side=5, where="caption != 'first 7'")
    (uri,) = shard_building.build(
        config(folder, tmp_path, filter=chosen, duplicates="exact", validation_fraction=0.0, max_bad_fraction=0.2)
    )
    opened = shards.IndexedShards.open(uri)
    kept = {json.loads(opened.read(x)["json"])["source"] for x in range(opened.count)}
    assert kept == {f"{i:02d}.png" for i in range(20) if i not in (5, 7)} | {"y_jpeg.png"}
    meta = opened.manifest.meta
    assert meta["filtered"] == {"min_side": 1, "where": 1, "exact_duplicate": 1}
    assert meta["rejected"] == {"missing_caption": 1, "unreadable": 1, "too_many_pixels": 1, "format": 1}
    assert (meta["samples"], meta["planned"]) == (19, 23)
    assert [entry.count for entry in opened.shards] == [6, 6, 6, 1]  # what was left out leaves no gaps
    assert in_process == ["_survey_task", *["_pack_task"] * 4]


def test_nothing_left_is_told_with_the_counts(folder, tmp_path, in_process):
    with pytest.raises(DataError, match="min_pixels: 23 .* 2 rejected"):
        shard_building.build(config(folder, tmp_path, filter=FilterConfig(min_pixels=10**9)))
    assert not (tmp_path / "out").exists()


def test_a_table_of_scores_is_filtered_without_reading_pictures(folder, tmp_path, in_process):
    rows = "".join(f"{i:02d}.png,c {i},{i / 2}\n" for i in range(20))
    (folder / "t.csv").write_text("path,caption,score\n" + rows)
    table = SourceConfig(name="table", path=str(folder / "t.csv"))
    chosen = BuildShards(
        source=table,
        out=str(tmp_path / "out"),
        filter=FilterConfig(scores={"score": [5.0, None]}, where="caption not in ('c 19', 'c 18')"),
        validation_fraction=0.0,
    )
    (uri,) = shard_building.build(chosen)
    opened = shards.IndexedShards.open(uri)
    assert [json.loads(opened.read(x)["json"])["source"] for x in range(opened.count)] == [
        f"{i}.png" for i in range(10, 18)
    ]
    assert in_process == ["_pack_task"]
    wrong = dataclasses.replace(chosen, out=str(tmp_path / "x"), filter=FilterConfig(scores={"aestetic": [1, 2]}))
    with pytest.raises(ConfigError, match="'aestetic'") as caught:
        shard_building.build(wrong)
    assert "score" in caught.value.mend


def test_shards_are_balanced_by_bytes(folder, tmp_path, in_process):
    limit = 3 * (folder / "00.png").stat().st_size + 100
    (uri,) = shard_building.build(
        config(folder, tmp_path, shard_bytes=limit, samples_per_shard=100, validation_fraction=0.0)
    )
    opened = shards.IndexedShards.open(uri)
    assert max(entry.count for entry in opened.shards) == 3
    assert opened.count == 21


@pytest.fixture
def bucket(monkeypatch, tmp_path):
    """A bucket of an S3 server in this process, and an empty cache for what is fetched from it."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in (
        ("AWS_ENDPOINT_URL", f"http://{host}:{port}"),
        ("AWS_ACCESS_KEY_ID", "test"),
        ("AWS_SECRET_ACCESS_KEY", "test"),
        ("AWS_DEFAULT_REGION", "us-east-1"),
        ("AWS_EC2_METADATA_DISABLED", "true"),
        ("LATENTRAY_CACHE", str(tmp_path / "cache")),
    ):
        monkeypatch.setenv(name, value)
    boto3.client("s3").create_bucket(Bucket="pictures")
    yield "s3://pictures"
    server.stop()


def test_from_s3_to_s3_and_damage_there_is_refused(folder, bucket, tmp_path, in_process):
    for path in folder.glob("0*"):
        store.upload(path, f"{bucket}/in/{path.name}")
    remote = BuildShards(
        source=SourceConfig(name="folder", path=f"{bucket}/in"), out=f"{bucket}/out", validation_fraction=0.0
    )
    (uri,) = shard_building.build(remote)
    assert uri == f"{bucket}/out/train"
    opened = shards.IndexedShards.open(uri)
    opened.verify()
    assert opened.read(3)["png"] == (folder / "03.png").read_bytes()
    shutil.rmtree(tmp_path / "cache")
    damaged = bytearray(store.read_bytes(f"{uri}/00000.tar"))
    damaged[700] ^= 1
    store.write_bytes(f"{uri}/00000.tar", bytes(damaged))
    fresh = shards.IndexedShards.open(uri)
    with pytest.raises(DigestMismatch) as caught:
        fresh.read(0)
    assert caught.value.where.endswith("00000.tar")
    store.write_bytes(f"{uri}/00000.tar", bytes(damaged[:-1]))
    with pytest.raises(DigestMismatch, match="bytes"):
        fresh.verify()
