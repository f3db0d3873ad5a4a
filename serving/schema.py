"""The HTTP models: OpenAI's images API, one of clips like it, and the extra fields of a diffusion model.

Types and fixed bounds are checked here; what depends on the loaded model or on settings is checked in `admission`.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

MAX_SEED = 2**53 - 1
"""Largest seed: the largest integer that every JSON reader keeps exactly."""
MAX_GUIDANCE = 50.0


class DrawRequest(BaseModel):
    """What pictures and clips are asked for by alike. An unknown field is refused by name; null means the default."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    prompt: str | None = Field(
        None,
        min_length=1,
        description="What to draw. Cut where it is longer than the tokenizer takes. May be left out where a `label` or a picture "
        "says what to draw.",
    )
    model: str | None = Field(None, description="Served name, release id or alias; the served model where left out.")
    n: int | None = Field(None, ge=1, description="Number of pictures or clips; 1 where left out.")
    size: str | None = Field(None, description="`<width>x<height>` in pixels, or `auto` for the model's own size.")
    response_format: str | None = Field(None, description="`b64_json`, the only one offered.")
    quality: Literal["auto", "low", "medium", "high", "xhigh", "max", "standard", "hd"] | None = Field(
        None, description="Accepted for compatibility, without effect: `num_inference_steps` sets the quality."
    )
    user: str | None = Field(None, max_length=512, description="Accepted for compatibility, not stored.")
    safety_identifier: str | None = Field(None, max_length=512, description="Accepted for compatibility, not stored.")
    stream: bool | None = Field(None, description="Only false is offered.")

    like: str | None = Field(
        None, description="Models with a vision encoder: a picture to draw variations of, PNG, JPEG or WebP in base64."
    )
    label: int | str | None = Field(
        None,
        description="Models of classes, and servers with a classifier: the class to draw, its number or its name, see "
        "`GET /v1/models`.",
    )
    negative_prompt: str | None = Field(None, description="What to steer away from.")
    num_inference_steps: int | None = Field(
        None, ge=1, description="Sampling steps; the model's default where left out."
    )
    guidance_scale: float | None = Field(
        None,
        ge=0,
        le=MAX_GUIDANCE,
        description="Classifier-free guidance; 1 is none, the model's default where left out.",
    )
    seed: int | None = Field(
        None, ge=0, le=MAX_SEED, description="Equal seeds give equal pictures; drawn where left out."
    )
    classifier_scale: float | None = Field(
        None,
        ge=0,
        le=MAX_GUIDANCE,
        description="Servers with a classifier: how strongly it draws to the `label`; 1 where left out, 0 is not at all.",
    )
    sampler: str | None = Field(None, description="One of the model's samplers, see `GET /v1/models`.")


class ImagesRequest(DrawRequest):
    """`POST /v1/images/generations`."""

    output_format: Literal["png", "jpeg", "webp"] | None = Field(None, description="`png` where left out.")
    output_compression: int | None = Field(None, ge=0, le=100, description="Quality of jpeg and webp, in percent.")
    background: str | None = Field(None, description="`auto` or `opaque`; pictures have no alpha channel.")
    style: Literal["vivid", "natural"] | None = Field(None, description="Accepted for compatibility, without effect.")
    moderation: Literal["auto", "low"] | None = Field(None, description="Accepted for compatibility, without effect.")


class EditsRequest(ImagesRequest):
    """`POST /v1/images/edits`: JSON with pictures in base64, or a form with pictures as files, as OpenAI's clients send it.

    client.images.edit(image=open("photo.png", "rb"), mask=open("mask.png", "rb"), prompt="a red circle")
    client.images.edit(image=open("small.png", "rb"), prompt="a red circle")             # super-resolution models
    client.images.edit(image=open("photo.png", "rb"), prompt="...", extra_body={"strength": 0.4, "label": "tench"})
    """

    image: str = Field(
        description="The picture to change or, for super-resolution models, to make larger: PNG, JPEG or WebP."
    )
    mask: str | None = Field(
        None,
        description="A picture of the same size: painted anew is where it is transparent or, if nothing of it is, where it is "
        "light; the rest stays, pixel for pixel. Where left out, the transparent part of `image` counts as it. Super-resolution "
        "models take none.",
    )
    strength: float | None = Field(
        None,
        gt=0,
        le=1,
        description="How much may change: the share of the steps that is run; 0.7 where left out, 1 with a mask. "
        "Super-resolution models take none.",
    )
    size: str | None = Field(
        None,
        description="`<width>x<height>` in pixels; `auto` is the size of `image` where the model draws it, else the model's own. "
        "To another size than its own, `image` is resized and cut.",
    )
    input_fidelity: Literal["high", "low"] | None = Field(
        None, description="Accepted for compatibility, without effect: `strength` sets it."
    )


class VideosRequest(DrawRequest):
    """`POST /v1/videos/generations`."""

    output_format: Literal["webp", "png", "mp4"] | None = Field(
        None, description="`webp` where left out; webp and png are animated, mp4 wants a server with a video encoder."
    )
    output_compression: int | None = Field(None, ge=0, le=100, description="Quality of webp, in percent.")
    frames: int | None = Field(None, ge=1, description="Frames of each clip; the model's own where left out.")
    fps: float | None = Field(
        None, ge=0.1, le=240, description="Frames per second it is played at; the model's own where left out."
    )


class ActionsRequest(BaseModel):
    """`POST /v1/actions`: what one robot sees. An unknown field is refused by name; null means the default."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    observations: dict[str, list[list[float]]] = Field(
        description="By name, the latest observations, the newest last, in the units of the data the policy learnt from."
    )
    model: str | None = Field(None, description="Served name, release id or alias; the served model where left out.")
    num_inference_steps: int | None = Field(
        None, ge=1, description="Sampling steps; the model's default where left out."
    )
    seed: int | None = Field(
        None, ge=0, le=MAX_SEED, description="Equal seeds give equal actions; drawn where left out."
    )
    sampler: str | None = Field(None, description="One of the model's samplers, see `GET /v1/models`.")


class ActionsReply(BaseModel):
    """The next actions, with the settings that made them."""

    created: int
    model: str
    """Id of the release that made them."""
    actions: list[list[float]]
    """One row for each step from now on, in the units of the data the policy learnt from."""
    executed: int
    """How many of them to execute before asking again."""
    seed: int
    """Seed of the request: given, or drawn by the server."""
    sampler: str
    num_inference_steps: int


class ImageData(BaseModel):
    """One picture or clip of the reply."""

    b64_json: str
    """The encoded file, base64."""
    seed: int
    """Sent as `seed` with n=1 it draws this one again."""


class ImagesReply(BaseModel):
    """The reply of the images API, with the settings that drew the pictures."""

    created: int
    data: list[ImageData]
    model: str
    """Id of the release that drew the pictures."""
    size: str
    output_format: str
    background: Literal["opaque"] = "opaque"
    seed: int
    """Seed of the request: given, or drawn by the server."""
    sampler: str
    num_inference_steps: int
    guidance_scale: float
    warnings: list[str]


class VideosReply(BaseModel):
    """The reply of the videos API, with the settings that drew the clips."""

    created: int
    data: list[ImageData]
    model: str
    """Id of the release that drew the clips."""
    size: str
    frames: int
    fps: float
    output_format: str
    seed: int
    """Seed of the request: given, or drawn by the server."""
    sampler: str
    num_inference_steps: int
    guidance_scale: float
    warnings: list[str]


class Model(BaseModel):
    """One entry of `GET /v1/models`."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "latentray"
    latentray: dict[str, Any]
    """Release, samplers, bounds, conditions and defaults."""


class ModelList(BaseModel):
    """`GET /v1/models`."""

    object: Literal["list"] = "list"
    data: list[Model]


class ErrorDetail(BaseModel):
    """What was wrong, and with which parameter."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(BaseModel):
    """OpenAI's error form."""

    error: ErrorDetail
