"""May this picture be changed, and how? Picture-to-picture, inpainting or super-resolution, as the model in service does."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from PIL import Image

from latentray.errors import RequestRefused
from serving.admission import Admitted, Limits, filled_in, of_pictures, picture_of
from serving.messages import ModelInfo
from serving.pictures import fitted, opaque, painted, transparent
from serving.refusals import shown
from serving.schema import EditsRequest
from serving.sizes import bounds_of, drawable, size_of

STRENGTH = 0.7
"""Share of the steps that is run where a request gives neither a strength nor a mask, as in the shell."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Given:
    """What a picture asks of the sampler."""

    size: tuple[int, int]
    """Width and height of what is drawn."""
    fields: dict[str, Any]
    """Of `SamplingRequest`."""
    warnings: list[str] = dataclasses.field(default_factory=list)


def admit_edits(request: EditsRequest, info: ModelInfo, limits: Limits, *, fresh_seed: int) -> Admitted:
    """The pictures an edit asks for, as `admission.admit`."""
    of_pictures(request, info, limits)
    given = (_larger if info.makes_larger else _changed)(request, info)
    admitted = filled_in(request, info, limits, size=given.size, fresh_seed=fresh_seed, **given.fields)
    return dataclasses.replace(admitted, warnings=given.warnings + admitted.warnings)


def _larger(request: EditsRequest, info: ModelInfo) -> _Given:
    """Super-resolution: the picture as it is, and a size that follows from its own."""
    for name in ("mask", "strength"):
        if getattr(request, name) is not None:
            raise RequestRefused(
                f"This model takes no {name}: it is {info.what}.", param=name, code="unsupported_value"
            )
    image = picture_of("image", request.image)
    width, height = image.width * info.makes_larger, image.height * info.makes_larger
    if not drawable(width, height, info):
        raise RequestRefused(
            f"Invalid image: of {image.width}x{image.height} pixels the model, {info.what}, would make {width}x{height}, "
            f"and there {bounds_of(info)}.",
            param="image",
        )
    if request.size not in (None, "auto", f"{width}x{height}"):
        raise RequestRefused(
            f"Invalid size {shown(request.size)}: of this picture the model makes {width}x{height}.", param="size"
        )
    return _Given(size=(width, height), fields={"small_HWC": opaque(image)})


def _changed(request: EditsRequest, info: ModelInfo) -> _Given:
    """Picture-to-picture and inpainting, at the picture's own size where the model draws it."""
    image = picture_of("image", request.image)
    width, height = own = image.size
    if request.size not in (None, "auto") or not drawable(*own, info):
        width, height = size_of(request.size, info)
    mask = _mask(request, image)
    fields: dict[str, Any] = {
        "picture_HWC": fitted(opaque(image), width, height),
        "strength": request.strength or (STRENGTH if mask is None else 1.0),
    }
    if mask is not None:
        fields["mask_HW"] = fitted(mask.astype(np.uint8) * 255, width, height) > 127
        if not fields["mask_HW"].any():
            raise RequestRefused(
                "Invalid mask: it leaves nothing to paint. Transparent pixels are painted or, if it has none, light ones.",
                param="image" if request.mask is None else "mask",
            )
    warnings = [] if own == (width, height) else [f"The image was resized and cut to {width}x{height}."]
    return _Given(size=(width, height), fields=fields, warnings=warnings)


def _mask(request: EditsRequest, image: Image.Image) -> np.ndarray | None:
    """True where to paint, bool of the image's size; None where everything may change."""
    if request.mask is None:
        return transparent(image)
    mask = picture_of("mask", request.mask)
    if mask.size != image.size:
        raise RequestRefused(
            f"Invalid mask: it is {mask.width}x{mask.height}, and the image {image.width}x{image.height}.", param="mask"
        )
    return painted(mask)
