"""Clips as animated files: decoded again they have the frames, the duration and what they were drawn with."""

import io

import numpy as np
import pytest
from PIL import Image, ImageSequence

from latentray.errors import ConfigError
from latentray.reporting import animations


def numbered(frames: int, height: int = 24, width: int = 32) -> np.ndarray:
    """A clip whose frame t is of a brightness of its own."""
    clip = np.zeros((frames, height, width, 3), np.uint8)
    clip += (20 + 200 * np.arange(frames) // max(frames, 1)).astype(np.uint8)[:, None, None, None]
    clip[:, :8, :8] = (220, 30, 60)
    return clip


def decoded(data: bytes) -> tuple[np.ndarray, list[float]]:
    image = Image.open(io.BytesIO(data))
    frames, durations = [], []
    for frame in ImageSequence.Iterator(image):
        frames.append(np.asarray(frame.convert("RGB")))
        durations.append(frame.info.get("duration", 0.0))
    return np.stack(frames), durations


@pytest.mark.parametrize("frames", [1, 2, 16])
def test_a_png_is_the_very_clip(frames):
    clip = numbered(frames)
    again, durations = decoded(animations.encode(clip, "png", fps=8.0))
    assert np.array_equal(again, clip)
    assert frames == 1 or durations == [125.0] * frames


def test_a_webp_has_the_frames_nearly():
    clip = numbered(16)
    again, durations = decoded(animations.encode(clip, "webp", fps=8.0))
    assert again.shape == clip.shape and durations == [125] * 16
    assert np.abs(again.astype(int) - clip).mean() < 4
    assert len(animations.encode(clip, "webp", fps=8.0, quality=20)) < len(animations.encode(clip, "webp", fps=8.0))


def test_an_mp4_has_the_frames_and_their_rate():
    import av

    clip = numbered(16)
    data = animations.encode(clip, "mp4", fps=8.0, parameters='{"seed": 7}')
    with av.open(io.BytesIO(data)) as container:
        assert container.metadata["comment"] == '{"seed": 7}'
        stream = container.streams.video[0]
        assert stream.average_rate == 8
        again = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)])
    assert again.shape == clip.shape
    assert np.abs(again.astype(int) - clip).mean() < 6


@pytest.mark.parametrize("output_format", ["png", "webp"])
def test_a_rate_that_milliseconds_do_not_divide_keeps_the_duration(output_format):
    _, durations = decoded(animations.encode(numbered(30), output_format, fps=24.0))
    assert sum(durations) == pytest.approx(1250, abs=1)
    assert set(durations) == {41, 42}


@pytest.mark.parametrize("output_format", ["png", "webp"])
def test_frames_that_stand_still_keep_the_duration(output_format):
    clip = np.repeat(numbered(2), 4, axis=0)
    again, durations = decoded(animations.encode(clip, output_format, fps=8.0))
    assert sum(durations) == 1000
    assert np.abs(again[0].astype(int) - clip[0]).mean() < 4


@pytest.mark.parametrize("output_format", animations.FORMATS)
def test_equal_clips_give_equal_bytes(output_format):
    assert animations.encode(numbered(5), output_format, fps=8.0) == animations.encode(
        numbered(5), output_format, fps=8.0
    )


def test_how_it_was_drawn_travels_along():
    said = '{"prompt": "a red circle \\u2192 right"}'
    png = Image.open(io.BytesIO(animations.encode(numbered(3), "png", fps=8.0, parameters=said)))
    assert png.text["parameters"] == said
    webp = Image.open(io.BytesIO(animations.encode(numbered(3), "webp", fps=8.0, parameters=said)))
    assert webp.getexif()[0x010E] == said


def test_another_format_is_refused_by_name(monkeypatch):
    with pytest.raises(ConfigError) as caught:
        animations.encode(numbered(2), "gif", fps=8.0)
    assert caught.value.where == "output_format" and "webp" in caught.value.mend
    monkeypatch.setattr(animations, "mp4_encoder", lambda: None)
    with pytest.raises(ConfigError, match="no encoder"):
        animations.encode(numbered(2), "mp4", fps=8.0)
