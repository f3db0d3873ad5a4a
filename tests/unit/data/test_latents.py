"""The latent store: its key covers what decides its bytes, and another autoencoder's latents are refused."""

import dataclasses
import types

import pytest
import safetensors.torch
import torch

from latentray.checkpoint import manifest
from latentray.conditioning import text
from latentray.config.precompute_latents import PrecomputeLatents
from latentray.data import latents
from latentray.errors import ArtifactError, FingerprintMismatch
from latentray.models.autoencoder import LatentScale
from latentray.records import TextEmbedding

CONFIG = PrecomputeLatents(data="d", autoencoder_from="a", out="o")
TEXT = latents.TextSource(name="clip", source="t", fingerprint="g", width=16, max_tokens=12)
KEY = dict(autoencoder_fingerprint="a", texts=(TEXT,), size=64)


def store_at(uri: str, **changes) -> latents.LatentStore:
    values = dict(
        uri=uri, key="k", autoencoder_uri="a", autoencoder_fingerprint="f" * 64, scale=LatentScale(shift=0.1, scale=2.0),
        channels=4, size=64, texts=(TEXT,), variants=(0, 1), listing=manifest.Manifest(kind="latents", files={}),
    )  # fmt: skip
    return latents.LatentStore(**values | changes)


def test_the_key_covers_what_decides_a_records_bytes_and_nothing_else():
    keys = {latents.key_of(CONFIG, **KEY)}
    others = [dataclasses.replace(TEXT, fingerprint="other"), dataclasses.replace(TEXT, name="other")]
    changes = [dict(autoencoder_fingerprint="b"), dict(size=128), *(dict(texts=(one,)) for one in others)]
    for change in [*changes, dict(texts=()), dict(texts=(TEXT, others[1]))]:
        keys.add(latents.key_of(CONFIG, **KEY | change))
    for change in (dict(latent_dtype="float16"), dict(text_dtype="float32"), dict(precision="bf16")):
        keys.add(latents.key_of(dataclasses.replace(CONFIG, **change), **KEY))
    for change in (dict(size=None), dict(frames=8, fps=4.0), dict(frames=8, fps=8.0), dict(frames=16, fps=8.0)):
        keys.add(latents.key_of(CONFIG, **KEY | change))
    assert len(keys) == 14
    same = dict(out="elsewhere", actors=[2, 4], device="cpu", batch_size=8, crops=3, flip_variants=True, reuse="x")
    assert latents.key_of(dataclasses.replace(CONFIG, **same), **KEY) == latents.key_of(CONFIG, **KEY)
    moved = dataclasses.replace(TEXT, source="elsewhere")
    assert latents.key_of(CONFIG, **KEY | {"texts": (moved,)}) == latents.key_of(CONFIG, **KEY)


def test_a_store_is_described_by_its_manifest(tmp_path):
    one = store_at(str(tmp_path))
    (tmp_path / "files").mkdir()
    made = manifest.publish(tmp_path / "files", tmp_path / "store", kind="latents", meta=latents.meta_of(one))
    got = latents.describe(str(tmp_path / "store"))
    assert [(text.name, text.source, text.fingerprint, text.width) for text in got.texts] == [("clip", "t", "g", 16)]
    assert got == dataclasses.replace(one, uri=str(tmp_path / "store"), listing=made)
    bucketed = store_at(str(tmp_path / "b"), buckets=((64, 64), (32, 96)), frames=8, fps=4.5)
    made = manifest.publish(tmp_path / "files", tmp_path / "b", kind="latents", meta=latents.meta_of(bucketed))
    assert made.meta["buckets"] == [[64, 64], [32, 96]]
    assert latents.describe(str(tmp_path / "b")) == dataclasses.replace(bucketed, listing=made)
    manifest.publish(tmp_path / "files", tmp_path / "data", kind="dataset")
    with pytest.raises(ArtifactError, match="this is a dataset"):
        latents.describe(str(tmp_path / "data"))


def test_a_store_from_before_there_were_buckets_and_clips_is_one_of_squares(tmp_path):
    meta = {k: v for k, v in latents.meta_of(store_at("x")).items() if k not in ("buckets", "frames", "fps")}
    (tmp_path / "files").mkdir()
    manifest.publish(tmp_path / "files", tmp_path / "store", kind="latents", meta=meta)
    got = latents.describe(str(tmp_path / "store"))
    assert (got.size, got.buckets, got.frames, got.fps) == (64, (), 0, 0.0)


def test_another_autoencoder_is_refused_by_both_fingerprints():
    one = store_at("latents-uri")
    one.require_autoencoder(types.SimpleNamespace(fingerprint="f" * 64, uri="x"))
    with pytest.raises(FingerprintMismatch, match="ffffffffffff; this one is eeeeeeeeeeee") as caught:
        one.require_autoencoder(types.SimpleNamespace(fingerprint="e" * 64, uri="autoencoder-uri"))
    assert caught.value.where == "latents-uri and autoencoder-uri"


def test_stores_of_different_encoders_are_not_mixed():
    one = store_at("x")
    one.require_like(store_at("y", variants=(0,), size=128))
    big = dataclasses.replace(TEXT, fingerprint="h")
    for change in (dict(channels=8), dict(texts=(big,)), dict(scale=LatentScale(shift=0.0, scale=1.0))):
        with pytest.raises(FingerprintMismatch, match="cannot be mixed"):
            one.require_like(store_at("y", **change))


def test_stores_of_other_text_encoders_cannot_be_mixed():
    store_at("x", texts=()).require_like(store_at("y", texts=()))
    for texts in ((), (dataclasses.replace(TEXT, name="t5"),), (TEXT, dataclasses.replace(TEXT, name="big"))):
        with pytest.raises(FingerprintMismatch, match="differ in text encoders"):
            store_at("x", texts=texts).require_like(store_at("y"))


def test_a_text_encoder_that_has_changed_is_not_taken_for_the_one_it_was(tiny, tmp_path):
    source = tiny.write_text_encoder(str(tmp_path / "encoder"))
    described = latents.TextSource.of(text.load(source), source)
    assert described.load().fingerprint == described.fingerprint
    with pytest.raises(FingerprintMismatch, match="has changed"):
        dataclasses.replace(described, fingerprint="0" * 64).load()


def test_a_record_holds_latent_and_embeddings():
    text = TextEmbedding(
        tokens_BLD=torch.randn(2, 3, 5), mask_BL=torch.ones(2, 3, dtype=torch.bool), pooled_BD=torch.randn(2, 5)
    )
    mean, logvar = torch.randn(4, 2, 2), torch.randn(4, 2, 2)
    (member,) = latents.record(mean, logvar, latents.text_tensors("text.clip", text, torch.float16)).values()
    got = safetensors.torch.load(member)
    assert torch.equal(got["mean"], mean) and torch.equal(got["logvar"], logvar)
    assert torch.equal(got["text.clip.tokens"], text.tokens_BLD.half())
    assert got["text.clip.mask"].dtype == torch.bool
    assert set(got) == {"mean", "logvar", "text.clip.tokens", "text.clip.mask", "text.clip.pooled"}
