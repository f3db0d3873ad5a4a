"""Admission: defaults filled in, bounds kept for every input, seeds that do not collide."""

from __future__ import annotations

import base64
import dataclasses
import io

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from latentray.errors import RequestRefused
from serving.admission import Limits, admit, picture_seed
from serving.schema import MAX_SEED, ImagesRequest
from serving.sizes import size_of


def limits(config) -> Limits:
    return Limits.of(config)


def test_defaults_come_from_the_model(info, config):
    admitted = admit(ImagesRequest(prompt="x"), info, limits(config), fresh_seed=11)
    (one,) = admitted.pictures
    assert (one.sampler, one.steps, one.guidance_scale, one.height, one.width) == ("ddim", 10, 3.0, 64, 64)
    assert one.seed == admitted.seed == 11 and admitted.warnings == []


def test_zero_is_a_value_and_no_default(info, config):
    admitted = admit(ImagesRequest(prompt="x", seed=0, guidance_scale=0.0), info, limits(config), fresh_seed=11)
    assert admitted.pictures[0].seed == 0 and admitted.pictures[0].guidance_scale == 0.0


def test_another_size_warns_and_is_width_by_height(info, config):
    admitted = admit(ImagesRequest(prompt="x", size="96x32"), info, limits(config), fresh_seed=0)
    assert (admitted.pictures[0].width, admitted.pictures[0].height) == (96, 32)
    assert "64x64" in admitted.warnings[0]


def test_an_alias_is_no_name_where_the_release_is_given_itself(info, config):
    config.registry = None
    with pytest.raises(RequestRefused) as caught:
        admit(ImagesRequest(prompt="x", model="production"), info, limits(config), fresh_seed=0)
    assert caught.value.status == 404


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(size=st.one_of(st.text(max_size=12), st.from_regex(r"[0-9]{1,6}x[0-9]{1,6}", fullmatch=True)))
def test_any_size_is_refused_or_within_bounds(info, size):
    try:
        width, height = size_of(size, info)
    except RequestRefused as refusal:
        assert refusal.param == "size"
    else:
        assert all(32 <= side <= 128 and side % 8 == 0 for side in (width, height))


@settings(max_examples=60)
@given(seed=st.integers(0, MAX_SEED))
def test_picture_seeds_differ_and_stay_in_range(seed):
    seeds = [picture_seed(seed, j) for j in range(8)]
    assert seeds[0] == seed
    assert len(set(seeds)) == 8 and all(0 <= s <= MAX_SEED for s in seeds)
    assert not set(seeds[1:]) & {picture_seed((seed + 1) & MAX_SEED, j) for j in range(1, 8)}


def test_a_class_is_asked_for_by_number_or_name(info, config):
    of_classes = dataclasses.replace(info, classes=3, class_names=("ape", "tench", "zebra"))
    for wanted, number in ((2, 2), ("1", 1), ("tench", 1)):
        admitted = admit(ImagesRequest(prompt="x", label=wanted), of_classes, limits(config), fresh_seed=0)
        assert [one.label for one in admitted.pictures] == [number]
    assert of_classes.public()["classes"] == 3 and of_classes.public()["class_names"] == ["ape", "tench", "zebra"]
    assert "classes" not in info.public()


@pytest.mark.parametrize(
    ("wanted", "told"), [(3, "0 to 2"), (-1, "0 to 2"), ("trench", "Did you mean tench"), ("", "0 to 2")]
)
def test_a_class_that_the_model_does_not_know_is_refused(info, config, wanted, told):
    of_classes = dataclasses.replace(info, classes=3, class_names=("ape", "tench", "zebra"))
    with pytest.raises(RequestRefused, match=told) as caught:
        admit(ImagesRequest(prompt="x", label=wanted), of_classes, limits(config), fresh_seed=0)
    assert caught.value.param == "label" and caught.value.status == 400
    with pytest.raises(RequestRefused, match="does not draw classes"):
        admit(ImagesRequest(prompt="x", label=0), info, limits(config), fresh_seed=0)


def test_a_classifier_draws_to_the_class_that_is_named_as_strongly_as_is_asked(info, config):
    guided = dataclasses.replace(info, classes=3, has_classifier=True)
    for fields, scale in (
        ({"label": 1}, 1.0),
        ({"label": 1, "classifier_scale": 4.0}, 4.0),
        ({"label": 1, "classifier_scale": 0.0}, 0.0),
        ({}, 0.0),
        ({"classifier_scale": 0.0}, 0.0),
    ):
        admitted = admit(ImagesRequest(prompt="x", n=2, **fields), guided, limits(config), fresh_seed=0)
        assert [one.classifier_scale for one in admitted.pictures] == [scale, scale]
    assert guided.public()["classifier"] is True and "classifier" not in info.public()
    of_classes = dataclasses.replace(info, classes=3)
    assert admit(ImagesRequest(label=1), of_classes, limits(config), fresh_seed=0).pictures[0].classifier_scale == 0
    for model, fields, told in (
        (guided, {"classifier_scale": 2.0}, "give its label"),
        (of_classes, {"label": 1, "classifier_scale": 2.0}, "no classifier"),
    ):
        with pytest.raises(RequestRefused, match=told) as caught:
            admit(ImagesRequest(prompt="x", **fields), model, limits(config), fresh_seed=0)
        assert caught.value.param == "classifier_scale" and caught.value.status == 400


def sent(pixels: np.ndarray, kind: str = "PNG") -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return base64.b64encode(buffer.getvalue()).decode()


def test_a_picture_to_draw_variations_of_arrives_whole(info, config):
    pixels = np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8)
    takes = dataclasses.replace(info, takes_like=True)
    for like in (sent(pixels), f"data:image/png;base64,{sent(pixels)}"):
        admitted = admit(ImagesRequest(prompt="x", like=like, n=2), takes, limits(config), fresh_seed=0)
        assert all(np.array_equal(one.like_HWC, pixels) for one in admitted.pictures)
    assert takes.public()["like"] is True and "like" not in info.public()


@pytest.mark.parametrize(
    ("like", "told"),
    [
        ("no base64!", "base64"), (base64.b64encode(b"GIF89a").decode(), "PNG, JPEG or WebP"),
        (sent(np.zeros((4, 4, 3), np.uint8))[:40], "PNG, JPEG or WebP"), (sent(np.zeros((4, 4, 3), np.uint8), "BMP"), "PNG"),
        (sent(np.zeros((1500, 3000, 3), np.uint8)), "more than 4194304"),
    ],
)  # fmt: skip
def test_what_is_no_picture_is_refused_by_its_field(info, config, like, told):
    takes = dataclasses.replace(info, takes_like=True)
    with pytest.raises(RequestRefused, match=told) as caught:
        admit(ImagesRequest(prompt="x", like=like), takes, limits(config), fresh_seed=0)
    assert caught.value.param == "like" and caught.value.status == 400
    with pytest.raises(RequestRefused, match="no variations of pictures"):
        admit(ImagesRequest(prompt="x", like=like), info, limits(config), fresh_seed=0)
