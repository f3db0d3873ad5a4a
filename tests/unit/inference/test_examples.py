"""Requests that nobody asked for: pictures to bring back, and what of them a sheet shows."""

import dataclasses

import numpy as np
import pytest

from latentray.config.beside import BesideConfig
from latentray.config.denoiser import DenoiserConfig
from latentray.config.objective import ObjectiveConfig
from latentray.inference.examples import example, given, repair

V = ObjectiveConfig(prediction="v")
NET = DenoiserConfig(channels=[8, 8], blocks=1, depth=[1, 0], heads=2, context_width=16, groups=4)


@pytest.fixture(scope="module")
def painter(load):
    return load(V, denoiser=dataclasses.replace(NET, in_channels=9), beside=BesideConfig(kind="inpainting"))


@pytest.fixture(scope="module")
def larger(load):
    beside = BesideConfig(kind="super_resolution", factor=4)
    return load(V, denoiser=dataclasses.replace(NET, in_channels=7), beside=beside)


def picture(height: int = 16, width: int = 16) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 200, (height, width, 3), dtype=np.uint8)


def test_an_inpainting_model_is_given_all_but_what_a_mask_of_its_training_covers(painter):
    asked = [repair(painter, "a red circle", picture(), seed=seed) for seed in range(12)]
    assert all(np.array_equal(one.picture_HWC, picture()) and one.mask_HW.any() for one in asked)
    assert len({one.mask_HW.tobytes() for one in asked}) > 6
    assert any(not one.mask_HW.all() for one in asked)
    shown = given(asked[0])["given"]
    assert np.array_equal(shown[~asked[0].mask_HW], picture()[~asked[0].mask_HW])
    assert np.isin(shown[asked[0].mask_HW], (205, 240)).all()
    drawn = painter.sample(asked[:2])
    assert np.array_equal(drawn[1].pixels_HWC[~asked[1].mask_HW], picture()[~asked[1].mask_HW])


def test_a_super_resolution_model_is_given_the_small_picture_and_a_sheet_shows_it_enlarged(larger):
    asked = repair(larger, "a red circle", picture(), seed=1)
    assert asked.small_HWC.shape == (4, 4, 3) and asked.picture_HWC is None and asked.mask_HW is None
    ((name, shown),) = given(asked).items()
    assert name == "given: 4x4" and np.array_equal(shown[::4, ::4], asked.small_HWC) and shown.shape == (16, 16, 3)
    means = picture().reshape(4, 4, 4, 4, 3).mean((1, 3))
    assert np.abs(asked.small_HWC - means).max() < 1


def test_a_sheet_shows_what_a_request_starts_from_and_no_more(larger):
    plain = example(larger, "a red circle", seed=1)
    bare = dataclasses.replace(plain, small_HWC=None)
    assert given(bare) == {}
    assert np.array_equal(given(dataclasses.replace(bare, picture_HWC=picture()))["given"], picture())
    assert given(dataclasses.replace(bare, like_HWC=picture(80, 40)))["like"].shape == (16, 8, 3)
