"""The latent job, its graph replaced by the stages in a row: what is stored, reused, resumed, left out and refused."""

import hashlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from latent_stores import digests, records
from PIL import Image

from latentray import build
from latentray.checkpoint import manifest, store
from latentray.config.feed import DamageConfig
from latentray.config.precompute_latents import PrecomputeLatents
from latentray.config.text_encoder import TextEncoderConfig, TinyTextEncoderConfig
from latentray.data import (
    decode,
    index,
    latent_commit,
    latent_shards,
    latents,
    precompute,
    shards,
)
from latentray.data.latent_batches import latent_batches
from latentray.data.ordering import Order
from latentray.data.pipeline import OrderedSource
from latentray.errors import (
    AlreadyExists,
    ConfigError,
    DataError,
    DigestMismatch,
    FingerprintMismatch,
    InputMissing,
)

N, SIZE = 10, 64


def sample(number: int, captions: list[str] | None = None, data: bytes | None = None) -> shards.Sample:
    """A picture of noise, wider than high, that is the same wherever its number is."""
    pixels = np.random.default_rng(number).integers(0, 255, (SIZE, SIZE + 24, 3), dtype=np.uint8)
    if data is None:
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
        data = buffer.getvalue()
    about = {"captions": captions or [f"picture {number}"], "width": pixels.shape[1], "height": pixels.shape[0]}
    return shards.Sample(
        key=f"{number:09d}",
        members={"png": data, "json": json.dumps(about).encode()},
        columns={"sha256": hashlib.sha256(data).digest(), "width": 88, "height": 64},
    )


def write_data(root: Path, samples: list[shards.Sample], split: str = "train", per_shard: int = 6) -> str:
    folder = root / f"built-{split}"
    folder.mkdir(parents=True)
    made = [
        shards.write_shard(samples[i : i + per_shard], folder / shards.shard_name(k))
        for k, i in enumerate(range(0, len(samples), per_shard))
    ]
    index.write(made, folder / index.NAME)
    manifest.publish(folder, str(root / split), kind="dataset")
    return str(root)


@pytest.fixture(scope="module")
def made(tiny, tmp_path_factory):
    root = tmp_path_factory.mktemp("precompute")
    return {
        "data": write_data(root / "data", [sample(i) for i in range(N)]),
        "autoencoder_from": tiny.write_autoencoder(str(root / "autoencoder")),
        "text_encoder": TextEncoderConfig(source=tiny.write_text_encoder(str(root / "text"))),
    }


def config(made, out, **changes) -> PrecomputeLatents:
    values = made | {"out": str(out), "batch_size": 4, "text_dtype": "float32", "device": "cpu"}
    return PrecomputeLatents(**(values | changes))


def test_a_record_holds_latent_text_and_what_sdxl_conditions_on(made, tmp_path, in_process):
    (uri,) = precompute.precompute(config(made, tmp_path / "out"))
    net = build.autoencoder_artifact(made["autoencoder_from"]).load()
    found = records(uri)
    assert list(found) == [f"{i:09d}_0" for i in range(N)]
    record = found["000000003_0"]
    picture = decode.decode(sample(3).members["png"])
    expected = net.encode(decode.to_tensor(decode.to_square(picture, SIZE)[None]))
    tensors = record["latent.safetensors"]
    torch.testing.assert_close(tensors["mean"], expected.mean_BChw[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(tensors["logvar"], expected.logvar_BChw[0], rtol=1e-4, atol=1e-5)
    assert tensors["text.clip.tokens"].shape == (1, 12, 16)
    assert record["json"] == {
        "captions": ["picture 3"], "source": "000000003", "flip": False,
        "source_sha256": hashlib.sha256(sample(3).members["png"]).hexdigest(),
        "original_size": [64, 88], "crop_top_left": [0, 12], "target_size": [64, 64],
    }  # fmt: skip
    opened = shards.IndexedShards.open(uri, kind="latents")
    order = Order.of(opened.count, 0, 4)
    (batch,) = latent_batches(OrderedSource([opened], order, last_step=1))
    assert batch.given.size_B6.tolist() == [[64, 88, 0, 12, 64, 64]] * 4
    described = latents.describe(uri)
    described.require_autoencoder(build.autoencoder_artifact(made["autoencoder_from"]))
    assert described.empty_prompts(described.texts)[0].tokens_BLD.shape == (1, 12, 16)
    listing = manifest.read(uri)
    assert (listing.meta["samples"], listing.meta["encoded"], listing.meta["batch_size"]) == (N, N, 4)
    assert [name for name in store.list_files(uri) if name not in listing.files] == ["manifest.json"]


def test_variants_are_cuts_and_their_mirrors(made, tmp_path, in_process):
    (uri,) = precompute.precompute(config(made, tmp_path / "out", crops=2, flip_variants=True, batch_size=7))
    found = records(uri)
    assert list(found) == [f"{i:09d}_{v}" for i in range(N) for v in range(4)]
    net = build.autoencoder_artifact(made["autoencoder_from"]).load()
    pixels = decode.decode(sample(5).members["png"])
    tops = []
    for v in range(4):
        about = found[f"{5:09d}_{v}"]["json"]
        top, left = about["crop_top_left"]
        seen = pixels[:, ::-1] if about["flip"] else pixels
        x = decode.to_tensor(np.ascontiguousarray(seen[top : top + SIZE, left : left + SIZE])[None])
        mean = found[f"{5:09d}_{v}"]["latent.safetensors"]["mean"]
        torch.testing.assert_close(mean, net.encode(x).mean_BChw[0], rtol=1e-4, atol=1e-5)
        tops.append((about["flip"], left))
    assert [flip for flip, _ in tops] == [False, True, False, True]
    assert tops[0][1] == 12 and tops[2][1] != 12 and tops[3][1] == 24 - tops[2][1]
    assert [shards.IndexedShards.open(uri, kind="latents").column("variant").to_pylist()[:4]] == [[0, 1, 2, 3]]


def test_several_sizes_come_of_one_pass_and_equal_those_made_alone(made, tmp_path, in_process):
    uris = precompute.precompute(config(made, tmp_path / "both", sizes=[64, 32], latent_dtype="bfloat16"))
    assert uris == [str(tmp_path / "both" / size / "train") for size in ("64", "32")]
    assert len(in_process) == 3  # parts of 4, 2 and 4 pictures
    for size, uri in zip((64, 32), uris, strict=True):
        (alone,) = precompute.precompute(config(made, tmp_path / str(size), sizes=[size], latent_dtype="bfloat16"))
        assert {n: d for n, d in digests(uri).items() if n.endswith(".tar")} == {
            n: d for n, d in digests(alone).items() if n.endswith(".tar")
        }
    record = records(uris[1])["000000000_0"]
    assert record["latent.safetensors"]["mean"].shape == (4, 4, 4)
    assert record["latent.safetensors"]["mean"].dtype == torch.bfloat16
    assert record["json"]["target_size"] == [32, 32]


def test_latents_may_stand_alone_or_with_several_text_encoders(made, tmp_path, in_process):
    (alone,) = precompute.precompute(config(made, tmp_path / "alone", text_encoder=None))
    assert set(records(alone)["000000000_0"]["latent.safetensors"]) == {"mean", "logvar"}
    assert latents.describe(alone).texts == ()
    big = TinyTextEncoderConfig(width=32, layers=1, heads=2, max_tokens=9, vocabulary=300)
    both = [made["text_encoder"], TextEncoderConfig(name="big", source=str(tmp_path / "big"), build=big)]
    (uri,) = precompute.precompute(config(made, tmp_path / "both", text_encoders=both))
    record = records(uri)["000000000_0"]["latent.safetensors"]
    assert record["text.clip.tokens"].shape == (1, 12, 16) and record["text.big.tokens"].shape == (1, 9, 32)
    described = latents.describe(uri)
    assert [(one.name, one.width) for one in described.texts] == [("clip", 16), ("big", 32)]
    assert [one.pooled_BD.shape for one in described.empty_prompts(described.texts)] == [(1, 16), (1, 32)]
    assert set(described.listing.inputs) == {"autoencoder", "dataset", "text_encoder", "text_encoder.big"}


class Cut(Exception):
    """The job ends here."""


def cut_short(monkeypatch, after: int):
    """Let the job write so many parts, and no more."""
    write, done = latent_shards.write_part, []

    def counted(job, parcel):
        if len(done) == after:
            raise Cut
        done.append(write(job, parcel))
        return done[-1]

    monkeypatch.setattr(latent_shards, "write_part", counted)


def test_a_job_cut_short_goes_on_and_ends_with_the_same_bytes(made, tmp_path, in_process, monkeypatch):
    (whole,) = precompute.precompute(config(made, tmp_path / "whole"))
    for after, shards_done in ((1, 0), (2, 1)):
        out = tmp_path / f"cut-{after}"
        with monkeypatch.context() as patched:
            cut_short(patched, after)
            with pytest.raises(Cut):
                precompute.precompute(config(made, out))
        assert sum(name.endswith(".rows") for name in store.list_files(out)) == shards_done
        times = {path: path.stat().st_mtime_ns for path in out.rglob("*.tar")}
        in_process.clear()
        (uri,) = precompute.precompute(config(made, out))
        assert len(in_process) == 3 - after
        assert digests(uri) == digests(whole)
        assert manifest.read(uri).digest == manifest.read(whole).digest
        assert all(path.stat().st_mtime_ns == before for path, before in times.items())
        assert set(store.list_files(uri)) == {*digests(uri), "manifest.json"}


def test_a_batch_size_is_kept_to_until_the_store_is_finished(made, tmp_path, in_process, monkeypatch):
    with monkeypatch.context() as patched:
        cut_short(patched, 2)
        with pytest.raises(Cut):
            precompute.precompute(config(made, tmp_path))
    with pytest.raises(ConfigError, match="batch_size=4"):
        precompute.precompute(config(made, tmp_path, batch_size=5))
    (uri,) = precompute.precompute(config(made, tmp_path))
    before = manifest.read(uri)
    precompute.precompute(config(made, tmp_path, batch_size=5))  # finished: there is nothing to mix
    assert manifest.read(uri) == before


def test_what_an_earlier_job_with_other_settings_left_is_not_used(made, tmp_path, in_process, monkeypatch):
    with monkeypatch.context() as patched:
        cut_short(patched, 2)
        with pytest.raises(Cut):
            precompute.precompute(config(made, tmp_path / "a", latent_dtype="float16"))
    precompute.precompute(config(made, tmp_path / "a"))
    precompute.precompute(config(made, tmp_path / "b"))
    assert digests(str(tmp_path / "a" / "train")) == digests(str(tmp_path / "b" / "train"))


def test_a_damaged_part_is_named_and_done_again(made, tmp_path, in_process, monkeypatch):
    with monkeypatch.context() as patched:
        cut_short(patched, 1)
        with pytest.raises(Cut):
            precompute.precompute(config(made, tmp_path))
    (part,) = tmp_path.rglob("*.part")
    data = bytearray(part.read_bytes())
    data[len(data) // 2] ^= 1
    part.write_bytes(data)
    with pytest.raises(DigestMismatch, match="damaged") as caught:
        precompute.precompute(config(made, tmp_path))
    assert part.name in caught.value.where
    in_process.clear()
    precompute.precompute(config(made, tmp_path))
    assert [(part.shard, part.number) for part in in_process] == [(0, 0), (1, 0)]


def test_of_a_data_set_that_grew_only_the_new_is_encoded(made, tmp_path, in_process):
    precompute.precompute(config(made, tmp_path / "old", flip_variants=True))
    grown = write_data(tmp_path / "grown", [sample(i) for i in (100, *range(N), 101)], per_shard=5)
    changed = made | {"data": grown}
    with pytest.raises(AlreadyExists, match="before it changed") as caught:
        precompute.precompute(config(changed, tmp_path / "old", flip_variants=True))
    assert "reuse=" in caught.value.mend
    (anew,) = precompute.precompute(config(changed, tmp_path / "anew", flip_variants=True))
    in_process.clear()
    reuse = str(tmp_path / "old")
    (uri,) = precompute.precompute(config(changed, tmp_path / "new", flip_variants=True, reuse=reuse))
    encoded = [unit // 64 for part in in_process if not len(part.older) for unit in part.units.tolist()]
    assert encoded == [0, 0, 11, 11]
    meta = manifest.read(uri).meta
    assert (meta["encoded"], meta["copied"], meta["samples"]) == (4, 20, 24)
    assert digests(uri) == digests(anew)
    assert manifest.read(uri).inputs["reused"] == manifest.read(store.join(reuse, "train")).digest


def test_another_data_set_shares_latents_whatever_its_keys_and_captions(made, tmp_path, in_process):
    precompute.precompute(config(made, tmp_path / "old"))
    other = [sample(3, ["another caption", "and one more"]), sample(50), sample(4)]
    other = [shards.Sample(key=f"x{i}", members=one.members, columns=one.columns) for i, one in enumerate(other)]
    changed = made | {"data": write_data(tmp_path / "other", other)}
    (uri,) = precompute.precompute(config(changed, tmp_path / "new", reuse=str(tmp_path / "old")))
    (anew,) = precompute.precompute(config(changed, tmp_path / "anew"))
    meta = manifest.read(uri).meta
    assert (meta["encoded"], meta["captioned"], meta["copied"]) == (1, 1, 1)
    assert digests(uri) == digests(anew)
    assert records(uri)["x0_0"]["json"]["captions"] == ["another caption", "and one more"]


def test_a_damaged_record_is_not_reused_but_encoded(made, tmp_path, in_process):
    (old,) = precompute.precompute(config(made, tmp_path / "old"))
    opened = shards.IndexedShards.open(old, kind="latents")
    entry, offset, length = opened.locate(7)
    path = Path(old) / entry.name
    data = bytearray(path.read_bytes())
    data[offset + length // 2] ^= 1
    path.write_bytes(data)
    (uri,) = precompute.precompute(config(made, tmp_path / "new", reuse=str(tmp_path / "old")))
    meta = manifest.read(uri).meta
    assert (meta["encoded"], meta["copied"]) == (1, N - 1)
    assert digests(uri)["00000.tar"] == digests(old)["00000.tar"]


def test_what_cannot_be_reused_is_refused_before_anything_is_encoded(made, tmp_path, in_process):
    precompute.precompute(config(made, tmp_path / "old"))
    reuse = str(tmp_path / "old")
    with pytest.raises(FingerprintMismatch, match="cannot be reused"):
        precompute.precompute(config(made, tmp_path / "new", reuse=reuse, latent_dtype="float16"))
    with pytest.raises(InputMissing):
        precompute.precompute(config(made, tmp_path / "new", reuse=str(tmp_path / "none")))
    bare = [shards.Sample(key=one.key, members=one.members) for one in map(sample, range(3))]
    changed = made | {"data": write_data(tmp_path / "bare", bare)}
    with pytest.raises(DataError, match="does not record the digests"):
        precompute.precompute(config(changed, tmp_path / "new", reuse=reuse))
    assert not (tmp_path / "new").exists()


@pytest.fixture(scope="module")
def spoilt(made, tmp_path_factory):
    """Of twelve pictures one is cut, one unfolds to 12 megapixels, and one differs from the index."""
    bomb = io.BytesIO()
    Image.new("1", (4000, 3000)).save(bomb, "PNG")
    data = {2: sample(2).members["png"][:200], 9: bomb.getvalue()}
    root = tmp_path_factory.mktemp("spoilt")
    write_data(root, [sample(i, data=data.get(i)) for i in range(12)])
    opened = shards.IndexedShards.open(root / "train")
    entry, offset, length = opened.locate(11)
    path = root / "train" / entry.name
    changed = bytearray(path.read_bytes())
    changed[offset + length // 2] ^= 1
    path.write_bytes(changed)
    return made | {"data": str(root), "max_pixels": 1_000_000}


def test_damaged_pictures_are_left_out_counted_and_listed(spoilt, tmp_path, in_process, monkeypatch):
    monkeypatch.setattr(shards.IndexedShards, "verify", lambda self: None)  # which would find the flipped bit first
    skip = DamageConfig(policy="skip", max_bad_fraction=0.25)
    (uri,) = precompute.precompute(config(spoilt, tmp_path, damage=skip, flip_variants=True, batch_size=3))
    assert {key[:9] for key in records(uri)} == {f"{i:09d}" for i in range(12) if i not in (2, 9, 11)}
    listed = [json.loads(line) for line in (Path(uri) / "rejected.jsonl").read_text().splitlines()]
    assert [(one["key"], one["shard"], one["reason"]) for one in listed] == [
        ("000000002", "00000.tar", "unreadable"), ("000000009", "00001.tar", "too_many_pixels"),
        ("000000011", "00001.tar", "digest"),
    ]  # fmt: skip
    assert manifest.read(uri).meta["rejected"] == {"digest": 1, "too_many_pixels": 1, "unreadable": 1}
    assert manifest.read(uri).meta["samples"] == 18


def test_damage_fails_the_job_unless_it_is_little_and_allowed(spoilt, tmp_path, in_process, monkeypatch):
    monkeypatch.setattr(shards.IndexedShards, "verify", lambda self: None)
    with pytest.raises(DataError, match="'000000002' cannot be used") as caught:
        precompute.precompute(config(spoilt, tmp_path))
    assert caught.value.where.endswith("00000.tar") and "damage.policy=skip" in caught.value.mend
    few = DamageConfig(policy="skip", max_bad_fraction=0.2)
    with pytest.raises(DataError, match="3 of 12 samples are damaged"):
        precompute.precompute(config(spoilt, tmp_path, damage=few))
    assert not list(tmp_path.rglob("manifest.json"))
    in_process.clear()
    precompute.precompute(config(spoilt, tmp_path, damage=DamageConfig(policy="skip", max_bad_fraction=0.25)))
    assert not in_process  # what was encoded stands


def test_an_estimate_tells_what_it_would_take_and_writes_nothing(made, tmp_path, in_process, capsys):
    wanted = config(
        made, tmp_path / "out", estimate=True, flip_variants=True, price_per_hour=2.0, storage_price=20.0,
        text_encoder=TextEncoderConfig(
            source=str(tmp_path / "text"), build=TinyTextEncoderConfig(width=16, layers=1, heads=2)
        ),
    )  # fmt: skip
    assert precompute.precompute(wanted) == []
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (found["samples"], found["records"], found["encoders"]) == (N, 2 * N, 2)
    assert found["hours"] > 0 and found["online_hours"] == pytest.approx(2 * found["hours"] * 10 / 2)
    assert not list(tmp_path.iterdir())
    (uri,) = precompute.precompute(config(made, tmp_path / "out", flip_variants=True))
    stored = sum(entry.size for name, entry in manifest.read(uri).files.items() if name.endswith(".tar"))
    assert found["bytes"] == pytest.approx(stored, rel=0.5)


def test_a_finished_store_is_left_alone_and_others_are_refused(made, tiny, tmp_path, in_process):
    (uri,) = precompute.precompute(config(made, tmp_path))
    before = manifest.read(uri)
    for name in ("unfinished.json", "00000.tar.0123.rows", "parts-0123/x.part"):  # cut short between its last steps
        store.write_bytes(store.join(uri, name), b"{}")
    assert precompute.precompute(config(made, tmp_path)) == [uri]
    assert manifest.read(uri) == before
    assert set(store.list_files(uri)) == {*before.files, "manifest.json"}
    other = tiny.write_autoencoder(str(tmp_path / "other"), seed=5)
    for change in (dict(autoencoder_from=other), dict(crops=2), dict(text_dtype="float16")):
        with pytest.raises(AlreadyExists):
            precompute.precompute(config(made, tmp_path, **change))


def test_absent_and_damaged_inputs_are_refused_before_anything_is_encoded(made, tmp_path, in_process):
    for change in (dict(data=str(tmp_path / "none")), dict(autoencoder_from=str(tmp_path / "none"))):
        with pytest.raises(InputMissing):
            precompute.precompute(config(made | change, tmp_path / "out"))
    with pytest.raises(ConfigError, match="factor 8"):
        precompute.precompute(config(made, tmp_path / "out", sizes=[60]))
    for name in store.list_files(made["data"]):
        store.upload(Path(made["data"]) / name, store.join(tmp_path / "copy", name))
    shard = tmp_path / "copy" / "train" / "00000.tar"
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    with pytest.raises(DigestMismatch):
        precompute.precompute(config(made | {"data": str(tmp_path / "copy")}, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_store_of_several_sizes_is_finished_where_one_was_already(made, tmp_path, in_process):
    uris = precompute.precompute(config(made, tmp_path, sizes=[64, 32]))
    expected = [digests(uri) for uri in uris]
    sealed = manifest.read(uris[0])
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(latent_commit, "_tidy", lambda split: None)  # a job that ends between the two manifests
        precompute.precompute(config(made, tmp_path / "cut", sizes=[64, 32]))
    store.delete(tmp_path / "cut" / "32" / "train" / "manifest.json")
    in_process.clear()
    again = precompute.precompute(config(made, tmp_path / "cut", sizes=[64, 32]))
    assert not in_process and [digests(uri) for uri in again] == expected
    assert manifest.read(again[0]).digest == sealed.digest


def test_an_object_store_gets_the_same_bytes_and_nothing_more(made, tmp_path, in_process, moto_s3):
    out = moto_s3.uri("latents")
    (uri,) = precompute.precompute(config(made, out))
    (local,) = precompute.precompute(config(made, tmp_path / "out"))
    assert digests(uri) == digests(local)
    assert set(store.list_files(uri)) == {*digests(uri), "manifest.json"}
    (copied,) = precompute.precompute(config(made, tmp_path / "copied", reuse=out))
    assert digests(copied) == digests(local) and manifest.read(copied).meta["copied"] == N


def test_space_is_required_before_anything_is_encoded(made, tmp_path, in_process, monkeypatch):
    needed = []
    monkeypatch.setattr(store, "require_space", lambda uri, need: needed.append(need))
    (uri,) = precompute.precompute(config(made, tmp_path))
    stored = sum(entry.size for name, entry in manifest.read(uri).files.items() if name.endswith(".tar"))
    assert needed and needed[0] == pytest.approx(stored, rel=0.5)


@pytest.mark.parametrize(
    ("cores", "wanted", "each", "fewest"),
    [(8, 2, 1, 2), (3, 2, 1, 2), (2, 2, 0.5, 2), (2, 4, 0.5, 3), (1, 1, 0.5, 1), (1, 2, 0.5, 1)],
)
def test_a_core_is_left_to_decode_beside_the_encoders(cores, wanted, each, fewest):
    assert precompute.cores_each(cores, wanted) == each
    assert precompute.fewest_encoders(cores, wanted) == fewest
    assert each * (fewest + 1) <= cores
