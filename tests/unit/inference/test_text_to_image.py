"""A model folder: written, verified and sampled; a picture belongs to its request, not to its batch."""

import dataclasses

import numpy as np
import pytest
import torch

from latentray import build
from latentray.checkpoint import manifest, store
from latentray.config.autoencoder import AutoencoderConfig
from latentray.config.denoiser import DenoiserConfig
from latentray.config.objective import ObjectiveConfig
from latentray.errors import ArtifactError, ConfigError, DigestMismatch, InputMissing
from latentray.inference import model_folder
from latentray.inference.sampling import SamplingRequest, TextToImage
from latentray.models.autoencoder import LatentScale
from latentray.models.unet import UNet

DEFAULTS = model_folder.SamplingDefaults(sampler="ddim", steps=3, guidance_scale=2.0)
AUTOENCODER = AutoencoderConfig(channels=[8, 8], blocks=1, groups=4, attention=False)
DENOISER = DenoiserConfig(channels=[8, 8], blocks=1, depth=[1, 0], heads=2, context_width=16, groups=4)
SCALE = LatentScale(shift=0.25, scale=3.0)


@pytest.fixture(scope="module")
def uri(write_model):
    return write_model(ObjectiveConfig(prediction="v"))


@pytest.fixture(scope="module")
def sampler(uri):
    return TextToImage(model_folder.load(uri), device="cpu", dtype=torch.float32)


def request(**changes) -> SamplingRequest:
    values = dict(prompt="a red circle", steps=3, guidance_scale=2.0, seed=1, sampler="ddim", height=16, width=16)
    return SamplingRequest(**(values | changes))


def copied(uri: str, to) -> str:
    for name in store.list_files(uri):
        store.upload(store.local_path(store.join(uri, name)), store.join(to, name))
    return str(to)


def test_a_model_comes_back_as_it_was_written(uri):
    model = model_folder.load(uri)
    expected = build.seeded(lambda: UNet(DENOISER), 1).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.denoiser.state_dict().items())
    assert (model.denoiser.config, model.autoencoder.config) == (DENOISER, AUTOENCODER)
    assert (model.scale, model.defaults, model.size) == (SCALE, DEFAULTS, 16)
    assert model.objective == ObjectiveConfig(prediction="v")
    assert not model.denoiser.training and not any(p.requires_grad for p in model.denoiser.parameters())
    assert model.digest == manifest.read(uri).digest


def test_text_encoders_compute_in_bf16_where_that_is_asked(uri, sampler):
    half = TextToImage(model_folder.load(uri), device="cpu", dtype=torch.float32, text_precision="bf16")
    (encoder,) = half.model.text_encoders
    assert {p.dtype for p in encoder.model.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in half.denoiser.parameters()} == {torch.float32}
    exact, found = (model.latents([request()]) for model in (sampler, half))
    assert not torch.equal(found, exact) and (found - exact).abs().max() < 0.05 * exact.abs().max()


def test_what_a_server_asks_of_it(uri):
    loaded = TextToImage.load(uri, device="cpu")
    assert (loaded.defaults, loaded.size, loaded.downsampling, loaded.max_steps) == (DEFAULTS, 16, 2, 1000)
    assert "ddim" in loaded.samplers and "flow_euler" not in loaded.samplers


@pytest.mark.parametrize("name", ["config.json", "denoiser.safetensors", "text_encoders/clip/model.safetensors"])
def test_a_flipped_bit_is_refused_by_name(uri, tmp_path, name):
    copy = copied(uri, tmp_path / "copy")
    data = bytearray(store.read_bytes(store.join(copy, name)))
    data[-5] ^= 1
    store.write_bytes(store.join(copy, name), bytes(data))
    with pytest.raises(DigestMismatch) as caught:
        TextToImage.load(copy)
    assert caught.value.where == store.join(copy, name)


def test_what_is_no_model_is_refused(tmp_path):
    with pytest.raises(InputMissing):
        model_folder.load(str(tmp_path / "nothing"))
    (tmp_path / "x").mkdir()
    manifest.publish(tmp_path / "x", tmp_path / "report", kind="report")
    with pytest.raises(ArtifactError, match="this is a report"):
        model_folder.load(str(tmp_path / "report"))


def test_the_seed_decides_the_picture(sampler):
    one, again, other = sampler.sample([request(), request(), request(seed=2)])
    assert one.pixels_HWC.shape == (16, 16, 3)
    assert one.pixels_HWC.dtype == np.uint8
    assert np.array_equal(one.pixels_HWC, again.pixels_HWC)
    assert not np.array_equal(one.pixels_HWC, other.pixels_HWC)
    assert np.array_equal(sampler.sample([request(), request(), request(seed=2)])[0].pixels_HWC, one.pixels_HWC)


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": "a blue square"},
        {"negative_prompt": "blue"},
        {"guidance_scale": 9.0},
        {"steps": 4},
        {"sampler": "ddpm"},
    ],
)
def test_every_field_counts(sampler, change):
    base, changed = sampler.latents([request(), request(**change)])
    assert not torch.allclose(base, changed, atol=1e-4)


def test_without_guidance_the_negative_prompt_is_not_read(sampler):
    a, b = sampler.latents([request(guidance_scale=1.0), request(guidance_scale=1.0, negative_prompt="blue")])
    assert torch.equal(a, b)


def test_a_request_in_a_mixed_batch_is_what_it_is_alone(sampler):
    mixed = [
        request(),
        request(sampler="dpmpp_2m", steps=5, seed=7, guidance_scale=1.0),
        request(sampler="heun", steps=2, seed=8, prompt="a blue square"),
        request(sampler="ddpm", steps=4, seed=9, guidance_scale=6.0, negative_prompt="red"),
    ]
    together = sampler.latents(mixed)
    for i, one in enumerate(mixed):
        torch.testing.assert_close(sampler.latents([one])[0], together[i], rtol=1e-3, atol=1e-4)


def test_decoding_uses_the_scale_that_encoding_used(sampler):
    latent = torch.randn(1, 4, 8, 8)
    z = sampler.model.scale.normalise(latent)
    expected = sampler.autoencoder.decode(latent).clamp(-1, 1)
    got = torch.from_numpy(sampler.decode(z)).permute(0, 3, 1, 2).float() / 127.5 - 1
    assert (got - expected).abs().max() <= 0.5 / 127.5 + 1e-4


def test_another_size_than_the_native_one(sampler):
    assert sampler.sample([request(height=8, width=24)])[0].pixels_HWC.shape == (8, 24, 3)


@pytest.mark.parametrize(
    ("requests", "where"),
    [
        ([request(height=15)], "size"),
        ([request(height=0)], "size"),
        ([request(), request(height=8)], "size"),
        ([request(sampler="flow_euler")], "sampler"),
        ([request(steps=0)], "steps"),
    ],
)
def test_what_cannot_be_drawn_is_refused_by_its_field(sampler, requests, where):
    with pytest.raises(ConfigError) as caught:
        sampler.sample(requests)
    assert caught.value.where == where


def test_a_prompt_that_is_too_long_is_cut_and_says_so(sampler):
    long, short = sampler.sample([request(prompt="red " * 40), request()])
    assert (long.truncated, short.truncated) == (True, False)


def test_a_request_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        request().seed = 2
