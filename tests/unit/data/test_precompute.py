"""Encoding a shard, in this process: one canonical batch shape, commits that are skipped, and the job around it."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from latentray import build
from latentray.checkpoint import manifest, store
from latentray.data import decode, latents, members, precompute, shards
from latentray.errors import AlreadyExists, DigestMismatch, InputMissing


def _tiny():
    path = Path(__file__).resolve().parents[2] / "numerics" / "tiny.py"
    spec = importlib.util.spec_from_file_location("tiny_for_precompute", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tiny = _tiny()
N = 10


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("precompute")
    tiny.write_pictures(root, "train", N, per_shard=6)
    return {
        "data": str(root / "data"),
        "autoencoder": tiny.write_autoencoder(str(root / "autoencoder")),
        "text_source": tiny.write_text_encoder(str(root / "text")),
    }


def actor(made, out, **changes) -> precompute.EncoderActor:
    given = made | {"data": made["data"] + "/train"}
    return precompute.EncoderActor(tiny.plan(**given, out=str(out), **changes))


def test_a_shard_is_encoded_with_its_captions(made, tmp_path):
    one = actor(made, tmp_path)
    result = shards.ShardResult.from_dict(one.encode(1))
    assert result.entry.name == "00001.tar"
    assert [row["key"] for row in result.rows] == [f"{i:09d}_0" for i in range(6, N)]
    assert result.entry.sha256 == store.sha256_of(tmp_path / "00001.tar")
    source = one.splits[0][0]
    net = build.autoencoder_artifact(made["autoencoder"]).load()
    picture = members.picture_of(members.decode_sample(source.read(6)))
    expected = net.encode(decode.to_tensor(decode.to_square(picture, 64)[None]))
    shard = one._records(source, [6])
    record = members.decode_sample(next(shard).members)["latent.safetensors"]
    torch.testing.assert_close(record["mean"], expected.mean_BChw[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(record["logvar"], expected.logvar_BChw[0], rtol=1e-4, atol=1e-5)
    caption = members.captions_of(members.decode_sample(source.read(6)))[0]
    torch.testing.assert_close(
        record["text.clip.tokens"], one.encoder.embed([caption]).tokens_BLD, rtol=1e-4, atol=1e-5
    )


def test_a_latent_does_not_depend_on_its_neighbours(made, tmp_path):
    one = actor(made, tmp_path)
    alone, together = (
        next(one._records(one.splits[0][0], [3])).members,
        list(one._records(one.splits[0][0], list(range(N))))[3].members,
    )
    assert alone == together  # bit for bit: one canonical batch shape


def test_flip_variants_stand_beside_each_other(made, tmp_path):
    one = actor(made, tmp_path, flip_variants=True)
    plain, flipped = list(one._records(one.splits[0][0], [0]))
    assert (plain.key, flipped.key) == ("000000000_0", "000000000_1")
    assert plain.members["latent.safetensors"] != flipped.members["latent.safetensors"]


def test_a_committed_shard_is_skipped_and_one_of_another_key_redone(made, tmp_path, monkeypatch):
    first = actor(made, tmp_path).encode(0)
    again = actor(made, tmp_path)
    monkeypatch.setattr(again, "_records", lambda source, rows: pytest.fail("it was encoded again"))
    assert again.encode(0) == first
    other = actor(made, tmp_path, key="another")
    calls = []
    records = other._records
    monkeypatch.setattr(other, "_records", lambda source, rows: calls.append(rows) or records(source, rows))
    other.encode(0)
    assert len(calls) == 1
    assert store.read_json(tmp_path / "00000.tar.json")["key"] == "another"


def test_the_job_leaves_a_store_that_can_be_read(made, tmp_path, monkeypatch):
    out = tiny.write_latents(tmp_path, monkeypatch, **made)
    described = latents.describe(f"{out}/train")
    artifact = build.autoencoder_artifact(made["autoencoder"])
    described.require_autoencoder(artifact)
    assert described.scale == artifact.scale
    assert described.empty_prompt().tokens_BLD.shape == (1, 12, 16)
    opened = shards.IndexedShards.open(f"{out}/train", kind="latents")
    opened.verify()
    assert opened.count == N
    assert opened.manifest.inputs["autoencoder"] == artifact.digest
    assert not [name for name in store.list_files(f"{out}/train") if name.endswith(".tar.json")]
    before = manifest.read(f"{out}/train")
    tiny.write_latents(tmp_path, monkeypatch, **made)  # finished under this key: skipped
    assert manifest.read(f"{out}/train") == before
    other = tiny.write_autoencoder(str(tmp_path / "other"), seed=5)
    with pytest.raises(AlreadyExists):
        tiny.write_latents(tmp_path, monkeypatch, **made | {"autoencoder": other})


def test_damage_and_absence_are_refused_before_anything_is_encoded(made, tmp_path, monkeypatch):
    with pytest.raises(InputMissing):
        tiny.write_latents(tmp_path, monkeypatch, **made | {"data": str(tmp_path / "none")})
    with pytest.raises(InputMissing):
        tiny.write_latents(tmp_path, monkeypatch, **made | {"autoencoder": str(tmp_path / "none")})
    for name in store.list_files(made["data"]):
        store.upload(Path(made["data"]) / name, store.join(tmp_path / "copy", name))
    shard = tmp_path / "copy" / "train" / "00000.tar"
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    with pytest.raises(DigestMismatch):
        tiny.write_latents(tmp_path, monkeypatch, **made | {"data": str(tmp_path / "copy")})
    assert not (tmp_path / "latents").exists()
