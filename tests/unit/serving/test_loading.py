"""Batches in the replica: one call per size, faults kept to their own request, requests that TextToImage takes."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from latentray.checkpoint import manifest
from latentray.config.serve import ServeConfig
from latentray.errors import ArtifactError, ConfigError, RequestRefused
from latentray.inference.requests import SamplingRequest
from serving import loading
from serving.messages import Picture


def asked(**fields) -> SamplingRequest:
    base = {"prompt": "x", "steps": 3, "guidance_scale": 1.0, "seed": 0, "sampler": "ddim", "height": 64, "width": 64}
    return SamplingRequest(**base | fields)


def test_a_request_is_field_for_field_what_the_sampler_takes():
    sampling = pytest.importorskip("latentray.inference.sampling")
    ours, theirs = (
        {field.name: field.default for field in dataclasses.fields(kind)}
        for kind in (SamplingRequest, sampling.SamplingRequest)
    )
    assert ours == theirs
    taken = {field.name for field in dataclasses.fields(Picture)} - {"release_id"}
    assert taken <= {field.name for field in dataclasses.fields(sampling.SampledPicture)}


def test_one_call_per_size_and_outcomes_in_order(loaded):
    requests = [asked(seed=j, height=[64, 32, 96][j % 3], sampler=["ddim", "euler"][j % 2]) for j in range(7)]
    outcomes = loaded.draw(requests)
    assert sorted(loaded.model.calls) == [2, 2, 3]
    for request, outcome in zip(requests, outcomes, strict=True):
        assert outcome.pixels_HWC.shape == (request.height, 64, 3)
        assert outcome.pixels_HWC[0, 0, 0] == request.seed


def test_a_failing_request_fails_alone(loaded):
    one, two, three = loaded.draw([asked(seed=1), asked(prompt="fail"), asked(seed=3)])
    assert isinstance(two, RuntimeError)
    assert [one.pixels_HWC[0, 0, 0], three.pixels_HWC[0, 0, 0]] == [1, 3]


def test_a_sampler_the_new_release_lacks_is_refused_for_that_request(loaded):
    refusal, fine = loaded.draw([asked(sampler="flow_euler"), asked(seed=2)])
    assert isinstance(refusal, RequestRefused) and refusal.param == "sampler" and refusal.status == 400
    assert fine.pixels_HWC[0, 0, 0] == 2


def test_warm_up_raises_where_the_release_cannot_draw(loaded):
    loaded.warm_up()
    broken = dataclasses.replace(loaded, info=dataclasses.replace(loaded.info, size=0))
    broken.model.sample = lambda requests: 1 / 0
    with pytest.raises(ZeroDivisionError):
        broken.warm_up()


def test_only_models_and_releases_are_served(tmp_path):
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "a").write_text("a")
    manifest.publish(tmp_path / "source", tmp_path / "data", kind="dataset")
    with pytest.raises(ArtifactError, match="this is a dataset"):
        loading.read_manifest(str(tmp_path / "data"))


@pytest.mark.parametrize("path", ["nothing_of_the_kind:load", "json:nothing", "json", ""])
def test_a_wrong_loader_is_named(path):
    with pytest.raises(ConfigError) as caught:
        loading.loader_of(path)
    assert caught.value.where == "loader"


def test_load_reads_what_the_model_says(tmp_path, loaded):
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "config.json").write_text("{}")
    uri = str(tmp_path / "m")
    manifest.publish(tmp_path / "source", uri, kind="model")
    info = loading.load(ServeConfig(loader="flat_colour:FlatColour.load"), uri, "r-9").info
    assert (info.release_id, info.size, info.samplers, info.steps) == ("r-9", 64, ("ddim", "dpmpp_2m", "euler"), 10)
    assert info.created > 1_700_000_000


def test_a_class_or_a_vision_encoder_that_a_promotion_took_away_is_refused(loaded):
    like = np.zeros((8, 8, 3), np.uint8)
    outcome, varied, other = loaded.draw([asked(label=1), asked(like_HWC=like), asked()])
    assert isinstance(outcome, RequestRefused) and outcome.param == "label"
    assert isinstance(varied, RequestRefused) and varied.param == "like"
    assert isinstance(other, Picture)
