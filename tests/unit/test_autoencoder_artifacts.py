"""The artifact of an autoencoder: what latents belong to, the identity, and artifacts of the first format."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from latentray import build
from latentray.checkpoint import manifest, store, weights
from latentray.config.autoencoder import AutoencoderConfig
from latentray.data import canonical
from latentray.errors import ArtifactError, InputMissing
from latentray.models.autoencoder import LatentScale

CONFIG = AutoencoderConfig(channels=[8, 8], blocks=1, groups=4, attention=False)
SCALE = LatentScale(shift=0.1, scale=2.0)


def state_of(config: AutoencoderConfig, seed: int = 0) -> dict[str, torch.Tensor]:
    return build.seeded(lambda: build.autoencoder(config), seed).state_dict()


def published(root: Path, name: str, state, *, config=CONFIG, scale=SCALE, **more) -> build.AutoencoderArtifact:
    folder = root / f"{name}-built"
    folder.mkdir()
    build.write_autoencoder(folder, config, state, scale=scale, size=16, **more)
    manifest.publish(folder, root / name, kind="autoencoder")
    return build.autoencoder_artifact(str(root / name))


def test_latents_belong_to_the_encoder_and_its_scale(tmp_path):
    state = state_of(CONFIG)
    one = published(tmp_path, "one", state)
    decoder = {key: value + 1 if key.startswith("decoder.") else value for key, value in state.items()}
    assert published(tmp_path, "decoder", decoder).fingerprint == one.fingerprint
    bit = {key: value.clone() for key, value in state.items()}
    bit["encoder.levels.0.conv1.weight"].view(torch.int32).view(-1)[3] ^= 1
    others = [
        published(tmp_path, "bit", bit),
        published(tmp_path, "scale", state, scale=LatentScale(shift=0.1, scale=2.1)),
        published(tmp_path, "shift", state, scale=LatentScale(shift=0.2, scale=2.0)),
    ]
    assert len({one.fingerprint, *(other.fingerprint for other in others)}) == 4


def test_a_codebook_belongs_to_decoding(tmp_path):
    config = AutoencoderConfig(
        kind="vq", codebook_size=5, channels=[8, 8], blocks=1, groups=4, attention=False, latent_channels=3
    )
    state = state_of(config)
    one = published(tmp_path, "one", state, config=config)
    other = published(tmp_path, "other", state | {"quantizer.codebook_KD": torch.ones(5, 3)}, config=config)
    assert one.fingerprint == other.fingerprint and one.digest != other.digest
    assert torch.equal(one.load().quantizer.codebook_KD, state["quantizer.codebook_KD"])


def test_an_artifact_of_the_first_format_keeps_its_fingerprint_and_hands_it_on(tmp_path):
    """Its latents are there: neither a newer version nor a decoder trained on may orphan them."""
    state = state_of(CONFIG)
    folder = tmp_path / "built"
    folder.mkdir()
    weights.save(folder / "autoencoder.safetensors", state)
    older = {"in_channels": 3, "latent_channels": 4, "channels": [8, 8], "blocks": 1, "patch": 1, "attention": False}
    described = {"format": 1, "autoencoder": older | {"groups": 4}, "size": 16, "shift": 0.1, "scale": 2.0}
    (folder / "config.json").write_text(json.dumps(described))
    manifest.publish(folder, tmp_path / "first", kind="autoencoder")
    first = build.autoencoder_artifact(str(tmp_path / "first"))
    decides = {key: described[key] for key in ("autoencoder", "shift", "scale")}
    sha256 = store.sha256_of(folder / "autoencoder.safetensors")
    assert first.fingerprint == store.digest_of(decides | {"weights": sha256})
    assert first.config == CONFIG and first.scale == SCALE
    after = published(tmp_path, "after", state, fingerprint=first.fingerprint)
    assert after.fingerprint == first.fingerprint


def test_a_later_format_is_refused(tmp_path):
    folder = tmp_path / "built"
    folder.mkdir()
    build.write_autoencoder(folder, CONFIG, state_of(CONFIG), scale=SCALE, size=16)
    described = json.loads((folder / "config.json").read_text()) | {"format": 3}
    (folder / "config.json").write_text(json.dumps(described))
    manifest.publish(folder, tmp_path / "later", kind="autoencoder")
    with pytest.raises(ArtifactError, match="format 3"):
        build.autoencoder_artifact(str(tmp_path / "later"))


def test_weights_of_another_shape_are_refused_by_the_first_that_differs(tmp_path):
    wider = AutoencoderConfig(channels=[16, 16], blocks=1, groups=4, attention=False)
    made = published(tmp_path, "other", state_of(CONFIG), config=wider)
    with pytest.raises(ArtifactError, match=r"conv_in.weight is \(8, 3, 3, 3\), wanted \(16, 3, 3, 3\); \d+ more"):
        made.load()


def test_the_identity_is_an_artifact_without_training(tmp_path, monkeypatch):
    found = build.autoencoder_artifact("identity")
    assert found.config.downsampling == 1 and found.config.latent_channels == 3
    assert found.scale == LatentScale(shift=0.0, scale=1.0)
    assert found.uri == "identity" and found.state() == {}
    monkeypatch.chdir(tmp_path)
    assert build.autoencoder_artifact(store.absolute("identity")) == found  # as jobs hand it to their workers
    net = found.load()
    x = torch.rand(3, 3, 7, 5) * 2 - 1
    for dtype in (torch.float32, torch.float16):
        posterior = canonical.encode(net, x, batch_size=2, dtype=dtype)
        assert torch.equal(posterior.mean_BChw, x.to(dtype)) and (posterior.logvar_BChw == -30).all()
    assert torch.equal(net.decode(x), x)


def test_an_artifact_that_is_called_identity_is_itself(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = published(tmp_path, "identity", state_of(CONFIG))
    assert made.config == CONFIG


def test_no_other_folder_that_is_not_there_is_taken_for_the_identity(tmp_path):
    with pytest.raises(InputMissing):
        build.autoencoder_artifact(str(tmp_path / "identity"))
