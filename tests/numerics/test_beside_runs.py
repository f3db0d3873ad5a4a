"""Inpainting and super-resolution through the whole: trained on pictures, exported, drawn from, evaluated."""

from __future__ import annotations

import dataclasses
import json
import sys

import numpy as np
import pytest
from PIL import Image

from latentray.config import compose
from latentray.config.evaluate import Evaluate
from latentray.config.train import Train
from latentray.data.shards import IndexedShards
from latentray.errors import ConfigError
from latentray.evaluation import autoencoders, suite
from latentray.inference.examples import example
from latentray.inference.sampling import TextToImage
from latentray.reporting import pictures
from latentray.training import inputs as checks


def picture(size: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)


def test_an_inpainting_model_keeps_what_the_mask_leaves(runs):
    model = TextToImage.load(str(runs["inpainting"].out / "model"), device="cpu")
    assert model.takes_mask and model.model.beside.kind == "inpainting"
    given, mask = picture(model.size), np.zeros((model.size, model.size), bool)
    mask[:20, 10:40] = True
    request = dataclasses.replace(example(model, "a circle", seed=1), picture_HWC=given, mask_HW=mask)
    (drawn,) = model.sample([request])
    assert np.array_equal(drawn.pixels_HWC[~mask], given[~mask])
    assert not np.array_equal(drawn.pixels_HWC[mask], given[mask])


def test_a_super_resolution_model_draws_from_the_small_picture(runs):
    model = TextToImage.load(str(runs["larger"].out / "model"), device="cpu")
    one, other = picture(model.size), 255 - picture(model.size)
    requests = [example(model, "a circle", seed=1, original_HWC=given) for given in (one, other)]
    assert requests[0].small_HWC.shape == (model.size // 8, model.size // 8, 3)
    drawn = model.sample(requests)
    assert drawn[0].pixels_HWC.shape == (model.size, model.size, 3)
    assert not np.array_equal(drawn[0].pixels_HWC, drawn[1].pixels_HWC)
    for small, where in ((None, "small"), (one[:3, :3], "small")):
        with pytest.raises(ConfigError) as caught:
            model.check(dataclasses.replace(requests[0], small_HWC=small))
        assert caught.value.where == where


@pytest.mark.parametrize("name", ["inpainting", "larger"])
def test_the_sheet_of_samples_shows_what_each_was_given_and_the_original(runs, inputs, name):
    sheet = np.asarray(Image.open(next(runs[name].out.rglob("*samples*.png"))).convert("RGB"))
    first = autoencoders.load_pictures(IndexedShards.open(f"{inputs['data']}/train"), 64, limit=12)[0]
    original = pictures.enlarged(first, 2)
    places = [
        tuple(place)
        for place in np.argwhere((sheet[64:-63, 64:-63] == original[64, 64]).all(-1))
        if np.array_equal(sheet[place[0] :, place[1] :][:128, :128], original)
    ]
    assert len(places) == 1 and 2 * 128 < places[0][0] < 3 * 128  # below what was given and what was drawn


@pytest.mark.parametrize("name", ["inpainting", "larger"])
def test_both_are_evaluated(runs, inputs, tmp_path, name):
    out = tmp_path / "report"
    config = compose.load("evaluate", Evaluate, [
        f"model={runs[name].out / 'model'}", f"data={inputs['data']}", f"out={out}", "steps=2", "samples=8",
        "heldout_samples=4", "per_kind=1", "per_unseen_kind=1", "device=cpu",
    ])  # fmt: skip
    suite.evaluate(config)
    figures = json.loads((out / "report.json").read_text())["metrics"]
    assert np.isfinite(list(figures.values())).all()
    assert ("super_resolution.psnr" in figures) == (name == "larger")


def test_what_does_not_fit_is_refused_before_a_worker_starts(inputs):
    settings = sys.modules["tiny"].beside(inputs)

    def refused(*overrides: str) -> ConfigError:
        with pytest.raises(ConfigError) as caught:
            checks.check(compose.load("train", Train, list(overrides)), 1)
        return caught.value

    narrow = refused(*settings["inpainting"], "denoiser.in_channels=4")
    assert (narrow.where, narrow.mend) == ("denoiser.in_channels", "Set denoiser.in_channels=9.")
    assert refused(*settings["larger"], "beside.kind=none").where == "denoiser.in_channels"
    stored = [one for one in settings["larger"] if not one.startswith(("data=", "online.", "autoencoder_from"))]
    assert refused(*stored, f"latents={inputs['latents']}").where == "beside.kind"
