"""`POST /v1/videos/generations`: clips by the engine that draws pictures, and who refuses whom."""

from __future__ import annotations

import base64
import dataclasses
import io
import json

import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image, ImageSequence

from latentray.errors import RequestRefused
from latentray.inference.requests import SamplingRequest
from latentray.reporting import animations
from serving import api, keys
from serving.loading import Loaded

KEY = "lr-a-client"
ROUTE = "/v1/videos/generations"


@pytest.fixture
def of_clips(loaded) -> Loaded:
    """The stand-in as a model of clips."""
    loaded.model.frames, loaded.model.fps = 6, 8.0
    return dataclasses.replace(loaded, info=dataclasses.replace(loaded.info, frames=6, fps=8.0))


@pytest.fixture
def client(of_clips, backend, config) -> TestClient:
    backend.loaded = of_clips
    app = api.create(config, backend, key_hashes=[keys.hash_of(KEY)])
    return TestClient(app, raise_server_exceptions=False, headers={"Authorization": f"Bearer {KEY}"})


def frames_of(entry: dict) -> list[Image.Image]:
    image = Image.open(io.BytesIO(base64.b64decode(entry["b64_json"])))
    return [frame.copy() for frame in ImageSequence.Iterator(image)]


def refused(reply, param: str) -> dict:
    error = reply.json()["error"]
    assert (reply.status_code, error["param"], error["type"]) == (400, param, "invalid_request_error")
    return error


def test_a_reply_carries_a_clip_and_how_it_was_drawn(client):
    reply = client.post(ROUTE, json={"prompt": "a red circle moving right", "seed": 7}).json()
    assert (reply["frames"], reply["fps"], reply["output_format"], reply["seed"]) == (6, 8.0, "webp", 7)
    assert reply["warnings"] == [] and reply["size"] == "64x64"
    (entry,) = reply["data"]
    frames = frames_of(entry)
    assert len(frames) == 6 and frames[0].size == (64, 64)
    assert {frame.info["duration"] for frame in frames} == {125}
    image = Image.open(io.BytesIO(base64.b64decode(entry["b64_json"])))
    about = json.loads(image.getexif()[0x010E])
    assert (about["prompt"], about["frames"], about["seed"]) == ("a red circle moving right", 6, 7)


def test_a_png_has_the_very_frames_and_each_clip_can_be_drawn_again_alone(client):
    many = client.post(ROUTE, json={"prompt": "x", "n": 2, "seed": 3, "output_format": "png", "frames": 4}).json()
    assert len(many["data"]) == 2 and many["frames"] == 4 and "6 frames" in many["warnings"][0]
    second = many["data"][1]
    again = client.post(ROUTE, json={"prompt": "x", "seed": second["seed"], "output_format": "png", "frames": 4}).json()
    assert again["data"][0]["b64_json"] == second["b64_json"]
    pixels = [np.asarray(frame.convert("RGB"))[0, 0].tolist() for frame in frames_of(second)]
    assert [one[2] for one in pixels] == [0, 20, 40, 60]


def test_an_mp4_plays_at_the_rate_asked_for(client):
    import av

    reply = client.post(ROUTE, json={"prompt": "x", "output_format": "mp4", "fps": 12}).json()
    assert reply["fps"] == 12 and "8 frames per second" in reply["warnings"][0]
    with av.open(io.BytesIO(base64.b64decode(reply["data"][0]["b64_json"]))) as container:
        assert container.streams.video[0].average_rate == 12
        assert sum(1 for _ in container.decode(video=0)) == 6


def test_mp4_is_refused_by_name_where_there_is_no_encoder(client, monkeypatch):
    monkeypatch.setattr(animations, "mp4_encoder", lambda: None)
    assert (
        "webp" in refused(client.post(ROUTE, json={"prompt": "x", "output_format": "mp4"}), "output_format")["message"]
    )


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"frames": 0}, "frames"),
        ({"frames": 13}, "frames"),
        ({"fps": 0}, "fps"),
        ({"fps": "8"}, "fps"),
        ({"output_format": "gif"}, "output_format"),
        ({"output_format": "png", "output_compression": 50}, "output_compression"),
        ({"response_format": "url"}, "response_format"),
        ({"stream": True}, "stream"),
        ({"background": "opaque"}, "background"),
        ({"sampler": "flow_euler"}, "sampler"),
        ({"size": "7x7"}, "size"),
        ({"n": 5}, "n"),
        ({"seconds": 4}, "seconds"),
    ],
)
def test_bad_fields_are_refused_by_name(client, fields, param):
    refused(client.post(ROUTE, json={"prompt": "x", **fields}), param)


def test_a_model_of_clips_refuses_pictures_and_one_of_pictures_clips(client, backend, loaded, of_clips):
    assert ROUTE in refused(client.post("/v1/images/generations", json={"prompt": "x"}), "model")["message"]
    backend.loaded = loaded
    assert "/v1/images/" in refused(client.post(ROUTE, json={"prompt": "x"}), "model")["message"]


def test_models_tell_their_frames(client):
    (entry, *_) = client.get("/v1/models").json()["data"]
    assert (entry["latentray"]["frames"], entry["latentray"]["fps"]) == (6, 8.0)


def test_the_route_wants_a_key(client):
    assert client.post(ROUTE, json={"prompt": "x"}, headers={"Authorization": "Bearer lr-none"}).status_code == 401


def test_clips_of_one_length_are_drawn_in_one_call(of_clips):
    base = dict(prompt="x", steps=2, guidance_scale=1.0, sampler="ddim", height=64, width=64)
    requests = [SamplingRequest(**base, seed=j, frames=frames) for j, frames in enumerate((6, 3, 6, 0))]
    *drawn, picture = of_clips.draw(requests)
    assert sorted(of_clips.model.calls) == [1, 2]
    assert [len(one.pixels_HWC) for one in drawn] == [6, 3, 6]
    assert isinstance(picture, RequestRefused) and picture.param == "model"  # admitted before a promotion
    of_clips.warm_up()
