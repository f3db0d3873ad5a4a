"""Clips as files that people watch: animated WebP and PNG, and MP4 where PyAV finds an encoder for it.

Frames that are equal, one after another, may be stored as one that is shown longer: a clip's duration is kept always, its
number of frames where they differ.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from latentray.errors import ConfigError

QUALITY = 90
"""Percent, of WebP."""
_ENCODERS = ("libx264", "mpeg4")
"""In order of preference; a build of FFmpeg may lack the first."""
_EXIF_IMAGE_DESCRIPTION = 0x010E


def encode(
    frames_THWC: np.ndarray, output_format: str, *, fps: float, quality: int | None = None, parameters: str = ""
) -> bytes:
    """A clip, uint8 (T,H,W,3), as `output_format`: one of FORMATS. Equal input gives equal bytes.

    Args:
        quality: percent, of WebP; PNG is lossless, and MP4 nearly so.
        parameters: how it was drawn: a PNG's text chunk, a WebP's EXIF image description, an MP4's comment.

    Raises ConfigError for another format, or where MP4 has no encoder here.
    """
    if output_format not in _FORMATS:
        raise ConfigError(
            f"There is no format {output_format!r} for clips.",
            where="output_format",
            mend=f"Use one of {', '.join(FORMATS)}.",
        )
    if frames_THWC.dtype != np.uint8 or frames_THWC.ndim != 4 or not frames_THWC.size:
        raise ValueError(f"a clip is uint8 (T, H, W, 3), not {frames_THWC.dtype} {frames_THWC.shape}")
    return _FORMATS[output_format](frames_THWC, fps, quality, parameters)


def _webp(frames_THWC: np.ndarray, fps: float, quality: int | None, parameters: str) -> bytes:
    exif = Image.Exif()
    exif[_EXIF_IMAGE_DESCRIPTION] = parameters[:60_000]
    return _animated(frames_THWC, fps, "WEBP", quality=QUALITY if quality is None else quality, exif=exif)


def _png(frames_THWC: np.ndarray, fps: float, quality: int | None, parameters: str) -> bytes:
    chunks = PngInfo()
    chunks.add_itxt("parameters", parameters)
    return _animated(frames_THWC, fps, "PNG", pnginfo=chunks)


def _mp4(frames_THWC: np.ndarray, fps: float, quality: int | None, parameters: str) -> bytes:
    return encode_mp4(frames_THWC, fps, comment=parameters)


def _animated(frames_THWC: np.ndarray, fps: float, name: str, **settings: Any) -> bytes:
    """All frames in a loop without end; durations are whole milliseconds, rounded so that they never drift."""
    ends = np.rint(1000 * np.arange(1, len(frames_THWC) + 1) / fps).astype(int)
    durations = np.diff(ends, prepend=0).tolist()
    first, *others = map(Image.fromarray, np.ascontiguousarray(frames_THWC))
    if others:
        settings |= {"save_all": True, "append_images": others, "duration": durations, "loop": 0}
    buffer = io.BytesIO()
    first.save(buffer, name, **settings)
    return buffer.getvalue()


_FORMATS: dict[str, Callable[[np.ndarray, float, int | None, str], bytes]] = {
    "webp": _webp, "png": _png, "mp4": _mp4
}  # fmt: skip
FORMATS = tuple(_FORMATS)


@functools.cache
def mp4_encoder() -> str | None:
    """The video encoder for MP4, None where PyAV is not installed or has none."""
    try:
        import av
    except ImportError:
        return None
    return next((name for name in _ENCODERS if name in av.codecs_available), None)


def encode_mp4(
    frames_THWC: np.ndarray, fps: float, *, key_interval: int = 12, quality: int = 12, comment: str = ""
) -> bytes:
    """A clip, uint8 (T,H,W,3), as MP4: H.264, or MPEG-4 part 2 where FFmpeg has no encoder for it. It is lossy.

    Args:
        key_interval: frames between key frames; a window is decoded from the one before it.
        quality: H.264's constant rate factor, 0 (best) to 51.

    Raises ConfigError where there is no encoder.
    """
    codec = mp4_encoder()
    if codec is None:
        raise ConfigError(
            "There is no encoder for MP4 here.",
            where="output_format",
            mend="Use webp, or install PyAV (pip install av).",
        )
    import av

    height, width = frames_THWC.shape[1:3]
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        if comment:
            container.metadata["comment"] = comment
        stream: Any = container.add_stream(codec, rate=Fraction(fps).limit_denominator(1001))
        stream.width, stream.height = width, height
        stream.pix_fmt = "yuv444p" if codec == "libx264" and (height % 2 or width % 2) else "yuv420p"
        stream.gop_size = key_interval
        stream.codec_context.thread_count = 1  # equal bytes on every machine
        stream.options = {"crf": str(quality), "sc_threshold": "0"} if codec == "libx264" else {"qscale": "2"}
        for frame in frames_THWC:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode(None))
    return buffer.getvalue()
