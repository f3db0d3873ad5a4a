"""May this request be drawn, and as what? Pure checks against the model's bounds; each refusal names a field."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any

import numpy as np
from PIL import Image

from latentray.config.serve import ServeConfig
from latentray.errors import ConfigError, RequestRefused
from latentray.inference.requests import ActionRequest, SamplingRequest, label_of
from latentray.reporting import animations
from serving.messages import ModelInfo
from serving.pictures import opaque, read
from serving.refusals import shown
from serving.schema import MAX_SEED, ActionsRequest, DrawRequest, ImagesRequest, VideosRequest
from serving.sizes import LARGEST, size_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """Bounds the operator sets; the model's own come with its ModelInfo."""

    max_n: int
    max_steps: int
    max_prompt_chars: int
    model_name: str
    alias: str | None

    @classmethod
    def of(cls, config: ServeConfig) -> Limits:
        return cls(
            max_n=config.max_n,
            max_steps=config.max_steps,
            max_prompt_chars=config.max_prompt_chars,
            model_name=config.model_name,
            alias=config.alias if config.registry else None,
        )

    def names(self, info: ModelInfo) -> list[str]:
        """The model names a client may give, the served name first."""
        return list(dict.fromkeys(filter(None, [self.model_name, info.release_id, self.alias])))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Admitted:
    """A request that can be drawn."""

    pictures: list[SamplingRequest]
    seed: int
    warnings: list[str]


def admit(request: ImagesRequest, info: ModelInfo, limits: Limits, *, fresh_seed: int) -> Admitted:
    """The pictures a request asks for, with every default filled in; `fresh_seed` is used where it gives no seed.

    Raises RequestRefused naming the parameter.
    """
    of_pictures(request, info, limits)
    if info.makes_larger:
        raise RequestRefused(
            "The model makes pictures larger: POST /v1/images/edits with the small one as image.",
            param="model",
            code="wrong_model",
        )
    _prompted(request)
    return filled_in(request, info, limits, size=size_of(request.size, info), fresh_seed=fresh_seed)


def of_pictures(request: ImagesRequest, info: ModelInfo, limits: Limits) -> None:
    """Raise RequestRefused for what no model of pictures can be asked here, and for a model of another kind."""
    model_known(request.model, info, limits)
    _draws(info)
    if info.frames:
        raise RequestRefused("The model draws clips: POST /v1/videos/generations.", param="model", code="wrong_model")
    _offered(request)
    if request.background not in (None, "auto", "opaque"):
        raise RequestRefused(
            f"Invalid background {shown(request.background)}: only 'auto' and 'opaque' are offered.",
            param="background",
        )
    if request.output_compression not in (None, 100) and request.output_format in (None, "png"):
        raise RequestRefused(
            "output_compression applies to output_format 'jpeg' and 'webp' only; png is lossless.",
            param="output_compression",
        )


def admit_actions(request: ActionsRequest, info: ModelInfo, limits: Limits, *, fresh_seed: int) -> ActionRequest:
    """What a policy is asked, with every default filled in, as `admit`; shapes are checked here, by name."""
    model_known(request.model, info, limits)
    policy = info.policy
    if policy is None:
        route = "videos" if info.frames else "images"
        raise RequestRefused(
            f"The model draws {route}: POST /v1/{route}/generations.", param="model", code="wrong_model"
        )
    known = ", ".join(policy.observations)
    for name in request.observations.keys() ^ policy.observations.keys():
        what = "is missing" if name in policy.observations else "is unknown"
        raise RequestRefused(f"The observation {shown(name)} {what}: give {known}.", param=f"observations.{name[:80]}")
    for name, width in policy.observations.items():
        rows = request.observations[name]
        if len(rows) != policy.observation_steps or any(len(row) != width for row in rows):
            raise RequestRefused(
                f"Invalid {name}: give the latest {policy.observation_steps} observations of {width} numbers, the newest "
                "last.",
                param=f"observations.{name}",
            )
    steps = request.num_inference_steps or info.steps
    _within("num_inference_steps", steps, min(limits.max_steps, info.max_steps))
    return ActionRequest(
        observations={name: np.array(rows, np.float32) for name, rows in request.observations.items()},
        seed=fresh_seed if request.seed is None else request.seed,
        sampler=_sampler(request.sampler, info),
        steps=steps,
    )


def admit_clips(request: VideosRequest, info: ModelInfo, limits: Limits, *, fresh_seed: int) -> Admitted:
    """The clips a request asks for, as `admit`."""
    model_known(request.model, info, limits)
    _draws(info)
    if not info.frames:
        raise RequestRefused(
            "The model draws pictures: POST /v1/images/generations.", param="model", code="wrong_model"
        )
    _offered(request)
    _prompted(request)
    frames = request.frames or info.frames
    _within("frames", frames, int(LARGEST * info.frames))
    if request.output_compression is not None and request.output_format not in (None, "webp"):
        raise RequestRefused("output_compression applies to output_format 'webp' only.", param="output_compression")
    if request.output_format == "mp4" and animations.mp4_encoder() is None:
        raise RequestRefused(
            "This server has no encoder for mp4: ask for webp or png.", param="output_format", code="unsupported_value"
        )
    size = size_of(request.size, info)
    admitted = filled_in(request, info, limits, size=size, fresh_seed=fresh_seed, frames=frames)
    warnings = list(admitted.warnings)
    if frames != info.frames:
        warnings.append(
            f"The model was trained on {info.frames} frames; another number may repeat or cut off a motion."
        )
    if request.fps is not None and request.fps != info.fps:
        warnings.append(
            f"The model was trained at {info.fps:g} frames per second; at another rate motion is faster or slower."
        )
    return dataclasses.replace(admitted, warnings=warnings)


def filled_in(
    request: DrawRequest, info: ModelInfo, limits: Limits, *, size: tuple[int, int], fresh_seed: int, **given: Any
) -> Admitted:
    """The pictures or clips of a request whose route fits the model, every default filled in.

    Args:
        size: width and height.
        given: further fields of `SamplingRequest`.
    """
    n = request.n or 1
    _within("n", n, limits.max_n)
    for name in ("prompt", "negative_prompt"):
        _short(name, getattr(request, name) or "", limits.max_prompt_chars)
    steps = request.num_inference_steps or info.steps
    _within("num_inference_steps", steps, min(limits.max_steps, info.max_steps))
    sampler = _sampler(request.sampler, info)
    width, height = size
    seed = fresh_seed if request.seed is None else request.seed
    label = _label(request.label, info)
    one = SamplingRequest(
        prompt=request.prompt or "",
        label=label,
        classifier_scale=_classifier_scale(request.classifier_scale, label, info),
        like_HWC=_like(request.like, info),
        negative_prompt=request.negative_prompt,
        steps=steps,
        guidance_scale=info.guidance_scale if request.guidance_scale is None else request.guidance_scale,
        seed=seed,
        sampler=sampler,
        height=height,
        width=width,
        **given,
    )
    warnings = []
    if (width, height) != (info.size, info.size):
        warnings.append(f"The model was trained at {info.size}x{info.size}; other sizes may repeat or distort objects.")
    pictures = [dataclasses.replace(one, seed=picture_seed(seed, j)) for j in range(n)]
    return Admitted(pictures=pictures, seed=seed, warnings=warnings)


def _like(sent: str | None, info: ModelInfo) -> np.ndarray | None:
    if sent is None:
        return None
    if not info.takes_like:
        raise RequestRefused(
            f"This model draws no variations of pictures: it is {info.what}, and has no vision encoder.",
            param="like",
            code="unsupported_value",
        )
    return opaque(picture_of("like", sent))


def picture_of(name: str, sent: str) -> Image.Image:
    """The picture in a field. Raises RequestRefused naming it."""
    try:
        return read(sent)
    except ValueError as error:
        raise RequestRefused(f"Invalid {name}: {error}", param=name) from None


def _label(wanted: int | str | None, info: ModelInfo) -> int | None:
    if wanted is None:
        return None
    if info.classes is None:
        raise RequestRefused(
            f"This model does not draw classes: it is {info.what}.", param="label", code="unsupported_value"
        )
    try:
        return label_of(wanted, info.classes, info.class_names)
    except ConfigError as error:
        raise RequestRefused(f"{error.what} {error.mend}", param="label") from None


def _classifier_scale(wanted: float | None, label: int | None, info: ModelInfo) -> float:
    """0 is without; a class that is named is drawn to, where nothing else is said."""
    if wanted is None:
        return 1.0 if info.has_classifier and label is not None else 0.0
    if wanted and not info.has_classifier:
        raise RequestRefused(
            "This server has no classifier of noisy latents.", param="classifier_scale", code="unsupported_value"
        )
    if wanted and label is None:
        raise RequestRefused("A classifier draws to a class: give its label.", param="classifier_scale")
    return wanted


def picture_seed(seed: int, j: int) -> int:
    """The seed of picture j of a request: the request's own for the first, so that it can be drawn again alone.

    A hash and not `seed + j`: requests with neighbouring seeds share no picture.
    """
    if j == 0:
        return seed
    digest = hashlib.blake2b(f"{seed}/{j}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) & MAX_SEED


def model_known(name: str | None, info: ModelInfo, limits: Limits) -> None:
    """Raise RequestRefused (404) for a model that is not served."""
    if name is not None and name not in limits.names(info):
        raise RequestRefused(
            f"The model {shown(name)} does not exist. Served here: {', '.join(limits.names(info))}.",
            param="model",
            code="model_not_found",
            status=404,
        )


def _draws(info: ModelInfo) -> None:
    if info.policy is not None:
        raise RequestRefused("The model gives actions: POST /v1/actions.", param="model", code="wrong_model")


def _sampler(name: str | None, info: ModelInfo) -> str:
    chosen = name or info.sampler
    if chosen not in info.samplers:
        raise RequestRefused(
            f"Unknown sampler {shown(chosen)}. This model allows: {', '.join(info.samplers)}.", param="sampler"
        )
    return chosen


def _offered(request: DrawRequest) -> None:
    """Refuse what OpenAI's API knows and this endpoint does not offer."""
    if request.response_format not in (None, "b64_json"):
        raise RequestRefused(
            f"Invalid response_format {shown(request.response_format)}: only 'b64_json' is offered.",
            param="response_format",
        )
    if request.stream:
        raise RequestRefused("Streaming is not offered.", param="stream", code="unsupported_value")


def _prompted(request: DrawRequest) -> None:
    if request.prompt is None and request.label is None and request.like is None:
        raise RequestRefused("Missing required parameter: 'prompt'.", param="prompt", code="missing_required_parameter")


def _within(name: str, value: int, most: int) -> None:
    if not 1 <= value <= most:
        raise RequestRefused(
            f"Invalid {name}: {value} is not between 1 and {most}.", param=name, code="value_out_of_bounds"
        )


def _short(name: str, text: str, most: int) -> None:
    if len(text) > most:
        raise RequestRefused(
            f"The {name} has {len(text)} characters; at most {most} are taken.",
            param=name,
            code="string_above_max_length",
        )
