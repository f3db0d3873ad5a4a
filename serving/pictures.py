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


def read(sent: str) -> Image.Image:
    """A PNG, JPEG or WebP file in base64, or as a data URL -> the picture, RGB or, where parts are transparent, RGBA; upright.

    Raises ValueError, with what a client may read, where it is none, has more than MAX_PIXELS or 16 bits a channel.
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
                    raise _Refused(f"{image.width}x{image.height} pixels are more than {MAX_PIXELS}.")
                if image.mode.startswith("I"):
                    raise _Refused("it has 16 bits a channel, and 8 are taken.")  # Pillow would cut them off at 255
                mode = "RGBA" if image.has_transparency_data else "RGB"
                return ImageOps.exif_transpose(image).convert(mode)
    except _Refused:
        raise
    except Exception:  # the decoders raise whatever a damaged file provokes
        raise ValueError("it is no PNG, JPEG or WebP picture that can be read.") from None


class _Refused(ValueError):
    pass


def opaque(image: Image.Image) -> np.ndarray:
    """uint8 RGB (H, W, 3); transparency lies over white."""
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.asarray(image.convert("RGB"))


def transparent(image: Image.Image) -> np.ndarray | None:
    """True where a picture is transparent, bool (H, W); None where nothing of it is."""
    if image.mode != "RGBA":
        return None
    found = np.asarray(image.getchannel("A")) < 128
    return found if found.any() else None


def painted(mask: Image.Image) -> np.ndarray:
    """True where a mask says to paint, bool (H, W): where it is transparent, and if nothing of it is, where it is light."""
    found = transparent(mask)
    return np.asarray(mask.convert("L")) > 127 if found is None else found


def fitted(pixels: np.ndarray, width: int, height: int) -> np.ndarray:
    """Resized to cover the size (Lanczos, antialiased), the centre cut out; as it is where it has the size already."""
    if pixels.shape[:2] == (height, width):
        return pixels
    return np.asarray(ImageOps.fit(Image.fromarray(pixels), (width, height), Image.Resampling.LANCZOS))
