"""The text encoder: shapes, determinism, a fingerprint of what decides an embedding, and refusals without a network."""

import shutil

import huggingface_hub
import pytest
import torch

from latentray.checkpoint import manifest, store
from latentray.conditioning import text, tiny_text_encoder
from latentray.config.text_encoder import TextEncoderConfig, TinyTextEncoderConfig
from latentray.data.latents import TextSource
from latentray.errors import ArtifactError, ConfigError, InputMissing

CAPTIONS = ["a red circle on a white background", "a blue square on a black background", "green"]
CONFIG = TinyTextEncoderConfig(width=16, layers=1, heads=2, max_tokens=12, vocabulary=300)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder")
    tiny_text_encoder.write(folder, CAPTIONS, CONFIG)
    return folder


@pytest.fixture(scope="module")
def encoder(folder):
    return text.load(str(folder))


def test_what_is_written_is_safetensors_and_json(folder):
    assert sorted(p.name for p in folder.iterdir()) == sorted(text.FILES)


def test_shapes(encoder):
    embedded = encoder.embed(CAPTIONS)
    assert embedded.tokens_BLD.shape == (3, 12, 16)
    assert embedded.mask_BL.shape == (3, 12)
    assert embedded.pooled_BD.shape == (3, 16)
    assert (encoder.width, encoder.max_tokens) == (16, 12)
    assert embedded.tokens_BLD.dtype == torch.float32
    assert embedded.mask_BL.dtype == torch.bool
    assert not any(p.requires_grad for p in encoder.model.parameters())
    assert not encoder.model.training


def test_the_mask_is_true_at_real_tokens(encoder):
    lengths = encoder.embed([*CAPTIONS, ""]).mask_BL.sum(1)
    assert lengths[0] > lengths[2] > lengths[3] == 2  # start and end


def test_embeddings_are_deterministic_and_tell_captions_apart(encoder, folder):
    tokens = encoder.embed(CAPTIONS).tokens_BLD
    assert torch.equal(tokens, text.load(str(folder)).embed(CAPTIONS).tokens_BLD)
    assert not torch.allclose(tokens[0], tokens[1])
    torch.testing.assert_close(encoder.embed(CAPTIONS[1:2]).tokens_BLD[0], tokens[1], rtol=1e-4, atol=1e-5)


def test_the_same_captions_and_seed_make_the_same_encoder(tmp_path, encoder):
    tiny_text_encoder.write(tmp_path, reversed(CAPTIONS), CONFIG)
    assert text.fingerprint_of(tmp_path) == encoder.fingerprint


def test_the_fingerprint_covers_weights_and_tokenizer(folder, tmp_path, encoder):
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        copy = tmp_path / name.split(".")[0]
        shutil.copytree(folder, copy)
        data = bytearray((copy / name).read_bytes())
        data[-10] ^= 1
        (copy / name).write_bytes(bytes(data))
        assert text.fingerprint_of(copy) != encoder.fingerprint


def test_in_bf16_embeddings_move_by_about_a_hundredth_under_a_fingerprint_of_their_own(folder, encoder):
    half = text.load(str(folder), reading=text.Reading(precision="bf16"))
    assert {p.dtype for p in half.model.parameters()} == {torch.bfloat16}
    exact, found = encoder.embed(CAPTIONS), half.embed(CAPTIONS)
    for ours, theirs in ((found.tokens_BLD, exact.tokens_BLD), (found.pooled_BD, exact.pooled_BD)):
        assert ours.dtype == torch.float32 and not torch.equal(ours, theirs)
        assert (ours - theirs).std() < 0.02 * theirs.std()
    assert half.fingerprint != encoder.fingerprint
    source = TextSource.of(half, str(folder))
    assert source.precision == "bf16" and source.load().fingerprint == half.fingerprint


def test_a_reading_in_fp32_has_the_fingerprint_that_it_had_before_there_was_bf16(folder):
    files = {name: store.sha256_of(folder / name) for name in ("config.json", "model.safetensors", "tokenizer.json")}
    before = {"kind": "clip", "layer": 2, "max_tokens": None}
    assert text.fingerprint_of(folder, text.Reading(layer=2)) == store.digest_of(files | {"reading": before})


@pytest.mark.parametrize("settings", [{"precision": "fp16"}, {"kind": "tokens", "precision": "bf16"}])
def test_a_precision_that_there_is_not_is_refused(settings):
    with pytest.raises(ConfigError) as caught:
        TextEncoderConfig(**settings)
    assert caught.value.where == "text_encoder.precision"


def test_truncation_is_noticed(encoder):
    assert not encoder.is_truncated("green")
    assert encoder.is_truncated("green " * 30)
    assert encoder.embed(["green " * 30]).tokens_BLD.shape == (1, 12, 16)


def test_an_artifact_is_loaded_and_verified(tmp_path, encoder):
    uri = str(tmp_path / "encoder")
    made = tiny_text_encoder.publish(uri, CAPTIONS, CONFIG)
    assert made.kind == "text_encoder"
    assert tiny_text_encoder.publish(uri, ["others"], CONFIG) == made  # kept as it is
    assert text.load(uri).fingerprint == encoder.fingerprint


def test_a_remote_artifact_is_loaded(moto_s3, encoder):
    tiny_text_encoder.publish(moto_s3.uri("encoder"), CAPTIONS, CONFIG)
    loaded = text.load(moto_s3.uri("encoder"))
    assert loaded.fingerprint == encoder.fingerprint
    assert manifest.read(moto_s3.uri("encoder")).kind == "text_encoder"
    assert store.is_remote(moto_s3.uri("encoder"))


@pytest.mark.parametrize("source", ["/nowhere/encoder", "./nowhere", "nobody/no-such-model", "nobody/no name"])
def test_what_is_not_there_is_refused_without_a_network(source):
    with pytest.raises(InputMissing) as caught:
        text.load(source)
    assert caught.value.where == source
    assert "text_encoder.source" in caught.value.mend


def test_a_hub_id_may_name_a_revision(folder, encoder, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--tiny--clip"
    shutil.copytree(folder, repository / "snapshots" / ("a" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "v1").write_text("a" * 40)
    assert text.load("tiny/clip@v1").fingerprint == encoder.fingerprint
    assert text.load(f"tiny/clip@{'a' * 40}").fingerprint == encoder.fingerprint
    with pytest.raises(InputMissing):
        text.load("tiny/clip@v2")


def test_an_incomplete_folder_names_what_it_lacks(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / "model.safetensors").unlink()
    with pytest.raises(ArtifactError, match="lacks model.safetensors"):
        text.load(str(tmp_path / "copy"))


def test_pickled_weights_are_refused_with_how_to_convert_them(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / "model.safetensors").rename(tmp_path / "copy" / "pytorch_model.bin")
    with pytest.raises(ArtifactError, match="are a pickle, pytorch_model.bin") as caught:
        text.load(str(tmp_path / "copy"))
    assert "safe_serialization=True" in caught.value.mend


def test_heads_must_divide_the_width():
    with pytest.raises(ConfigError):
        TinyTextEncoderConfig(width=10, heads=4)
