"""Clips: the right frames at the right times from real files, and nothing hostile, damaged or too large is decoded."""

import dataclasses
import gc
import io
import os
import resource
import signal
import socket
import struct
import time
from fractions import Fraction

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latentray.data import clips, members, shards
from latentray.data.clips import Limits
from latentray.errors import ConfigError, DataError, SampleRejected


def numbered(count: int, height: int = 32, width: int = 48) -> np.ndarray:
    """Frame t is a gray that grows with t, brighter on the left: its number and its orientation can be read back."""
    frames = np.zeros((count, height, width, 3), np.uint8)
    frames += (20 + 4 * np.arange(count, dtype=np.uint8))[:, None, None, None]
    frames[:, :, : width // 4] += 30
    return frames


def numbers_of(frames: np.ndarray) -> list[int]:
    return np.rint((frames[:, 8:-8, -8:].mean(axis=(1, 2, 3)) - 20) / 4).astype(int).tolist()


def video(
    frames: np.ndarray,
    seconds: list[float],
    *,
    kind: str = "mp4",
    codec: str = "libx264",
    sound: bool = False,
    movflags: str | None = None,
) -> bytes:
    """A file whose frames stand at given times, with B-frames, and a key frame every ten."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=kind, options={"movflags": movflags} if movflags else {}) as container:
        stream = container.add_stream(codec, rate=30, options={"crf": "10"} if codec == "libx264" else {})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        stream.gop_size = 10
        stream.codec_context.time_base = Fraction(1, 1000)
        audio = container.add_stream("aac", rate=16000) if sound else None
        for frame, time in zip(frames, seconds, strict=True):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            picture.pts, picture.time_base = round(time * 1000), Fraction(1, 1000)
            container.mux(stream.encode(picture))
        if audio is not None:
            noise = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
            noise.sample_rate, noise.pts = 16000, 0
            container.mux(audio.encode(noise))
            container.mux(audio.encode(None))
        container.mux(stream.encode(None))
    return buffer.getvalue()


def source(data: bytes, **limits) -> clips.Video:
    return clips.Video(data, limits=Limits(**limits))


def reason_of(data: bytes, **limits) -> str:
    def take_all():
        opened = source(data, **limits)
        opened.take(range(len(opened.times_T)))

    with pytest.raises(SampleRejected) as caught:
        take_all()
    return caught.value.reason


MP4 = clips.encode_mp4(numbered(40), 8.0)


@settings(max_examples=100, deadline=None)
@given(n=st.integers(1, 200), ratio=st.integers(1, 8), frames=st.integers(1, 30), u=st.floats(0, 1, exclude_max=True))
def test_at_a_whole_ratio_a_window_is_every_nth_frame_and_starts_are_counted_in_closed_form(n, ratio, frames, u):
    times = np.arange(n) / 24
    starts = n - (frames - 1) * ratio
    if starts < 1:
        with pytest.raises(SampleRejected) as caught:
            clips.window(times, frames=frames, fps=24 / ratio, u=u)
        assert caught.value.reason == "too_short"
        return
    expected = int(u * starts) + ratio * np.arange(frames)
    np.testing.assert_array_equal(clips.window(times, frames=frames, fps=24 / ratio, u=u), expected)


@settings(max_examples=100, deadline=None)
@given(
    gaps=st.lists(st.integers(1, 400), min_size=1, max_size=40),
    frames=st.integers(2, 12),
    fps=st.floats(1, 60),
    u=st.floats(0, 1, exclude_max=True),
)
def test_each_frame_is_the_nearest_in_time_at_any_rate(gaps, frames, fps, u):
    times = np.concatenate([[0], np.cumsum(gaps)]) / 1000
    try:
        found = clips.window(times, frames=frames, fps=fps, u=u)
    except SampleRejected:
        assert (frames - 1) / fps > times[-1] + np.median(gaps) / 2000
        return
    wanted = times[found[0]] + np.arange(frames) / fps
    nearest = np.abs(times[None] - wanted[:, None]).min(axis=1)
    np.testing.assert_allclose(np.abs(times[found] - wanted), nearest, atol=3e-6)
    assert wanted[-1] <= times[-1] + np.median(gaps) / 2000 + 3e-6


def test_every_start_has_its_share_of_u():
    times = np.arange(10) / 8
    draws = [int(clips.window(times, frames=4, fps=8, u=u)[0]) for u in np.arange(700) / 700]
    assert np.bincount(draws).tolist() == [100] * 7


def test_a_rate_above_the_source_s_repeats_frames_the_earlier_on_a_tie():
    assert clips.window(np.arange(4) / 8, frames=5, fps=16).tolist() == [0, 0, 1, 1, 2]


@pytest.mark.parametrize("call", [{"frames": 0, "fps": 8}, {"frames": 4, "fps": 0}, {"frames": 4, "fps": 8, "u": 1.0}])
def test_an_impossible_window_is_refused(call):
    with pytest.raises(ConfigError):
        clips.window(np.arange(9) / 8, **call)


@pytest.mark.parametrize("u", [0.0, 0.4, 0.99])
@pytest.mark.parametrize(("frames", "fps"), [(8, None), (5, 4.0), (4, 3.0), (1, None)])
def test_a_video_and_stored_frames_give_the_same_frames(frames, fps, u):
    pixels = numbered(40)
    stored = clips.StoredFrames(pixels, 8.0, Limits())
    taken = [clips.sample_frames(one, frames=frames, fps=fps, u=u) for one in (stored, source(MP4))]
    assert numbers_of(taken[0]) == numbers_of(taken[1])
    assert np.abs(taken[0].astype(int) - taken[1]).mean() < 2
    assert taken[1].shape == (frames, 32, 48, 3) and taken[1].dtype == np.uint8


def test_windows_of_one_source_may_be_taken_in_any_order():
    opened = source(MP4)
    for start in (30, 0, 17, 39, 5):
        count = min(6, 40 - start)
        assert numbers_of(opened.take(range(start, start + count))) == list(range(start, start + count))


class Watched:
    """A codec that writes down the times it decodes."""

    def __init__(self, codec):
        self.codec, self.ticks, self.flush_buffers = codec, [], codec.flush_buffers

    def decode(self, packet):
        frames = self.codec.decode(packet)
        self.ticks += [frame.pts for frame in frames]
        return frames


def test_decoding_begins_at_the_key_frame_before_the_window_and_ends_with_it():
    opened = source(MP4)
    opened._codec = Watched(opened._codec)
    assert numbers_of(opened.take([26, 27, 28])) == [26, 27, 28]
    positions = [opened._ticks.index(tick) for tick in opened._codec.ticks]
    assert positions[0] == 24  # key frames stand at multiples of 12
    assert positions[-1] <= 32


def test_variable_frame_rates_go_by_time_stamps():
    seconds = [0.0, 0.1, 0.2, 0.3, 1.3, 2.3, 2.4, 2.5, 2.6, 2.7]
    opened = source(video(numbered(10), seconds))
    np.testing.assert_allclose(opened.times_T, seconds, atol=2e-3)
    assert numbers_of(clips.sample_frames(opened, frames=5, fps=2.0)) == [0, 3, 4, 4, 5]


@pytest.mark.parametrize(("kind", "codec"), [("mov", "libx264"), ("matroska", "libx264"), ("webm", "libvpx-vp9")])
def test_other_containers(kind, codec):
    opened = source(video(numbered(24), [t / 10 for t in range(24)], kind=kind, codec=codec))
    assert opened.fps == pytest.approx(10, rel=0.1)
    assert numbers_of(clips.sample_frames(opened, frames=6, fps=5.0, u=0.99)) == [13, 15, 17, 19, 21, 23]


def test_a_fragmented_file_with_its_header_first():
    data = video(numbered(24), [t / 10 for t in range(24)], movflags="frag_keyframe+empty_moov")
    assert data.index(b"moov") < data.index(b"mdat")
    assert numbers_of(clips.sample_frames(source(data), frames=6, u=0.5)) == [9, 10, 11, 12, 13, 14]
    for share in (0.5, 0.8, 0.95):
        assert reason_of(data[: int(len(data) * share)]) == "unreadable"


def test_sound_is_ignored():
    opened = source(video(numbered(20), [t / 10 for t in range(20)], sound=True))
    assert numbers_of(opened.take(range(20))) == list(range(20))


TURNS = {
    "none": ((1, 0, 0, 1), lambda x: x),
    "90 clockwise": ((0, 1, -1, 0), lambda x: np.rot90(x, -1)),
    "180": ((-1, 0, 0, -1), lambda x: np.rot90(x, 2)),
    "90 counter-clockwise": ((0, -1, 1, 0), lambda x: np.rot90(x)),
    "mirrored": ((-1, 0, 0, 1), lambda x: x[:, ::-1]),
    "transposed": ((0, 1, 1, 0), lambda x: x.transpose(1, 0, 2)),
}


@pytest.mark.parametrize("turn", TURNS)
def test_the_display_matrix_is_applied(turn):
    """A phone's rotation: nine fixed-point numbers in the track header, (x, y) -> (a x + c y, b x + d y)."""
    (a, b, c, d), expected = TURNS[turn]
    matrix = struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    at = MP4.index(b"tkhd") + 4 + 40
    picture = source(MP4[:at] + matrix + MP4[at + 36 :]).take([3])[0]
    straight = source(MP4).take([3])[0]
    np.testing.assert_array_equal(picture, expected(straight))


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("kind", ["mp4", "matroska"])
def test_a_cut_file_is_unreadable_wherever_it_is_cut(kind, share):
    data = MP4 if kind == "mp4" else video(numbered(24), [t / 10 for t in range(24)], kind=kind)
    assert reason_of(data[: int(len(data) * share)]) == "unreadable"


def test_overwritten_pictures_are_unreadable():
    at = MP4.index(b"mdat") + 1000
    assert reason_of(MP4[:at] + b"\xff" * 400 + MP4[at + 400 :]) == "unreadable"


@settings(max_examples=60, deadline=None)
@given(at=st.integers(0, len(MP4) - 1), value=st.integers(0, 255))
def test_any_one_byte_changed_is_read_or_rejected_but_never_anything_else(at, value):
    data = MP4[:at] + bytes([value]) + MP4[at + 1 :]
    try:
        taken = clips.sample_frames(source(data), frames=4)
    except SampleRejected as error:
        assert error.reason in ("format", "unreadable", "too_short", "too_many_pixels", "fps")
    else:
        assert taken.dtype == np.uint8 and len(taken) == 4


@pytest.mark.parametrize("data", [b"", b"hello", b"GIF89a" + bytes(99), b"RIFF" + bytes(4) + b"AVI LIST" + bytes(99)])
def test_what_is_no_video_is_refused_by_its_first_bytes(data):
    assert reason_of(data) == "format"


def playlists(url: str) -> dict[str, bytes]:
    hls = f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1.0,\n{url}\n#EXT-X-ENDLIST\n"
    dash = (
        '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"><Period><AdaptationSet>'
        f"<Representation id='1' bandwidth='1'><BaseURL>{url}</BaseURL></Representation></AdaptationSet></Period></MPD>"
    )
    return {
        "hls": hls.encode(),
        "concat": f"ffconcat version 1.0\nfile '{url}'\n".encode(),
        "dash": dash.encode(),
        "sdp": f"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nu={url}\nm=video 5004 RTP/AVP 96\n".encode(),
        "hls behind an MP4's first bytes": b"\0\0\0\x10ftypisom\0\0\0\0" + hls.encode(),
        "hls behind Matroska's first bytes": b"\x1a\x45\xdf\xa3\x80" + hls.encode(),
    }


@pytest.mark.parametrize("kind", playlists(""))
@pytest.mark.parametrize("scheme", ["http", "file"])
def test_a_playlist_is_refused_and_nothing_it_names_is_opened(kind, scheme):
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.05)
        address = f"http://127.0.0.1:{server.getsockname()[1]}/x.ts" if scheme == "http" else "file:///etc/hostname"
        assert reason_of(playlists(address)[kind]) in ("format", "unreadable")
        with pytest.raises(TimeoutError):
            server.accept()


@pytest.mark.parametrize("kind", ["hls", "concat"])
def test_even_a_demuxer_that_follows_names_opens_nothing(kind, monkeypatch):
    monkeypatch.setattr(clips, "_container_format", lambda data: kind)
    monkeypatch.setitem(clips._FAULTS, kind, lambda data: None)
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.05)
        port = server.getsockname()[1]
        for address in (f"http://127.0.0.1:{port}/x.ts", f"tcp://127.0.0.1:{port}", "file:///etc/hostname"):
            assert reason_of(playlists(address)[kind]) == "unreadable"
        with pytest.raises(TimeoutError):
            server.accept()
    with pytest.raises(PermissionError, match="/etc/hostname"):
        clips._refuse_to_open("file:///etc/hostname", 1, {})


def test_frames_larger_than_the_limit_are_refused_before_any_is_decoded():
    assert source(MP4, max_pixels=32 * 48).pixels == 32 * 48
    for one in (MP4, clips.encode_mp4(np.zeros((2, 2000, 2000, 3), np.uint8), 8.0)):
        with pytest.raises(SampleRejected) as caught:
            source(one, max_pixels=32 * 48 - 1)
        assert caught.value.reason == "too_many_pixels"


def test_a_table_of_more_samples_than_the_file_has_bytes_is_refused():
    """FFmpeg itself takes 1.4 GB and seven seconds for such a file of 1.5 kB."""
    bomb = bytearray(clips.encode_mp4(numbered(1), 8.0))
    for name, offset, values in (
        (b"stsz", 4, (1, 50_000_000)),
        (b"stts", 8, (50_000_000,)),
        (b"stsc", 12, (50_000_000,)),
    ):
        at = bomb.rindex(name) + 4 + offset
        bomb[at : at + 4 * len(values)] = struct.pack(f">{len(values)}I", *values)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert reason_of(bytes(bomb)) == "unreadable"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KiB


def test_a_codec_that_is_not_listed_is_not_decoded():
    assert reason_of(video(numbered(4), [0, 0.1, 0.2, 0.3], kind="matroska", codec="ffv1")) == "format"


def test_more_frames_than_the_limit_are_refused():
    assert len(source(MP4, max_frames=40).times_T) == 40
    assert reason_of(MP4, max_frames=39) == "too_many_frames"


def test_a_window_larger_than_the_limit_is_refused_before_it_is_decoded():
    need = 10 * 32 * 48 * 3
    for limit, refused in ((need, False), (need - 1, True)):
        limits = Limits(max_bytes=limit)
        for one in (source(MP4), clips.StoredFrames(numbered(40), 8.0, Limits())):
            if refused:
                with pytest.raises(SampleRejected) as caught:
                    clips.sample_frames(one, frames=10, limits=limits)
                assert caught.value.reason == "too_many_bytes"
            else:
                assert len(clips.sample_frames(one, frames=10, limits=limits)) == 10


def test_key_frames_far_apart_cost_no_more_than_the_limit():
    data = clips.encode_mp4(numbered(40), 8.0, key_interval=1000)
    opened = source(data, max_decoded_pixels=20 * 32 * 48)
    assert numbers_of(opened.take([3])) == [3]
    with pytest.raises(SampleRejected) as caught:
        opened.take([39])
    assert caught.value.reason == "too_many_pixels"


def test_limits_are_positive():
    for field in dataclasses.fields(Limits):
        with pytest.raises(ConfigError):
            Limits(**{field.name: 0})


@pytest.mark.parametrize("size", [(32, 48), (33, 47)])
def test_mp4_keeps_the_picture(size):
    rng = np.random.default_rng(0)
    smooth = rng.integers(60, 190, (3, 5, 5, 3)).astype(np.uint8).repeat(16, axis=1).repeat(16, axis=2)
    frames = smooth[:, : size[0], : size[1]]
    taken = source(clips.encode_mp4(frames, 24.0)).take([0, 1, 2])
    assert taken.shape == frames.shape
    assert 10 * np.log10(255**2 / np.square(taken.astype(float) - frames).mean()) > 28


def test_encoding_is_deterministic():
    assert clips.encode_mp4(numbered(6), 8.0) == clips.encode_mp4(numbered(6), 8.0)
    assert clips.encode_frames(numbered(6)) == clips.encode_frames(numbered(6))


@pytest.mark.parametrize("frames", [np.zeros((2, 4, 4, 3), np.float32), np.zeros((4, 4, 3), np.uint8)])
def test_only_uint8_frames_are_encoded(frames):
    with pytest.raises(SampleRejected, match="uint8"):
        clips.encode_frames(frames)


def decoded(sample: shards.Sample) -> dict:
    return members.decode_sample({"__key__": sample.key, "__url__": "x.tar", **sample.members})


@pytest.mark.parametrize("form", clips.FORMS)
def test_a_sample_is_read_as_it_was_written(form):
    sample = clips.clip_sample("a/7", numbered(20), 10.0, ["ein Kreis", "a circle"], form=form, about={"source": "x"})
    assert {name: sample.columns[name] for name in ("width", "height", "frames", "fps")} == {
        "width": 48,
        "height": 32,
        "frames": 20,
        "fps": 10.0,
    }
    assert len(sample.columns["sha256"]) == 32
    whole = clips.read_clip(decoded(sample))
    assert numbers_of(whole.frames_THWC) == list(range(20))
    assert whole.fps == pytest.approx(10.0)
    assert whole.captions == ["ein Kreis", "a circle"]
    part = clips.read_clip(decoded(sample), frames=4, fps=5.0, u=0.5)
    assert numbers_of(part.frames_THWC) == [7, 9, 11, 13]
    assert part.fps == 5.0
    slow = clips.read_clip(decoded(sample), fps=2.5)
    assert numbers_of(slow.frames_THWC) == [0, 4, 8, 12, 16]


def test_clips_are_written_to_shards_of_equal_bytes(tmp_path):
    samples = [clips.clip_sample(f"{n:09d}", numbered(4 + n), 8.0, ["x"]) for n in range(3)]
    first, second = (shards.write_shard(samples, tmp_path / name) for name in ("a.tar", "b.tar"))
    assert first.entry.sha256 == second.entry.sha256
    assert first.table["frames"].to_pylist() == [4, 5, 6]
    assert first.table["fps"].to_pylist() == [8.0] * 3
    assert set(first.table["sha256"].to_pylist()) == {sample.columns["sha256"] for sample in samples}


def test_a_video_of_variable_rate_is_read_whole_at_any_rate():
    data = video(numbered(10), [0.0, 0.1, 0.2, 0.3, 1.3, 2.3, 2.4, 2.5, 2.6, 2.7])
    sample = {"__key__": "a", "mp4": data, "json": {"captions": ["x"]}}
    assert numbers_of(clips.read_clip(sample, fps=1.0).frames_THWC) == [0, 4, 5]
    assert len(clips.read_clip(sample).frames_THWC) == 10


def test_unknown_forms_are_refused():
    with pytest.raises(ConfigError, match="frames, mp4"):
        clips.clip_sample("a", numbered(2), 8.0, [""], form="gif")


@pytest.mark.parametrize("fps", [None, 0, -1, "8", True, 1e-9, float("nan"), float("inf")])
def test_stored_frames_need_a_rate(fps):
    sample = decoded(clips.clip_sample("a", numbered(4), 8.0, [""]))
    sample["json"]["fps"] = fps
    with pytest.raises(SampleRejected) as caught:
        clips.read_clip(sample)
    assert caught.value.reason == "fps"
    assert "x.tar" in caught.value.where


def test_other_tensors_are_no_frames():
    sample = decoded(clips.clip_sample("a", numbered(4), 8.0, [""]))
    frames = sample["frames.safetensors"]["frames"]
    for tensors, reason in (({"x": frames}, "no_frames"), ({"frames": frames.float()}, "shape")):
        with pytest.raises(SampleRejected) as caught:
            clips.read_clip(sample | {"frames.safetensors": tensors})
        assert caught.value.reason == reason
    with pytest.raises(DataError, match="no clip"):
        clips.read_clip({"__key__": "a", "__url__": "x.tar", "json": {}})


def test_a_forked_process_can_throw_away_what_this_one_decoded():
    """Loader workers are forked; a converter's threads would not be there, and freeing it would wait for them without end."""
    with av.open(io.BytesIO(MP4)) as container:
        kept = list(container.decode(video=0))
    for frame in kept:
        clips._upright(frame)
    child = os.fork()
    if not child:
        kept.clear()
        del frame
        gc.collect()
        os._exit(0)
    try:
        until = time.monotonic() + 20
        while os.waitpid(child, os.WNOHANG) == (0, 0):
            assert time.monotonic() < until, "the process hangs"
            time.sleep(0.01)
    except AssertionError:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        raise
