"""Pixels -> PNG, JPEG or WebP bytes that carry the parameters they were drawn with. Equal input gives equal bytes."""

from __future__ import annotations

import io
import json
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

TEXT_CHUNK = "parameters"
"""Keyword of the PNG text chunk."""
_EXIF_IMAGE_DESCRIPTION = 0x010E
_DEFAULT_QUALITY = 95


def encode(pixels_HWC: np.ndarray, output_format: str, *, quality: int | None, parameters: dict[str, Any]) -> bytes:
    """The encoded picture: `output_format` png, jpeg or webp; `quality` in percent for the last two.

    The parameters are JSON, in a PNG text chunk called `parameters` or in the EXIF image description.
    """
    image = Image.fromarray(np.ascontiguousarray(pixels_HWC))
    text = json.dumps(parameters, sort_keys=True)  # ASCII: safe in a PNG tEXt chunk, which is Latin-1
    buffer = io.BytesIO()
    if output_format == "png":
        info = PngInfo()
        info.add_text(TEXT_CHUNK, text)
        image.save(buffer, "PNG", pnginfo=info)
    else:
        exif = Image.Exif()
        exif[_EXIF_IMAGE_DESCRIPTION] = text[:60_000]  # a JPEG segment holds 64 KiB
        image.save(buffer, output_format.upper(), quality=_DEFAULT_QUALITY if quality is None else quality, exif=exif)
    return buffer.getvalue()
