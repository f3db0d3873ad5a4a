"""Encoding in one canonical shape: what comes out depends on the picture and the caption, not on what is beside them."""

import json

import numpy as np
import pytest
import torch

from latentray import build
from latentray.conditioning import text
from latentray.data import latents
from latentray.data.latent_encoder import Encoder
from latentray.data.latent_parts import FROM_PIXELS, FROM_RECORD, Job, Parcel
from latentray.errors import DataError

CAPTIONS = [
    f"a {color} {shape}"
    for color in ("red", "green", "blue", "pale")
    for shape in ["circle", "square", "star", "bar", "ring"]
]
PIXELS = torch.from_numpy(np.random.default_rng(0).integers(0, 255, (9, 64, 64, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def job(tiny, tmp_path_factory) -> Job:
    root = tmp_path_factory.mktemp("encoder")
    source = tiny.write_text_encoder(str(root / "text"))
    described = latents.TextSource.of(text.load(source), source)
    return Job(
        splits=(), samples=9, autoencoder=tiny.write_autoencoder(str(root / "autoencoder")), texts=(described,),
        shapes=(((64, 64),),), window=None, variants=(0,), batch_size=4, latent_dtype="float32", text_dtype="float32",
        max_pixels=10**6, skip_damaged=False, device="cpu",
    )  # fmt: skip


def changed(job: Job, **values) -> Encoder:
    return Encoder(Job(**{**job.__dict__, **values}))


def parcel(pictures: list[int], captions: list[list[str]]) -> Parcel:
    units = [{"from": FROM_PIXELS, "json": [{"captions": several}]} for several in captions]
    return Parcel(about={"units": units}, tensors={"pixels.0": PIXELS[pictures]})


def test_latents_are_the_autoencoders(job):
    mean, logvar = Encoder(job).latents(PIXELS)
    net = build.autoencoder_artifact(job.autoencoder).load()
    expected = net.encode(PIXELS.permute(0, 3, 1, 2).float() / 127.5 - 1)
    torch.testing.assert_close(mean, expected.mean_BChw, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logvar, expected.logvar_BChw, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("frames", [2, 3, 8])
def test_the_frames_of_a_clip_are_encoded_as_pictures_are(job, frames):
    encoder, clips = Encoder(job), PIXELS[: 9 // frames * frames].unflatten(0, (-1, frames))
    mean, logvar = encoder.latents(clips)
    assert mean.shape == logvar.shape == (9 // frames, frames, 4, 8, 8)
    flat_mean, flat_logvar = encoder.latents(clips.flatten(0, 1))
    assert torch.equal(mean.flatten(0, 1), flat_mean) and torch.equal(logvar.flatten(0, 1), flat_logvar)


@pytest.mark.parametrize("rows", [[0], [3, 0], [1, 2, 3, 0], [8, 7, 6, 5, 4, 3, 2, 1, 0]])
def test_a_latent_does_not_depend_on_its_neighbours_bit_for_bit(job, rows):
    encoder = Encoder(job)
    mean, logvar = encoder.latents(PIXELS[rows])
    alone_mean, alone_logvar = encoder.latents(PIXELS[:1])
    place = rows.index(0)
    assert torch.equal(mean[place], alone_mean[0]) and torch.equal(logvar[place], alone_logvar[0])


def test_an_embedding_does_not_depend_on_what_was_embedded_before_or_beside(job):
    one, other = Encoder(job), Encoder(job)
    together = one.encode(parcel([0], [CAPTIONS]))
    for caption in CAPTIONS[::-1]:
        alone = other.encode(parcel([0], [[caption]]))
        for name in ("text.clip.tokens", "text.clip.mask", "text.clip.pooled"):
            assert torch.equal(alone.tensors[name][0], together.tensors[name][CAPTIONS.index(caption)])
    expected = text.load(job.texts[0].source).embed(CAPTIONS)
    torch.testing.assert_close(together.tensors["text.clip.tokens"], expected.tokens_BLD, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(together.tensors["text.clip.pooled"], expected.pooled_BD, rtol=1e-4, atol=1e-5)


def test_what_is_remembered_is_bounded_and_changes_nothing(job, monkeypatch):
    encoder = Encoder(job)
    encoder.texts[0]._most = 3
    whole = Encoder(job).encode(parcel([0], [CAPTIONS]))
    for _ in range(2):
        again = encoder.encode(parcel([0], [CAPTIONS]))
        assert torch.equal(again.tensors["text.clip.tokens"], whole.tensors["text.clip.tokens"])
        assert len(encoder.texts[0]._known) == 3


def test_copied_records_pass_without_being_encoded(job):
    kept = {"kept.0.0": torch.arange(5, dtype=torch.uint8)}
    given = Parcel(about={"units": [{"from": FROM_RECORD, "json": [{"captions": ["x"]}]}]}, tensors=kept)
    got = Encoder(job).encode(Parcel.from_table(given.to_table()))
    assert got.about["captions"] == [] and set(got.tensors) == set(kept)
    assert torch.equal(got.tensors["kept.0.0"], kept["kept.0.0"])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_latents_are_stored_in_the_type_asked_for(job, dtype):
    mean, logvar = changed(job, latent_dtype=dtype).latents(PIXELS[:2])
    exact, _ = Encoder(job).latents(PIXELS[:2])
    assert mean.dtype == logvar.dtype == getattr(torch, dtype)
    assert torch.equal(mean, exact.to(mean.dtype))


def test_in_bf16_latents_move_by_about_a_hundredth_and_do_not_depend_on_their_neighbours(job):
    exact, _ = Encoder(job).latents(PIXELS)
    encoder = changed(job, precision="bf16")
    mean, logvar = encoder.latents(PIXELS)
    assert mean.dtype == logvar.dtype == torch.float32 and not torch.equal(mean, exact)
    assert (mean - exact).std() < 0.02 * exact.std()
    assert next(encoder.autoencoder.parameters()).dtype == torch.bfloat16
    for i in (0, 3, 8):
        assert torch.equal(encoder.latents(PIXELS[i : i + 1])[0][0], mean[i])


def test_latents_that_are_no_numbers_are_refused(job):
    encoder = Encoder(job)
    with torch.no_grad():
        encoder.autoencoder.encoder.quant.bias.fill_(1e5)  # beyond float16
    encoder.latents(PIXELS[:1])
    encoder.job = Job(**{**job.__dict__, "latent_dtype": "float16"})
    with pytest.raises(DataError, match="not finite in float16") as caught:
        encoder.latents(PIXELS[:1])
    assert "latent_dtype=float32" in caught.value.mend


def test_a_parcel_survives_its_way_as_a_row(job):
    given = parcel([1, 2], [["a"], ["b \ud83d \n"]])
    got = Parcel.from_table(given.to_table())
    assert json.dumps(got.about) == json.dumps(given.about)
    assert torch.equal(got.tensors["pixels.0"], given.tensors["pixels.0"])
