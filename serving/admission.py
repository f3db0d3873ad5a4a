"""May this request be drawn, and as what? Pure checks against the model's bounds; each refusal names a field."""

from __future__ import annotations

import dataclasses
import hashlib
import re

from latentray.config.serve import ServeConfig
from latentray.errors import RequestRefused
from latentray.inference.requests import SamplingRequest
from serving.messages import ModelInfo
from serving.schema import MAX_SEED, ImagesRequest

SMALLEST, LARGEST = 0.5, 2.0
"""Sides allowed, in multiples of the model's own; far from its training size a model repeats objects."""
_SIZE = re.compile(r"([1-9]\d{0,4})x([1-9]\d{0,4})")


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
    model_known(request.model, info, limits)
    _offered(request)
    n = request.n or 1
    _within("n", n, limits.max_n)
    for name in ("prompt", "negative_prompt"):
        _short(name, getattr(request, name) or "", limits.max_prompt_chars)
    steps = request.num_inference_steps or info.steps
    _within("num_inference_steps", steps, min(limits.max_steps, info.max_steps))
    sampler = request.sampler or info.sampler
    if sampler not in info.samplers:
        raise RequestRefused(
            f"Unknown sampler {_shown(sampler)}. This model allows: {', '.join(info.samplers)}.", param="sampler"
        )
    width, height = size_of(request.size, info)
    seed = fresh_seed if request.seed is None else request.seed
    one = SamplingRequest(
        prompt=request.prompt,
        negative_prompt=request.negative_prompt or "",
        steps=steps,
        guidance_scale=info.guidance_scale if request.guidance_scale is None else request.guidance_scale,
        seed=seed,
        sampler=sampler,
        height=height,
        width=width,
    )
    warnings = []
    if (width, height) != (info.size, info.size):
        warnings.append(f"The model was trained at {info.size}x{info.size}; other sizes may repeat or distort objects.")
    pictures = [dataclasses.replace(one, seed=picture_seed(seed, j)) for j in range(n)]
    return Admitted(pictures=pictures, seed=seed, warnings=warnings)


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
            f"The model {_shown(name)} does not exist. Served here: {', '.join(limits.names(info))}.",
            param="model",
            code="model_not_found",
            status=404,
        )


def size_of(size: str | None, info: ModelInfo) -> tuple[int, int]:
    """(width, height) in pixels of a `size` field; the model's own where it is left out or `auto`."""
    if size is None or size == "auto":
        return info.size, info.size
    match = _SIZE.fullmatch(size)
    step = info.downsampling
    low, high = -(-int(info.size * SMALLEST) // step) * step, int(info.size * LARGEST) // step * step
    if match is None:
        raise RequestRefused(
            f"Invalid size {_shown(size)}: give '<width>x<height>', as in '{info.size}x{info.size}', or 'auto'.",
            param="size",
        )
    width, height = int(match[1]), int(match[2])
    if not all(low <= side <= high and side % step == 0 for side in (width, height)):
        raise RequestRefused(
            f"Invalid size {_shown(size)}: width and height must be multiples of {step} between {low} and {high}.",
            param="size",
        )
    return width, height


def _offered(request: ImagesRequest) -> None:
    """Refuse what OpenAI's API knows and this endpoint does not offer."""
    if request.response_format not in (None, "b64_json"):
        raise RequestRefused(
            f"Invalid response_format {_shown(request.response_format)}: only 'b64_json' is offered.",
            param="response_format",
        )
    if request.stream:
        raise RequestRefused("Streaming is not offered.", param="stream", code="unsupported_value")
    if request.background not in (None, "auto", "opaque"):
        raise RequestRefused(
            f"Invalid background {_shown(request.background)}: only 'auto' and 'opaque' are offered.",
            param="background",
        )
    if request.output_compression not in (None, 100) and request.output_format in (None, "png"):
        raise RequestRefused(
            "output_compression applies to output_format 'jpeg' and 'webp' only; png is lossless.",
            param="output_compression",
        )


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


def _shown(value: str | None) -> str:
    """A client's text as an error message may repeat it: quoted and short."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "...'"
