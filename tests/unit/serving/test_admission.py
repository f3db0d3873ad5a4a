"""Admission: defaults filled in, bounds kept for every input, seeds that do not collide."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from latentray.errors import RequestRefused
from serving.admission import Limits, admit, picture_seed, size_of
from serving.schema import MAX_SEED, ImagesRequest


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
