"""The HTTP surface: OpenAI's forms, keys before anything else, parameters carried in the picture."""

from __future__ import annotations

import base64
import io
import json

import numpy as np
import pytest
from PIL import Image

from latentray.errors import RequestRefused

URL = "/v1/images/generations"


def picture(entry: dict) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(entry["b64_json"])))


def refused(reply, status: int, param: str | None) -> dict:
    """The error of a reply that must have OpenAI's form."""
    assert reply.status_code == status, reply.text
    assert list(reply.json()) == ["error"]
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param
    return error


def test_a_reply_carries_pictures_and_how_they_were_drawn(client):
    reply = client.post(URL, json={"prompt": "a red circle", "n": 2, "seed": 7, "model": None}).json()
    assert [len(reply["data"]), reply["seed"], reply["size"], reply["warnings"]] == [2, 7, "64x64", []]
    assert [reply["sampler"], reply["num_inference_steps"], reply["model"]] == ["ddim", 10, "r-1"]
    first = picture(reply["data"][0])
    assert np.asarray(first)[0, 0].tolist() == [7, 0, 0]
    parameters = json.loads(first.text["parameters"])
    assert parameters["prompt"] == "a red circle" and parameters["seed"] == 7 and parameters["model"] == "r-1"


def test_same_seed_same_bytes_and_each_picture_can_be_drawn_again_alone(client):
    four = client.post(URL, json={"prompt": "x", "n": 4, "seed": 3}).json()["data"]
    assert four == client.post(URL, json={"prompt": "x", "n": 4, "seed": 3}).json()["data"]
    assert len({entry["b64_json"] for entry in four}) == 4
    alone = client.post(URL, json={"prompt": "x", "seed": four[2]["seed"]}).json()["data"]
    assert alone == [four[2]]


def test_without_a_seed_the_reply_tells_the_one_used(client):
    one, two = (client.post(URL, json={"prompt": "x"}).json() for _ in range(2))
    assert one["seed"] != two["seed"]
    assert client.post(URL, json={"prompt": "x", "seed": one["seed"]}).json()["data"] == one["data"]


def test_a_long_prompt_is_cut_with_a_warning(client):
    (warning,) = client.post(URL, json={"prompt": "word " * 20}).json()["warnings"]
    assert "longer than the tokenizer takes" in warning


@pytest.mark.parametrize(("output_format", "quality"), [("jpeg", 50), ("webp", 80), ("jpeg", None)])
def test_other_formats_carry_their_parameters_too(client, output_format, quality):
    body = {"prompt": "x", "seed": 5, "output_format": output_format, "output_compression": quality}
    image = picture(client.post(URL, json=body).json()["data"][0])
    assert image.format == output_format.upper() and image.size == (64, 64)
    assert json.loads(image.getexif()[0x010E])["seed"] == 5


@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"n": 5}, "n", "between 1 and 4"),
        ({"n": "2"}, "n", "integer"),
        ({"n": True}, "n", "integer"),
        ({"num_inference_steps": 0}, "num_inference_steps", "1"),
        ({"num_inference_steps": 41}, "num_inference_steps", "between 1 and 40"),
        ({"guidance_scale": -1}, "guidance_scale", "0"),
        ({"guidance_scale": 51}, "guidance_scale", "50"),
        ({"seed": -1}, "seed", "0"),
        ({"seed": 2**53}, "seed", str(2**53 - 1)),
        ({"size": "65x64"}, "size", "multiples of 8 between 32 and 128"),
        ({"size": "136x64"}, "size", "multiples of 8"),
        ({"size": "big"}, "size", "64x64"),
        ({"sampler": "dpm"}, "sampler", "ddim, dpmpp_2m, euler"),
        ({"response_format": "url"}, "response_format", "b64_json"),
        ({"output_format": "gif"}, "output_format", "png"),
        ({"output_compression": 50}, "output_compression", "jpeg"),
        ({"background": "transparent"}, "background", "opaque"),
        ({"stream": True}, "stream", "not offered"),
        ({"prompt": ""}, "prompt", "at least 1"),
        ({"prompt": "x" * 201}, "prompt", "at most 200"),
        ({"prompt": 3}, "prompt", "string"),
        ({"negative_prompt": "x" * 201}, "negative_prompt", "at most 200"),
        ({"steps": 5}, "steps", "Unknown parameter"),
    ],
)
def test_bad_fields_are_refused_by_name(client, backend, fields, param, said):
    error = refused(client.post(URL, json={"prompt": "x"} | fields), 400, param)
    assert said in error["message"] and error["type"] == "invalid_request_error"
    assert backend.loaded.model.calls == [], "nothing may be drawn"


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        (b"{", None, "invalid_json"),
        (b"[]", None, "invalid_body"),
        (b"{}", "prompt", "missing_required_parameter"),
        (b'{"prompt": "x", "guidance_scale": NaN}', "guidance_scale", None),
        (b'{"prompt": "\\ud800"}', "prompt", None),
        (b'{"prompt": "x", "seed": ' + b"9" * 3000 + b"}", "seed", None),
    ],
)
def test_bad_bodies_are_refused_in_openais_form(client, body, param, code):
    error = refused(client.post(URL, content=body, headers={"Content-Type": "application/json"}), 400, param)
    assert code is None or error["code"] == code
    assert len(error["message"]) < 300


def test_a_body_that_is_too_large_is_refused(client):
    refused(client.post(URL, json={"prompt": "x" * 5000}), 413, None)
    pieces = (b'{"prompt": "', *[b"x" * 500] * 10, b'"}')  # sent in chunks, its length is not announced
    refused(client.post(URL, content=iter(pieces), headers={"Content-Type": "application/json"}), 413, None)


@pytest.mark.parametrize("name", ["latentray", "r-1", "production", None])
def test_served_names_are_understood(client, name):
    assert client.post(URL, json={"prompt": "x", "model": name}).status_code == 200


def test_an_unknown_model_is_404(client):
    error = refused(client.post(URL, json={"prompt": "x", "model": "dall-e-3"}), 404, "model")
    assert error["code"] == "model_not_found" and "r-1" in error["message"]
    assert refused(client.get("/v1/models/dall-e-3"), 404, "model")["code"] == "model_not_found"


def test_models_are_listed_with_their_bounds(client):
    entries = client.get("/v1/models").json()["data"]
    assert [e["id"] for e in entries] == ["latentray", "r-1", "production"]
    assert entries[0]["latentray"]["samplers"] == ["ddim", "dpmpp_2m", "euler"]
    assert client.get("/v1/models/r-1").json() == entries[1]


@pytest.mark.parametrize("path", ["/v1/models", "/docs", "/redoc", "/openapi.json", "/", "/healthz/x", "/nothing"])
def test_nothing_but_health_is_open(anyone, path):
    assert refused(anyone.get(path), 401, None)["code"] == "invalid_api_key"


def test_health_is_open_and_readiness_follows_the_model(anyone, backend):
    assert anyone.get("/healthz").status_code == 200
    assert anyone.get("/readyz").status_code == 200
    backend.is_ready = False
    assert anyone.get("/readyz").status_code == 503
    assert anyone.get("/healthz").status_code == 200


@pytest.mark.parametrize(
    "header", ["Bearer", "Bearer ", "Bearer lr-wrong", "Basic lr-a-client", "lr-a-client", "Bearer é"]
)
def test_wrong_keys_are_refused_before_the_body_is_read(anyone, header):
    reply = anyone.post(URL, content=b"{", headers={"Authorization": header.encode()})
    refused(reply, 401, None)
    assert reply.headers["www-authenticate"] == "Bearer"


def test_unknown_routes_and_methods_have_openais_form(client):
    refused(client.get("/v1/nothing"), 404, None)
    refused(client.get(URL), 405, None)
    assert client.get("/docs").status_code == 404
    assert URL in client.get("/openapi.json").json()["paths"]


@pytest.mark.parametrize(
    ("failure", "status", "kind"),
    [
        (RequestRefused("full", code="queue_full", status=429), 429, "rate_limit_error"),
        (RequestRefused("late", code="timeout", status=504), 504, "server_error"),
        (RuntimeError("secret path /root"), 500, "server_error"),
    ],
)
def test_failures_behind_the_ingress(client, backend, failure, status, kind):
    backend.failure = failure
    reply = client.post(URL, json={"prompt": "x"})
    error = refused(reply, status, None)
    assert error["type"] == kind and "secret" not in error["message"]
    assert ("retry-after" in reply.headers) == (status == 429)
