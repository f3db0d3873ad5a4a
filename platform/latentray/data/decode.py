"""Bytes of a picture -> uint8 RGB -> a square -> a tensor, refusing what is not a plain, bounded picture.

A picture file is hostile input: a 20 kB PNG can unfold to gigabytes, so its size is read from the header first.
"""

from __future__ import annotations

import io
import warnings

import numpy as np
import torch
from PIL import Image

from latentray.errors import SampleRejected

MAX_PIXELS = 64_000_000
"""Default pixel limit: 64 Mpx, 192 MB once decoded."""

SUFFIX_OF_FORMAT = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
"""The formats that are read (by content, not by file name), and the member suffix of each."""

_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> what turns the picture upright."""


def decode(data: bytes, *, max_pixels: int = MAX_PIXELS, where: str = "") -> np.ndarray:
    """A picture file's bytes as uint8 (H, W, 3) RGB, upright; transparency lies over white, animations give frame one.

    Raises SampleRejected with reason `format` (not JPEG, PNG or WebP), `too_many_pixels` (before anything is decoded)
    or `unreadable` (damaged, cut short).
    """
    return decode_with_format(data, max_pixels=max_pixels, where=where)[0]


def decode_with_format(data: bytes, *, max_pixels: int = MAX_PIXELS, where: str = "") -> tuple[np.ndarray, str]:
    """As `decode`, with the member suffix that fits the file's content: `jpg`, `png` or `webp`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns about size and odd metadata; the limits here decide
            with Image.open(io.BytesIO(data), formats=tuple(SUFFIX_OF_FORMAT)) as image:
                width, height = image.size
                if width * height > max_pixels:
                    raise _too_many(f"{width} x {height}", max_pixels, where)
                suffix = SUFFIX_OF_FORMAT[image.format or ""]
                image.load()
                return np.asarray(_rgb(_upright(image))), suffix
    except SampleRejected:
        raise
    except Image.DecompressionBombError:
        raise _too_many("far more", max_pixels, where) from None
    except Image.UnidentifiedImageError:
        reason = "unreadable" if _looks_known(data) else "format"
        raise SampleRejected(reason, "It is no JPEG, PNG or WebP picture that can be read.", where=where) from None
    except Exception as error:  # Pillow's decoders raise whatever a damaged file provokes
        raise SampleRejected("unreadable", f"The picture is damaged: {error}", where=where) from None


def _too_many(size: str, max_pixels: int, where: str) -> SampleRejected:
    return SampleRejected("too_many_pixels", f"{size} pixels; max_pixels is {max_pixels}.", where=where)


def _looks_known(data: bytes) -> bool:
    """True where the first bytes are those of a format that is read: the file is damaged, not foreign."""
    return data[:3] == b"\xff\xd8\xff" or data[:8] == b"\x89PNG\r\n\x1a\n" or data[:4] + data[8:12] == b"RIFFWEBP"


def _upright(image: Image.Image) -> Image.Image:
    try:
        turn = _UPRIGHT.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # damaged metadata on a good picture is no reason to lose the picture
        return image
    return image if turn is None else image.transpose(turn)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "I" or image.mode.startswith("I;16"):  # 16-bit gray: Pillow's own conversion clips at 255
        gray = np.asarray(image).astype(np.float64)
        image = Image.fromarray(np.rint(gray / 257).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, (255, 255, 255, 255)), rgba)
    return image if image.mode == "RGB" else image.convert("RGB")


def to_square(pixels_HWC: np.ndarray, size: int) -> np.ndarray:
    """uint8 (size, size, 3): the shorter side resized to `size` (Lanczos, antialiased), the centre of the longer cut.

    A picture whose shorter side is `size` already keeps its pixels.
    """
    return to_size(pixels_HWC, size, size)


def to_size(pixels_HWC: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 (height, width, 3): resized to cover the size (Lanczos, antialiased), the centre cut out."""
    have_h, have_w = pixels_HWC.shape[:2]
    scale = max(height / have_h, width / have_w)
    if scale != 1:
        shape = (max(width, round(have_w * scale)), max(height, round(have_h * scale)))
        pixels_HWC = np.asarray(Image.fromarray(pixels_HWC).resize(shape, Image.Resampling.LANCZOS))
        have_h, have_w = pixels_HWC.shape[:2]
    top, left = (have_h - height) // 2, (have_w - width) // 2
    return pixels_HWC[top : top + height, left : left + width]


def to_tensor(pixels: np.ndarray) -> torch.Tensor:
    """uint8 (..., H, W, 3) -> float32 (..., 3, H, W) in [-1, 1]."""
    x = torch.from_numpy(np.ascontiguousarray(np.moveaxis(pixels, -1, -3)))
    return x.to(torch.float32).mul_(2 / 255).sub_(1)
