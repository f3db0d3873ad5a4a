"""The latent store: its key covers what decides its bytes, and another autoencoder's latents are refused."""

import dataclasses
import types

import pytest
import safetensors.torch
import torch

from latentray.checkpoint import manifest
from latentray.config.precompute_latents import PrecomputeLatents
from latentray.config.text_encoder import TextEncoderConfig
from latentray.data import latents
from latentray.errors import ArtifactError, FingerprintMismatch
from latentray.models.autoencoder import LatentScale
from latentray.records import TextEmbedding

CONFIG = PrecomputeLatents(data="d", autoencoder_from="a", out="o")
KEY = dict(autoencoder_fingerprint="a", text_fingerprint="t", size=64)


def store_at(uri: str) -> latents.LatentStore:
    return latents.LatentStore(
        uri=uri, key="k", autoencoder_uri="a", autoencoder_fingerprint="f" * 64, scale=LatentScale(shift=0.1, scale=2.0),
        channels=4, size=64, encoder="clip", text_source="t", text_fingerprint="g", text_width=16,
        listing=manifest.Manifest(kind="latents", files={}),
    )  # fmt: skip


def test_the_key_covers_everything_that_decides_the_bytes():
    keys = {latents.key_of(CONFIG, **KEY)}
    for change in KEY:
        keys.add(latents.key_of(CONFIG, **KEY | {change: 128 if change == "size" else "other"}))
    for change in (
        dict(flip_variants=True),
        dict(batch_size=32),
        dict(text_dtype="float32"),
        dict(text_encoder=TextEncoderConfig(name="x")),
    ):
        keys.add(latents.key_of(dataclasses.replace(CONFIG, **change), **KEY))
    assert len(keys) == 8
    assert latents.key_of(dataclasses.replace(CONFIG, out="elsewhere", actors=[2, 4], device="cpu"), **KEY) in keys


def test_a_store_is_described_by_its_manifest(tmp_path):
    one = store_at(str(tmp_path))
    (tmp_path / "files").mkdir()
    made = manifest.publish(tmp_path / "files", tmp_path / "store", kind="latents", meta=latents.meta_of(one))
    got = latents.describe(str(tmp_path / "store"))
    assert got == dataclasses.replace(one, uri=str(tmp_path / "store"), listing=made)
    manifest.publish(tmp_path / "files", tmp_path / "data", kind="dataset")
    with pytest.raises(ArtifactError, match="this is a dataset"):
        latents.describe(str(tmp_path / "data"))


def test_another_autoencoder_is_refused_by_both_fingerprints():
    one = store_at("latents-uri")
    one.require_autoencoder(types.SimpleNamespace(fingerprint="f" * 64, uri="x"))
    with pytest.raises(FingerprintMismatch, match="ffffffffffff; this one is eeeeeeeeeeee") as caught:
        one.require_autoencoder(types.SimpleNamespace(fingerprint="e" * 64, uri="autoencoder-uri"))
    assert caught.value.where == "latents-uri and autoencoder-uri"


def test_a_record_holds_latent_and_embeddings():
    text = TextEmbedding(
        tokens_BLD=torch.randn(2, 3, 5), mask_BL=torch.ones(2, 3, dtype=torch.bool), pooled_BD=torch.randn(2, 5)
    )
    mean, logvar = torch.randn(4, 2, 2), torch.randn(4, 2, 2)
    (member,) = latents.record(mean, logvar, "clip", text, torch.float16).values()
    got = safetensors.torch.load(member)
    assert torch.equal(got["mean"], mean) and torch.equal(got["logvar"], logvar)
    assert got["text.clip.tokens"].dtype == torch.float16
    assert got["text.clip.mask"].dtype == torch.bool
    assert set(got) == {"mean", "logvar", "text.clip.tokens", "text.clip.mask", "text.clip.pooled"}
