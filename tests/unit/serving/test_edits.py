"""`POST /v1/images/edits`: pictures changed, painted anew in part or made larger, and which model refuses what."""

from __future__ import annotations

import base64
import dataclasses
import io
import json

import numpy as np
import openai
import pytest
from PIL import Image

from latentray.config.serve import ServeConfig

URL = "/v1/images/edits"
PIXELS = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
LEFT = np.zeros((48, 64), bool)
LEFT[:, :20] = True


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def light(mask: np.ndarray) -> np.ndarray:
    return np.where(mask, 255, 0).astype(np.uint8)


def cut_out(pixels: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """RGBA, transparent where the mask is true."""
    return np.concatenate([pixels, light(~mask)[..., None]], -1)


@pytest.fixture
def config(config) -> ServeConfig:
    return dataclasses.replace(config, max_body_bytes=1 << 17)


@pytest.fixture
def drawn(backend) -> list:
    """What the model was asked."""
    return backend.loaded.model.asked


@pytest.fixture
def serve(backend):
    """Make the stand-in a model of another kind."""

    def change(**changes) -> None:
        backend.loaded = dataclasses.replace(backend.loaded, info=dataclasses.replace(backend.loaded.info, **changes))

    return change


def ask(client, image: bytes | None = None, mask: bytes | None = None, **fields):
    files = {"image": ("photo.png", png(PIXELS) if image is None else image)}
    if mask is not None:
        files["mask"] = ("mask.png", mask)
    return client.post(URL, data={"prompt": "x"} | fields, files=files)


def refused(reply, param: str | None, status: int = 400) -> str:
    error = reply.json()["error"]
    assert (reply.status_code, error["param"], error["type"]) == (status, param, "invalid_request_error"), reply.text
    return error["message"]


def test_openais_client_changes_a_picture(client, drawn):
    theirs = openai.OpenAI(base_url="http://testserver/v1", api_key="lr-a-client", http_client=client, max_retries=0)
    extra = {"seed": 7, "strength": 0.4, "sampler": "euler", "num_inference_steps": 5, "guidance_scale": 2}
    reply = theirs.images.edit(image=("photo.png", png(PIXELS)), prompt="a red circle", n=2, extra_body=extra)
    assert (len(reply.data), reply.size, reply.seed, reply.warnings) == (2, "64x48", 7, [
        "The model was trained at 64x64; other sizes may repeat or distort objects."
    ])  # fmt: skip
    first, second = drawn
    assert np.array_equal(first.picture_HWC, PIXELS) and second.picture_HWC is first.picture_HWC
    assert (first.strength, first.mask_HW, first.sampler, first.steps, first.seed) == (0.4, None, "euler", 5, 7)
    image = Image.open(io.BytesIO(base64.b64decode(reply.data[0].b64_json)))
    about = json.loads(image.text["parameters"])
    assert (about["strength"], about["masked"], about["prompt"]) == (0.4, False, "a red circle")
    theirs.images.edit(image=[png(PIXELS)], mask=png(light(LEFT)), prompt="x", size="auto", output_format="webp")
    assert np.array_equal(drawn[2].mask_HW, LEFT)


def test_json_and_a_form_ask_for_the_same(client):
    fields = {"prompt": "x", "n": 2, "seed": 3, "strength": 0.25}
    as_form = ask(client, **fields).json()
    as_json = client.post(URL, json=fields | {"image": base64.b64encode(png(PIXELS)).decode()}).json()
    assert as_form["data"] == as_json["data"] and len(as_form["data"]) == 2


@pytest.mark.parametrize(
    ("image", "mask"),
    [
        (PIXELS, light(LEFT)),
        (PIXELS, cut_out(PIXELS, LEFT)),
        (cut_out(PIXELS, LEFT), None),
        (cut_out(PIXELS, ~LEFT), light(LEFT)),
    ],
    ids=["light", "transparent", "of the picture itself", "given, not of the picture itself"],
)
def test_what_the_mask_says_is_painted(client, drawn, image, mask):
    assert ask(client, png(image), None if mask is None else png(mask)).status_code == 200
    (asked,) = drawn
    assert np.array_equal(asked.mask_HW, LEFT) and asked.mask_HW.dtype == bool and asked.strength == 1.0
    seen = ~LEFT if image.shape[-1] == 3 or mask is None else LEFT
    assert np.array_equal(asked.picture_HWC[seen], PIXELS[seen])


def test_defaults_are_those_of_the_shell(client, drawn):
    reply = client.post(URL, files={"image": png(PIXELS)}).json()
    (asked,) = drawn
    assert (asked.prompt, asked.strength, asked.steps, asked.sampler) == ("", 0.7, 10, "ddim")
    assert reply["num_inference_steps"] == 10


@pytest.mark.parametrize(
    ("shape", "size", "drawn_at"),
    [
        ((50, 70), None, (64, 64)),
        ((300, 200), "auto", (64, 64)),
        ((48, 64), "96x32", (96, 32)),
        ((48, 64), "64x48", None),
    ],
)
def test_a_picture_of_another_size_is_resized_and_cut_with_a_warning(client, drawn, shape, size, drawn_at):
    reply = ask(
        client,
        png(np.zeros((*shape, 3), np.uint8)),
        png(np.full(shape, 255, np.uint8)),
        **({"size": size} if size else {}),
    ).json()
    width, height = drawn_at or shape[::-1]
    (asked,) = drawn
    assert reply["size"] == f"{width}x{height}"
    assert asked.picture_HWC.shape == (height, width, 3) and asked.mask_HW.shape == (height, width)
    assert asked.mask_HW.all()
    told = f"The image was resized and cut to {width}x{height}."
    assert (told in reply["warnings"]) == (drawn_at is not None)


@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        ({"image": b"no picture"}, "image", "PNG, JPEG or WebP"),
        ({"mask": b"no picture"}, "mask", "PNG, JPEG or WebP"),
        ({"mask": png(light(LEFT[:10]))}, "mask", "64x10, and the image 64x48"),
        ({"mask": png(np.zeros((48, 64), np.uint8))}, "mask", "nothing to paint"),
        ({"strength": 0}, "strength", "greater than 0"),
        ({"strength": 1.5}, "strength", "less than or equal to 1"),
        ({"strength": "much"}, "strength", "number"),
        ({"label": 1}, "label", "a model of pictures"),
        ({"like": base64.b64encode(png(PIXELS)).decode()}, "like", "a model of pictures"),
        ({"n": 5}, "n", "between 1 and 4"),
        ({"size": "65x64"}, "size", "multiples of 8"),
        ({"stream": "true"}, "stream", "not offered"),
        ({"prompt": ""}, "prompt", "at least 1"),
        ({"small": 1}, "small", "Unknown parameter"),
    ],
)
def test_bad_fields_are_refused_by_name(client, drawn, fields, param, said):
    assert said in refused(ask(client, **fields), param)
    assert drawn == [], "nothing may be drawn"


def test_a_picture_is_wanted(client):
    assert "Missing" in refused(client.post(URL, json={"prompt": "x"}), "image")
    assert "multipart/form-data" in refused(client.post(URL, content=b"abc"), None)


def test_the_route_wants_a_key_and_bounds_the_body(client):
    large = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    refused(ask(client, png(large)), None, 413)
    del client.headers["Authorization"]
    assert ask(client).status_code == 401


def test_a_super_resolution_model_makes_the_picture_larger(client, drawn, serve):
    serve(makes_larger=4)
    small = PIXELS[:16, :12]
    reply = ask(client, png(small), n=2, seed=3).json()
    assert reply["size"] == "48x64"
    assert [(one.height, one.width, one.picture_HWC) for one in drawn] == [(64, 48, None)] * 2
    assert all(np.array_equal(one.small_HWC, small) for one in drawn)
    assert ask(client, png(small), size="48x64").status_code == 200


@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        ({"mask": png(light(LEFT))}, "mask", "super-resolution model, which makes pictures 4 times larger"),
        ({"strength": 0.5}, "strength", "super-resolution model"),
        ({"label": "ape"}, "label", "super-resolution model"),
        ({"size": "96x64"}, "size", "48x64"),
        (
            {"image": png(PIXELS[:4, :4])},
            "image",
            "would make 16x16, and there width and height must be multiples of 8",
        ),
        ({"image": png(PIXELS)}, "image", "would make 256x192"),
        ({"image": png(PIXELS[:17, :16])}, "image", "would make 64x68"),
    ],
)
def test_a_super_resolution_model_takes_nothing_else(client, drawn, serve, fields, param, said):
    serve(makes_larger=4)
    assert said in refused(ask(client, **{"image": png(PIXELS[:16, :12])} | fields), param)
    assert drawn == []


def test_each_kind_of_model_names_its_route(client, serve):
    serve(makes_larger=4)
    assert URL in refused(client.post("/v1/images/generations", json={"prompt": "x"}), "model")
    serve(makes_larger=0, frames=6, fps=8.0)
    assert "/v1/videos/generations" in refused(ask(client), "model")


@pytest.mark.parametrize(
    ("changes", "conditions", "said"),
    [
        ({}, ["image", "mask"], {}),
        ({"takes_like": True}, ["like", "image", "mask"], {"like": True}),
        ({"classes": 3}, ["label", "image", "mask"], {"classes": 3}),
        ({"takes_mask": True}, ["image", "mask"], {"inpainting": True}),
        ({"makes_larger": 4}, ["image"], {"super_resolution": 4}),
        ({"frames": 6, "fps": 8.0}, [], {"frames": 6}),
    ],
)
def test_models_tell_which_conditions_they_take(client, serve, changes, conditions, said):
    serve(**changes)
    (entry, *_) = client.get("/v1/models").json()["data"]
    assert entry["latentray"]["conditions"] == conditions
    assert said.items() <= entry["latentray"].items()
    others = {"like", "classes", "inpainting", "super_resolution", "frames"} - said.keys()
    assert not others & entry["latentray"].keys()


@pytest.mark.parametrize(
    ("changes", "label", "said"),
    [
        ({}, 0, "does not draw classes: it is a model of pictures"),
        ({"takes_mask": True}, 0, "it is an inpainting model"),
        ({"classes": 3}, 3, "0 to 2"),
    ],
)
def test_a_class_is_refused_by_a_model_that_says_what_it_is(client, serve, changes, label, said):
    serve(**changes)
    for reply in (
        ask(client, label=label),
        client.post("/v1/images/generations", json={"prompt": "x", "label": label}),
    ):
        assert said in refused(reply, "label")


def test_a_class_or_a_picture_may_stand_for_the_prompt(client, drawn, serve):
    serve(classes=3, class_names=("ape", "tench", "zebra"), takes_like=True)
    like = base64.b64encode(png(PIXELS)).decode()
    for fields in ({"label": "tench"}, {"label": 1}, {"like": like}):
        assert client.post("/v1/images/generations", json=fields).status_code == 200
    refused(client.post("/v1/images/generations", json={}), "prompt")
    assert ask(client, label="tench").status_code == 200
    assert client.post(URL, data={"label": "1"}, files={"image": png(PIXELS), "like": png(PIXELS)}).status_code == 200
    assert [one.label for one in drawn] == [1, 1, None, 1, 1]
    assert np.array_equal(drawn[2].like_HWC, PIXELS) and np.array_equal(drawn[4].like_HWC, PIXELS)


def test_the_api_describes_both_bodies(client):
    (described,) = client.get("/openapi.json").json()["paths"][URL].values()
    bodies = {kind: body["schema"] for kind, body in described["requestBody"]["content"].items()}
    assert set(bodies) == {"multipart/form-data", "application/json"}
    assert bodies["multipart/form-data"]["properties"]["image"]["format"] == "binary"
    for schema in bodies.values():
        assert schema["required"] == ["image"]
        assert {"label", "like", "mask", "strength", "size", "negative_prompt"} <= schema["properties"].keys()
        assert all(field.get("description") for field in schema["properties"].values())
