"""Bytes of a picture -> uint8 RGB -> a square -> a tensor, refusing what is not a plain, bounded picture.

A picture file is hostile input: a 20 kB PNG can unfold to gigabytes, so its size is read from the header first.

Pillow is the reference. JPEG, which most training pictures are, goes through libjpeg-turbo directly where `simplejpeg` is
installed: it gives the same pixels, several times as fast at a reduced scale, and reports damage that Pillow passes over.
"""

from __future__ import annotations

import io
import warnings

import numpy as np
import torch
from PIL import Image

from latentray.data import transforms
from latentray.errors import SampleRejected

try:
    import simplejpeg
except ImportError:  # not in the serving image
    simplejpeg = None

MAX_PIXELS = 64_000_000
"""Default pixel limit: 64 Mpx, 192 MB once decoded."""

SUFFIX_OF_FORMAT = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
"""The formats that are read (by content, not by file name), and the member suffix of each.

MPO is what Pillow calls a JPEG with further pictures behind the first, as many telephones write it.
"""

_OPENED_AS = ("JPEG", "PNG", "WEBP")
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

_SIDEWAYS = (
    Image.Transpose.TRANSPOSE,
    Image.Transpose.ROTATE_270,
    Image.Transpose.TRANSVERSE,
    Image.Transpose.ROTATE_90,
)
"""Those that exchange height and width."""

_REDUCTIONS = (8, 4, 2)
"""What a JPEG is reduced by, as Pillow does too: at 3/8, 5/8, 6/8 and 7/8 libjpeg-turbo has no vector code, and its 3/8 and
7/8 are as far as 32 dB from a resized whole."""


def decode(data: bytes, *, max_pixels: int = MAX_PIXELS, where: str = "") -> np.ndarray:
    """A picture file's bytes as uint8 (H, W, 3) RGB, upright; transparency lies over white, animations give frame one.

    Raises SampleRejected with reason `format` (not JPEG, PNG or WebP), `too_many_pixels` (before anything is decoded)
    or `unreadable` (damaged, cut short).
    """
    return _read(data, None, max_pixels, where)[0]


def decode_with_format(data: bytes, *, max_pixels: int = MAX_PIXELS, where: str = "") -> tuple[np.ndarray, str]:
    """As `decode`, with the member suffix that fits the file's content: `jpg`, `png` or `webp`."""
    pixels_HWC, _, suffix = _read(data, None, max_pixels, where)
    return pixels_HWC, suffix


def decode_at_least(
    data: bytes, height: int, width: int, *, max_pixels: int = MAX_PIXELS, where: str = ""
) -> tuple[np.ndarray, tuple[int, int]]:
    """As `decode`, but a JPEG at 1/8, 1/4 or 1/2 where that still covers (height, width), with the size of the whole picture.

    Returns uint8 (H', W', 3) and the upright (H, W) in the file. H' and W' are at least `height` and `width`, or the
    picture's own where that is smaller. What decodes at no scale but the whole (PNG, WebP) comes whole.
    """
    pixels_HWC, size, _ = _read(data, (height, width), max_pixels, where)
    return pixels_HWC, size


def _read(
    data: bytes, least: tuple[int, int] | None, max_pixels: int, where: str
) -> tuple[np.ndarray, tuple[int, int], str]:
    """Pixels of at least `least` (None: all of them), the upright (height, width) in the file, and the suffix."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns about size and odd metadata; the limits here decide
            with Image.open(io.BytesIO(data), formats=_OPENED_AS) as image:
                width, height = image.size
                if width * height > max_pixels:
                    raise _too_many(f"{width} x {height}", max_pixels, where)
                suffix = SUFFIX_OF_FORMAT[image.format or ""]
                if suffix == "jpg":
                    return *_jpeg(image, data, least), suffix
                image.load()
                pixels_HWC = np.asarray(_turned(_rgb(image), _turn_of(image)))
                return pixels_HWC, pixels_HWC.shape[:2], suffix
    except SampleRejected:
        raise
    except Image.DecompressionBombError:
        raise _too_many("far more", max_pixels, where) from None
    except Image.UnidentifiedImageError:
        reason = "unreadable" if _looks_known(data) else "format"
        raise SampleRejected(reason, "It is no JPEG, PNG or WebP picture that can be read.", where=where) from None
    except Exception as error:  # the decoders raise whatever a damaged file provokes
        raise SampleRejected("unreadable", f"The picture is damaged: {error}", where=where) from None


def _too_many(size: str, max_pixels: int, where: str) -> SampleRejected:
    return SampleRejected("too_many_pixels", f"{size} pixels; max_pixels is {max_pixels}.", where=where)


def _looks_known(data: bytes) -> bool:
    """True where the first bytes are those of a format that is read: the file is damaged, not foreign."""
    return data[:3] == b"\xff\xd8\xff" or data[:8] == b"\x89PNG\r\n\x1a\n" or data[:4] + data[8:12] == b"RIFFWEBP"


def _jpeg(image: Image.Image, data: bytes, least: tuple[int, int] | None) -> tuple[np.ndarray, tuple[int, int]]:
    turn = _turn_of(image)
    size = (image.height, image.width)
    rows, columns = size if least is None else least[::-1] if turn in _SIDEWAYS else least
    factor = min(size[0] // rows, size[1] // columns)
    reduction = next((step for step in _REDUCTIONS if step <= factor), 1)
    rows, columns = -(-size[0] // reduction), -(-size[1] // reduction)
    pixels_HWC = _by_simplejpeg(image, data, rows, columns)
    if pixels_HWC is None:
        image.draft(None, (size[1] // reduction, size[0] // reduction))
        pixels_HWC = np.asarray(_rgb(image))
    if turn is None:
        return pixels_HWC, size
    upright_HWC = np.asarray(_turned(Image.fromarray(pixels_HWC), turn))
    return upright_HWC, size[::-1] if turn in _SIDEWAYS else size


def _by_simplejpeg(image: Image.Image, data: bytes, rows: int, columns: int) -> np.ndarray | None:
    """A JPEG's pixels as they are stored, or None where Pillow has to read it. Raises ValueError for a damaged one.

    Of what libjpeg warns about, only bytes too many are harmless.
    """
    if simplejpeg is None or image.mode not in ("RGB", "L"):  # its CMYK is rounded otherwise than Pillow's
        return None
    try:
        height, width, *_ = simplejpeg.decode_jpeg_header(data)
        if (width, height) != image.size:
            return None
        return simplejpeg.decode_jpeg(data, min_height=rows, min_width=columns)
    except ValueError as error:
        if any(word in str(error) for word in ("Corrupt", "Premature")) and "extraneous" not in str(error):
            raise
        return None


def _turn_of(image: Image.Image) -> Image.Transpose | None:
    try:
        return _UPRIGHT.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # damaged metadata on a good picture is no reason to lose the picture
        return None


def _turned(image: Image.Image, turn: Image.Transpose | None) -> Image.Image:
    return image if turn is None else image.transpose(turn)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "I" or image.mode.startswith("I;16"):  # 16-bit gray: Pillow's own conversion clips at 255
        gray = np.asarray(image).astype(np.float64)
        gray[gray == image.info.get("transparency")] = 65535
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
    return transforms.resized_crop(pixels_HWC, height, width)[0]


def to_tensor(pixels: np.ndarray) -> torch.Tensor:
    """uint8 (..., H, W, 3) -> float32 (..., 3, H, W) in [-1, 1]."""
    x = torch.from_numpy(np.ascontiguousarray(np.moveaxis(pixels, -1, -3)))
    return x.to(torch.float32).mul_(2 / 255).sub_(1)
