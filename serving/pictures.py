"""Pixels -> PNG, JPEG or WebP bytes that carry the parameters they were drawn with (equal input gives equal bytes), and back."""

from __future__ import annotations

import base64
import io
import json
import warnings
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

TEXT_CHUNK = "parameters"
"""Keyword of the PNG text chunk."""
_EXIF_IMAGE_DESCRIPTION = 0x010E
_DEFAULT_QUALITY = 95
MAX_PIXELS = 4_194_304
"""Of a picture that a client sends: 2048 x 2048."""


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


def decode(sent: str) -> np.ndarray:
    """A PNG, JPEG or WebP file in base64, or as a data URL -> uint8 RGB (H, W, 3), upright.

    Raises ValueError, with what a client may read, where it is none or has more than MAX_PIXELS.
    """
    try:
        data = base64.b64decode(sent.partition(",")[2] if sent.startswith("data:") else sent, validate=True)
    except ValueError:
        raise ValueError("it is no base64.") from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP")) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise _TooLarge(f"{image.width}x{image.height} pixels are more than {MAX_PIXELS}.")
                return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except _TooLarge:
        raise
    except Exception:  # the decoders raise whatever a damaged file provokes
        raise ValueError("it is no PNG, JPEG or WebP picture that can be read.") from None


class _TooLarge(ValueError):
    pass
