"""Clips: windows of frames at a wanted frame rate, from video files or stored frames, decoding no more than they need.

A video file is hostile input. It is read from memory by one of two demuxers, chosen by its first bytes, so a playlist is
no video; nothing it names is ever opened; and its limits are checked from the header before a frame is decoded.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import safetensors.numpy

from latentray.data import members, shards
from latentray.errors import ConfigError, DataError, SampleRejected
from latentray.reporting import animations

VIDEO_MEMBER = "mp4"
"""Holds any of the containers below: the content decides, not the name."""
FRAMES_MEMBER = "frames.safetensors"

_EPSILON = 1e-6
"""Seconds: what times may differ by rounding, between a container's ticks and k / fps."""

_CODECS = "h264,hevc,av1,libdav1d,vp8,vp9,libvpx,libvpx-vp9,mpeg4"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """What one clip may cost at most; more is refused before anything is decoded."""

    max_pixels: int = 4096 * 4096
    """Per frame."""
    max_frames: int = 200_000
    """In one video file."""
    max_bytes: int = 1 << 30
    """Of a window's frames, as uint8 RGB."""
    max_decoded_pixels: int = 8_000_000_000
    """Decoded for one window, the frames from the key frame before it included."""

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if value < 1:
                raise ConfigError(f"{name} is {value}.", where=name, mend="Set it to 1 or more.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Clip:
    """Frames as they follow each other."""

    frames_THWC: np.ndarray
    """uint8 RGB, upright."""
    fps: float
    """Frames per second, of these frames."""
    captions: list[str]
    """Never empty; one empty caption where the sample has none."""


class Source(Protocol):
    """Where frames come from, in the order of their times."""

    @property
    def times_T(self) -> np.ndarray:
        """Seconds from the first frame, float64, ascending."""

    @property
    def fps(self) -> float:
        """Frames per second, on average."""

    @property
    def pixels(self) -> int:
        """Of one frame."""

    def take(self, positions: Sequence[int]) -> np.ndarray:
        """The frames at ascending positions (one may be named more than once), uint8 (T, H, W, 3)."""


def read_clip(
    decoded: Mapping[str, Any],
    *,
    frames: int | None = None,
    fps: float | None = None,
    u: float = 0.0,
    limits: Limits | None = None,
) -> Clip:
    """A window of a sample that `members.decode_sample` decoded: see `sample_frames`; all frames where none is given.

    Raises DataError where the sample is no clip, SampleRejected where it cannot be used.
    """
    limits = limits or Limits()
    source = source_of(decoded, limits=limits)
    rate = source.fps if fps is None else fps
    count = int((_end(source.times_T) + _EPSILON / 2) * rate) + 1 if frames is None else frames
    taken = sample_frames(source, frames=count, fps=rate, u=u, limits=limits, where=_name(decoded))
    return Clip(frames_THWC=taken, fps=rate, captions=members.captions_of(decoded))


def source_of(decoded: Mapping[str, Any], *, limits: Limits | None = None) -> Source:
    """The frames of a decoded sample. Raises DataError where it has none, SampleRejected where they cannot be used."""
    where = _name(decoded)
    if VIDEO_MEMBER in decoded:
        return Video(decoded[VIDEO_MEMBER], limits=limits or Limits(), where=where)
    if FRAMES_MEMBER in decoded:
        about = decoded.get("json") or {}
        tensors = decoded[FRAMES_MEMBER]
        if "frames" not in tensors:
            raise SampleRejected("no_frames", f"{FRAMES_MEMBER} holds no tensor `frames`.", where=where)
        return StoredFrames(np.asarray(tensors["frames"]), _rate(about.get("fps"), where), limits or Limits(), where)
    raise DataError(
        f"The sample {decoded.get('__key__')!r} has no clip.",
        where=str(decoded.get("__url__", "")),
        mend=f"Give a data set of clips: .{VIDEO_MEMBER} or .{FRAMES_MEMBER}.",
    )


def sample_frames(
    source: Source,
    *,
    frames: int,
    fps: float | None = None,
    u: float = 0.0,
    limits: Limits | None = None,
    where: str = "",
) -> np.ndarray:
    """A window of a source, uint8 (frames, H, W, 3); `fps` is the source's where none is given.

    The start is chosen by u in [0, 1) among all that `window` allows. Raises SampleRejected with reason `too_short`,
    `too_many_bytes`, `too_many_pixels` or `unreadable`.
    """
    limits = limits or Limits()
    need = frames * source.pixels * 3
    if need > limits.max_bytes:
        raise SampleRejected(
            "too_many_bytes", f"{frames} frames take {need} bytes; max_bytes is {limits.max_bytes}.", where=where
        )
    positions = window(source.times_T, frames=frames, fps=source.fps if fps is None else fps, u=u, where=where)
    return source.take(positions.tolist())


def window(times_T: np.ndarray, *, frames: int, fps: float, u: float = 0.0, where: str = "") -> np.ndarray:
    """Which source frames make a window of `frames` at `fps`, int64 (frames,).

    The k-th is the one nearest to t_s + k / fps, the earlier of two equally near. A start s is possible where the last
    time wanted is at most half a frame (median) after the last source frame; of n possible ones, floor(u n) is taken. A
    rate above the source's repeats frames. Raises SampleRejected `too_short` where there is no start.
    """
    if frames < 1 or fps <= 0 or not 0 <= u < 1:
        raise ConfigError(f"A window of {frames} frames at {fps:g} fps, u {u:g}.", mend="Ask for one frame or more.")
    times = np.asarray(times_T, np.float64)
    latest = _end(times) - (frames - 1) / fps
    starts = int(np.searchsorted(times, latest + _EPSILON, side="right"))
    if starts < 1:
        raise SampleRejected(
            "too_short", f"{len(times)} frames are too few for {frames} at {fps:g} per second.", where=where
        )
    wanted = times[int(u * starts)] + np.arange(frames) / fps
    middles = (times[1:] + times[:-1]) / 2
    return np.searchsorted(middles, wanted - _EPSILON, side="left")


def too_short(frames_N: np.ndarray, fps_N: np.ndarray, *, frames: int, fps: float | None) -> np.ndarray:
    """Which clips of so many frames, at constant rates, `window` would refuse, bool (N,); fps None is each one's own."""
    rates = np.asarray(fps_N, np.float64)
    wanted = rates if fps is None else np.full_like(rates, fps)
    half = np.where(frames_N > 1, 0.5, 0.0)
    return (frames_N - 1 + half) / rates + _EPSILON < (frames - 1) / wanted


class StoredFrames:
    """Frames that were stored as a tensor, at a constant rate."""

    def __init__(self, frames_THWC: np.ndarray, fps: float, limits: Limits, where: str = ""):
        _require_frames(frames_THWC, where)
        self._frames, self.fps = frames_THWC, fps
        self.times_T = np.arange(len(frames_THWC)) / fps
        self.pixels = _bounded(frames_THWC.shape[2], frames_THWC.shape[1], limits, where)

    def take(self, positions: Sequence[int]) -> np.ndarray:
        return self._frames[np.asarray(positions, np.int64)]


class Video:
    """A video file in memory: one pass over its packets finds the times, and a window decodes from its key frame on.

    Audio and further video streams are ignored; rotation by the display matrix is applied, pixels count as square. Raises
    SampleRejected with reason `format` (no MP4, QuickTime, WebM or Matroska file, or a codec that is not read),
    `too_many_pixels`, `too_many_frames`, `fps` (times that make no rate) or `unreadable` (damaged, cut short).
    """

    def __init__(self, data: bytes, *, limits: Limits, where: str = ""):
        self._limits, self._where = limits, where
        self._container, stream = _opened(data, limits, where)
        try:
            self._codec = stream.codec_context
            self._codec.thread_count = 1
            self._codec.options = {"err_detect": "explode", "max_pixels": _padded(limits)}
            self._shape = (self._codec.height, self._codec.width)
            self.pixels = _bounded(self._codec.width, self._codec.height, limits, where)
            self._packets = self._demuxed(stream)
            if any(packet.is_corrupt or packet.pts is None for packet in self._packets):
                raise ValueError("a packet is damaged or has no time")
            self._ticks = sorted(packet.pts for packet in self._packets if not packet.is_discard)
            if not self._ticks or any(a == b for a, b in itertools.pairwise(self._ticks)):
                raise ValueError("there are no frames, or two of one time")
            since = [tick - self._ticks[0] for tick in self._ticks]
            self.times_T = np.array(since, np.float64) * float(stream.time_base)
            # Matroska's own rate is the encoder's word for it; one frame alone has no other.
            rate = (len(since) - 1) / float(self.times_T[-1]) if len(since) > 1 else float(stream.average_rate or 1)
            self.fps = _rate(round(rate, 6), where)
        except SampleRejected:
            raise
        except Exception as error:  # FFmpeg's errors are whatever a damaged file provokes
            raise _unreadable(error, where) from None

    def _demuxed(self, stream: Any) -> list[Any]:
        packets: list[Any] = []
        for packet in self._container.demux(stream):
            if len(packets) >= self._limits.max_frames and packet.size:
                raise SampleRejected(
                    "too_many_frames", f"More than max_frames = {self._limits.max_frames} frames.", where=self._where
                )
            packets += [packet] if packet.size else []
        return packets

    def take(self, positions: Sequence[int]) -> np.ndarray:
        wanted = {self._ticks[position] for position in positions}
        begin = min(wanted)
        keys = (n for n, packet in enumerate(self._packets) if packet.is_keyframe and packet.pts <= begin)
        first = max(keys, default=0)
        last = max(n for n, packet in enumerate(self._packets) if packet.pts in wanted)
        cost = (last + 1 - first) * self.pixels
        if cost > self._limits.max_decoded_pixels:
            raise SampleRejected(
                "too_many_pixels",
                f"The window takes {cost} decoded pixels; max_decoded_pixels is {self._limits.max_decoded_pixels}.",
                where=self._where,
            )
        try:
            frames = self._decode(first, wanted)
        except Exception as error:  # see __init__
            raise _unreadable(error, self._where) from None
        return np.stack([frames[self._ticks[position]] for position in positions])

    def _decode(self, first: int, wanted: set[int]) -> dict[int, np.ndarray]:
        """The frames of these times, decoding in file order from packet `first` until the last of them is out."""
        self._codec.flush_buffers()  # another window may have been taken before
        frames: dict[int, np.ndarray] = {}
        for packet in [*self._packets[first:], None]:
            for frame in self._codec.decode(packet):
                if frame.is_corrupt or (frame.height, frame.width) != self._shape:
                    raise ValueError("a frame is damaged, or of another size than the header says")
                if frame.pts in wanted:
                    frames[frame.pts] = _upright(frame)
            if len(frames) == len(wanted):
                return frames
        raise ValueError("frames that the header lists are missing")


def _opened(data: bytes, limits: Limits, where: str) -> tuple[Any, Any]:
    """An open PyAV container, and its first video stream of a known codec: a cover picture is none."""
    import av

    kind = _container_format(data)
    if kind is None:
        raise SampleRejected("format", "It is no MP4, QuickTime, WebM or Matroska file.", where=where)
    fault = _FAULTS[kind](data)
    if fault:
        raise SampleRejected("unreadable", f"The video is damaged: {fault}.", where=where)
    try:
        container = av.open(
            io.BytesIO(data),
            format=kind,
            io_open=_refuse_to_open,
            # The data of a QuickTime file may lie in other files, by name: never followed.
            container_options={"protocol_whitelist": "none", "format_whitelist": kind, "enable_drefs": "0"},
            options={"codec_whitelist": _CODECS, "max_pixels": _padded(limits)},
        )
    except Exception as error:  # see Video
        raise _unreadable(error, where) from None
    for stream in container.streams.video:
        if stream.codec_context is not None and stream.codec_context.name in _CODECS.split(","):
            return container, stream
    raise SampleRejected("format", f"It has no video of a codec among {_CODECS}.", where=where)


def _refuse_to_open(url: str, flags: int, options: Mapping[str, str]) -> Any:
    raise PermissionError(f"the file names another: {url!r}")


def _padded(limits: Limits) -> str:
    """The decoder's own limit, for sizes that the stream itself gives; it counts blocks at the edges as whole."""
    return str(min(2 * limits.max_pixels + (1 << 16), 2**31 - 1))


def _container_format(data: bytes) -> str | None:
    """FFmpeg's name of the demuxer that fits the first bytes; None for anything that is not read."""
    if data[:4] == b"\x1a\x45\xdf\xa3":
        return "matroska"
    return "mov" if data[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip") else None


def _mov_fault(data: bytes) -> str | None:
    """What an MP4 or QuickTime file says of itself that cannot be: boxes behind its end, or more samples than bytes.

    FFmpeg makes an index entry per sample before anything else, so that a file of 1 kB could take gigabytes.
    """
    spans = [(0, len(data))]
    while spans:
        at, end = spans.pop()
        while at + 8 <= end:
            size, name = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
            begin = at + 8
            if size == 1:  # a 64-bit size follows the name
                size, begin = int.from_bytes(data[begin : begin + 8], "big"), begin + 8
            size = size or end - at  # 0: up to the end
            if at + size > len(data):
                return "it is cut short"
            if size < begin - at:
                break
            if name in _COUNTED:
                count = int.from_bytes(data[begin + _COUNTED[name] : begin + _COUNTED[name] + 4], "big")
                if count > len(data):
                    return f"it lists {count} samples in {len(data)} bytes"
            if name in _HOLDERS:
                spans.append((begin, at + size))
            at += size
    return None


_HOLDERS = (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"moof", b"traf")
_COUNTED = {b"stsz": 8, b"trun": 4}  # codespell:ignore trun
"""Box with a number of samples -> where in its content (ISO/IEC 14496-12, sections 8.7.3 and 8.8.8)."""


def _matroska_fault(data: bytes) -> str | None:
    """Whether the segment of a Matroska file ends behind the file's end; live streams leave its size unknown."""
    header, at = _ebml_size(data, 4)
    size, begin = _ebml_size(data, at + header + 4)
    unknown = size == (1 << 7 * (begin - at - header - 4)) - 1
    return "it is cut short" if not unknown and begin + size > len(data) else None


def _ebml_size(data: bytes, at: int) -> tuple[int, int]:
    """A variable-length size (RFC 8794, section 4) and the offset behind it."""
    length = 9 - data[at].bit_length() if at < len(data) and data[at] else 1
    value = int.from_bytes(data[at : at + length], "big")
    return value & ((1 << 7 * length) - 1), at + length


_FAULTS: dict[str, Callable[[bytes], str | None]] = {"mov": _mov_fault, "matroska": _matroska_fault}
"""What FFmpeg does not mind: of a cut file it shows the first frames as if they were all."""


def _upright(frame: Any) -> np.ndarray:
    """A decoded frame as uint8 (H, W, 3), turned as its display matrix says, by quarters and mirrored."""
    pixels_HWC = frame.to_ndarray(format="rgb24", threads=1)  # threads that a forked child has not got would hang it
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return pixels_HWC
    a, b, _, c, d = np.frombuffer(bytes(matrix), np.int32)[:5].tolist()  # (x, y) -> (a x + c y, b x + d y)
    if abs(b) > abs(a):
        pixels_HWC, a, d = pixels_HWC.transpose(1, 0, 2), c, b
    return np.ascontiguousarray(pixels_HWC[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1])


def _bounded(width: int, height: int, limits: Limits, where: str) -> int:
    """Pixels of a frame."""
    if width < 1 or height < 1:
        raise SampleRejected("unreadable", f"The frames are {width} x {height} pixels.", where=where)
    if width * height > limits.max_pixels:
        raise SampleRejected(
            "too_many_pixels", f"{width} x {height} pixels; max_pixels is {limits.max_pixels}.", where=where
        )
    return width * height


def _require_frames(frames_THWC: np.ndarray, where: str = "") -> None:
    if frames_THWC.dtype != np.uint8 or frames_THWC.ndim != 4 or frames_THWC.shape[3] != 3 or not frames_THWC.size:
        raise SampleRejected(
            "shape", f"Frames are uint8 (T, H, W, 3); these are {frames_THWC.dtype} {frames_THWC.shape}.", where=where
        )


def _rate(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.001 <= value <= 1000:
        raise SampleRejected("fps", f"The frame rate is {value!r}; it is 0.001 ... 1000 per second.", where=where)
    return float(value)


def _end(times_T: np.ndarray) -> float:
    """Up to when the last frame is the nearest: half a frame (median) after its own time."""
    half = float(np.median(np.diff(times_T))) / 2 if len(times_T) > 1 else 0.0
    return float(times_T[-1]) + half


def _unreadable(error: Exception, where: str) -> SampleRejected:
    return SampleRejected("unreadable", f"The video is damaged: {error}", where=where)


def _name(decoded: Mapping[str, Any]) -> str:
    return f"{decoded.get('__url__', '')} {decoded.get('__key__', '')}".strip()


def encode_frames(frames_THWC: np.ndarray) -> bytes:
    """The `.frames.safetensors` member of a clip."""
    _require_frames(frames_THWC)
    return safetensors.numpy.save({"frames": np.ascontiguousarray(frames_THWC)})


def encode_mp4(frames_THWC: np.ndarray, fps: float, *, key_interval: int = 12, quality: int = 12) -> bytes:
    """The `.mp4` member of a clip, as `animations.encode_mp4` makes it."""
    _require_frames(frames_THWC)
    return animations.encode_mp4(frames_THWC, fps, key_interval=key_interval, quality=quality)


FORMS: dict[str, tuple[str, Callable[[np.ndarray, float], bytes]]] = {
    "frames": (FRAMES_MEMBER, lambda frames_THWC, fps: encode_frames(frames_THWC)),
    "mp4": (VIDEO_MEMBER, encode_mp4),
}
"""How a clip is stored -> its member, and what encodes it (frames, fps)."""


def clip_sample(
    key: str,
    frames_THWC: np.ndarray,
    fps: float,
    captions: Sequence[str],
    *,
    form: str = "frames",
    about: Mapping[str, Any] | None = None,
) -> shards.Sample:
    """A clip as a sample to be written; `about` joins its `.json`. Raises ConfigError for an unknown form."""
    if form not in FORMS:
        raise ConfigError(f"There is no form {form!r}.", where="form", mend=f"Use one of {', '.join(FORMS)}.")
    member, encode = FORMS[form]
    data = encode(frames_THWC, fps)
    count, height, width = frames_THWC.shape[:3]
    digest = hashlib.sha256(data)
    size = {"width": width, "height": height, "frames": count, "fps": float(fps)}
    record = {**(about or {}), "captions": list(captions), **size, "sha256": digest.hexdigest()}
    return shards.Sample(
        key=key,
        members={member: data, "json": json.dumps(record, sort_keys=True, ensure_ascii=False).encode()},
        columns={"sha256": digest.digest(), **size},
    )
