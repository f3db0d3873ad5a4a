"""Sampling clips: by the very sampler of pictures, from a model folder that says how many frames and how fast."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
import torch

from latentray import randomness
from latentray.checkpoint import manifest, store, weights
from latentray.config.denoiser import DenoiserConfig
from latentray.config.objective import ObjectiveConfig
from latentray.errors import ArtifactError, ConfigError
from latentray.inference import model_folder
from latentray.inference.requests import SamplingRequest
from latentray.inference.sampling import TextToImage
from latentray.models.video import is_temporal

IMAGE = DenoiserConfig(channels=[8, 8], blocks=1, depth=[1, 0], heads=2, context_width=16, groups=4)
VIDEO = dataclasses.replace(IMAGE, family="video")


@pytest.fixture(scope="module")
def uri(write_model):
    return write_model(ObjectiveConfig(prediction="v"), denoiser=VIDEO, frames=5, fps=8.0)


@pytest.fixture(scope="module")
def sampler(uri):
    return TextToImage(model_folder.load(uri), device="cpu", dtype=torch.float32)


@pytest.fixture(scope="module")
def of_pictures(load):
    return load(ObjectiveConfig(prediction="v"))


def request(**changes) -> SamplingRequest:
    values = dict(
        prompt="a red circle", steps=3, guidance_scale=2.0, seed=1, sampler="ddim", height=16, width=16, frames=5
    )
    return SamplingRequest(**(values | changes))


def test_the_folder_says_frames_and_rate(uri, of_pictures):
    loaded = TextToImage.load(uri, device="cpu")
    assert (loaded.frames, loaded.fps, loaded.size) == (5, 8.0, 16)
    assert (of_pictures.frames, of_pictures.fps) == (0, 0.0)


@pytest.mark.parametrize("name", ["ddim", "euler_ancestral", "dpmpp_2m", "unipc"])
def test_a_clip_belongs_to_its_request_not_to_its_batch(sampler, name):
    (one,) = sampler.sample([request(sampler=name)])
    assert one.pixels_HWC.shape == (5, 16, 16, 3) and one.pixels_HWC.dtype == np.uint8
    beside = sampler.sample([request(sampler=name, seed=9, guidance_scale=1.0), request(sampler=name)])[1]
    assert np.abs(beside.pixels_HWC.astype(int) - one.pixels_HWC).max() <= 1
    assert not np.array_equal(sampler.sample([request(sampler=name, seed=2)])[0].pixels_HWC, one.pixels_HWC)


def test_every_frame_begins_with_noise_of_its_own(sampler):
    frames = sampler.sample([request()])[0].pixels_HWC
    assert all(not np.array_equal(a, b) for a, b in itertools.pairwise(frames))


def test_a_fresh_video_model_draws_what_its_image_model_draws_of_the_same_noise(write_model, uri):
    """Frames are then pictures: the image model with the clip's noise, frame by frame, gives the clip."""
    video = model_folder.load(uri)
    image = model_folder.load(write_model(ObjectiveConfig(prediction="v"), denoiser=IMAGE))
    state = {name: value for name, value in video.denoiser.state_dict().items() if not is_temporal(name)}
    weights.load_into(image.denoiser, state, where="")
    clip = TextToImage(video, device="cpu", dtype=torch.float32).latents([request(guidance_scale=1.0)])[0]
    pictures = TextToImage(image, device="cpu", dtype=torch.float32)
    keys = randomness.keys_from_seeds([1], randomness.Purpose.INITIAL_LATENT)
    noise = randomness.normal(keys, clip.shape)[0]
    drawn = pictures.latents(
        [request(frames=0, guidance_scale=1.0, seed=k) for k in range(5)], start=0, begin_with=noise
    )
    torch.testing.assert_close(drawn, clip)


@pytest.mark.parametrize("frames", [1, 3, 12])
def test_any_number_of_frames_is_drawn_with_a_warning(sampler, frames):
    (drawn,) = sampler.sample([request(frames=frames)])
    assert drawn.pixels_HWC.shape == (frames, 16, 16, 3)
    assert "trained 5" in drawn.warnings[0]
    assert sampler.sample([request()])[0].warnings == ()


def test_frames_are_refused_by_name_where_they_do_not_fit(sampler, of_pictures):
    for model, frames in ((sampler, 0), (of_pictures, 4)):
        for call in (model.check, lambda one, model=model: model.sample([one])):
            with pytest.raises(ConfigError) as caught:
                call(request(frames=frames))
            assert caught.value.where == "frames"
    with pytest.raises(ConfigError) as caught:
        sampler.sample([request(frames=4), request(frames=5)])
    assert caught.value.where == "size"
    for changes, where in (
        ({"frames": -1}, "frames"),
        ({"picture_HWC": np.zeros((16, 16, 3), np.uint8)}, "picture"),
    ):
        with pytest.raises(ConfigError) as caught:
            request(**changes)
        assert caught.value.where == where


def test_a_folder_of_clips_without_frames_is_refused(uri, tmp_path):
    copy = tmp_path / "copy"
    for name in manifest.read(uri).files:
        store.upload(store.local_path(store.join(uri, name)), store.join(str(copy), name))
    described = json.loads((copy / "config.json").read_text())
    del described["frames"]
    (copy / "config.json").write_text(json.dumps(described))
    manifest.publish(copy, tmp_path / "published", kind="model")
    with pytest.raises(ArtifactError, match="how many frames"):
        model_folder.load(str(tmp_path / "published"))
