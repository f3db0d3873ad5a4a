"""What is encoded in one canonical shape depends on itself alone, and is what the latent job stores."""

import copy
import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from latentray import build
from latentray.conditioning import text
from latentray.data.canonical import CAPTIONS_AT_ONCE, CaptionEmbedder, encode
from latentray.errors import DataError

CAPTIONS = [f"a {color} {shape}" for color in ("red", "green", "blue", "pale") for shape in ("circle", "star", "bar")]
CAPTIONS += [f"two {shape}s" for shape in ("circle", "star", "bar", "ring", "square", "dot")]


def _tiny():
    path = Path(__file__).resolve().parents[2] / "numerics" / "tiny.py"
    spec = importlib.util.spec_from_file_location("tiny_for_canonical", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory):
    torch.set_num_threads(1)
    uri = _tiny().write_autoencoder(str(tmp_path_factory.mktemp("canonical") / "autoencoder"))
    return build.autoencoder_artifact(uri).load()


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return text.load(_tiny().write_text_encoder(str(tmp_path_factory.mktemp("canonical") / "text")))


X = torch.rand(9, 3, 48, 80, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize("rows", [[0], [3, 0], [1, 2, 3, 0], [8, 7, 6, 5, 4, 3, 2, 1, 0]])
def test_a_latent_does_not_depend_on_what_is_encoded_beside_it(autoencoder, rows):
    alone = encode(autoencoder, X[:1], batch_size=4, dtype=torch.float32)
    among = encode(autoencoder, X[rows], batch_size=4, dtype=torch.float32)
    place = rows.index(0)
    assert among.mean_BChw.shape == (len(rows), 4, 6, 10)
    assert torch.equal(among.mean_BChw[place], alone.mean_BChw[0])
    assert torch.equal(among.logvar_BChw[place], alone.logvar_BChw[0])


def test_it_is_the_autoencoders_and_rounded_as_asked(autoencoder):
    expected = autoencoder.encode(X)
    exact = encode(autoencoder, X, batch_size=4, dtype=torch.float32)
    torch.testing.assert_close(exact.mean_BChw, expected.mean_BChw, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(exact.logvar_BChw, expected.logvar_BChw, rtol=1e-4, atol=1e-5)
    rounded = encode(autoencoder, X, batch_size=4, dtype=torch.float16)
    assert torch.equal(rounded.mean_BChw, exact.mean_BChw.half())


def test_latents_that_are_no_numbers_are_refused(autoencoder):
    broken = copy.deepcopy(autoencoder)
    broken.encoder.quant.bias.data.fill_(1e5)  # beyond float16
    assert encode(broken, X, batch_size=4, dtype=torch.float32).mean_BChw.isfinite().all()
    with pytest.raises(DataError, match="not finite in float16") as caught:
        encode(broken, X, batch_size=4, dtype=torch.float16, where="runs/autoencoder")
    assert caught.value.where == "runs/autoencoder"


def test_an_embedding_does_not_depend_on_order_company_or_memory(encoder):
    one, forgetful = CaptionEmbedder(encoder, torch.float16), CaptionEmbedder(encoder, torch.float16, cached_bytes=1)
    assert len(CAPTIONS) > CAPTIONS_AT_ONCE
    together = one.embed(CAPTIONS)
    for i in (17, 3, 3, 0):
        for other in (one, forgetful):
            alone = other.embed([CAPTIONS[i]])
            assert torch.equal(alone.tokens_BLD[0], together.tokens_BLD[i])
            assert torch.equal(alone.mask_BL[0], together.mask_BL[i])
            assert torch.equal(alone.pooled_BD[0], together.pooled_BD[i])
    expected = encoder.embed(CAPTIONS)
    torch.testing.assert_close(together.tokens_BLD.float(), expected.tokens_BLD, rtol=1e-3, atol=1e-3)
    assert (
        together.tokens_BLD.dtype == together.pooled_BD.dtype == torch.float16 and together.mask_BL.dtype == torch.bool
    )


def test_what_is_remembered_is_bounded_and_embedded_once(encoder, monkeypatch):
    asked = []
    embed = encoder.embed
    monkeypatch.setattr(encoder, "embed", lambda captions: asked.append(len(captions)) or embed(captions))
    row = encoder.max_tokens * encoder.width * 4
    embedder = CaptionEmbedder(encoder, torch.float32, cached_bytes=3 * row)
    repeated = embedder.embed(["a bar", "a ring", "a bar", "a dot", "a bar"])
    assert asked == [CAPTIONS_AT_ONCE]  # three captions, in one go
    assert torch.equal(repeated.tokens_BLD[0], repeated.tokens_BLD[4])
    embedder.embed(["a ring", "a bar"])
    assert len(asked) == 1
    embedder.embed(["a star"])  # pushes out what was used least recently
    embedder.embed(["a bar", "a ring"])
    assert len(asked) == 2
    embedder.embed(["a dot"])
    assert len(asked) == 3
