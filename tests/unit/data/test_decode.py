"""Decoding: every colour mode becomes RGB, and hostile or damaged files are refused by reason."""

import io
import resource
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from latentray.data import decode
from latentray.errors import SampleRejected


def encode(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_of_size(width: int, height: int) -> bytes:
    """A PNG whose header promises any size, with hardly any data behind it."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )


def reason_of(data: bytes, **options) -> str:
    with pytest.raises(SampleRejected) as caught:
        decode.decode(data, **options)
    return caught.value.reason


@pytest.mark.parametrize("size", [(8001, 8000), (13_300, 13_300), (100_000, 100_000)])
def test_a_pixel_bomb_is_refused_from_its_header(size):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert reason_of(png_of_size(*size)) == "too_many_pixels"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KiB


def test_the_limit_is_a_setting():
    data = encode(Image.new("RGB", (20, 10)))
    assert decode.decode(data, max_pixels=200).shape == (10, 20, 3)
    assert reason_of(data, max_pixels=199) == "too_many_pixels"


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF"])
def test_other_formats_are_refused(kind):
    assert reason_of(encode(Image.new("RGB", (8, 8)), kind)) == "format"


def test_a_text_is_no_picture():
    assert reason_of(b"hello") == "format"
    assert reason_of(b"") == "format"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_cut_picture_is_unreadable(kind):
    noise = np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)
    data = encode(Image.fromarray(noise), kind)
    assert reason_of(data[: len(data) // 2]) == "unreadable"


@pytest.mark.parametrize(("kind", "suffix"), [("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp")])
def test_the_suffix_is_that_of_the_content(kind, suffix):
    pixels, got = decode.decode_with_format(encode(Image.new("RGB", (8, 8), (200, 10, 10)), kind))
    assert got == suffix
    assert pixels.dtype == np.uint8
    assert np.abs(pixels[4, 4].astype(int) - (200, 10, 10)).max() < 8


def test_modes_become_rgb():
    red = (255, 0, 0)
    assert decode.decode(encode(Image.new("L", (4, 4), 77)))[0, 0].tolist() == [77, 77, 77]
    assert decode.decode(encode(Image.new("1", (4, 4), 1)))[0, 0].tolist() == [255] * 3
    assert decode.decode(encode(Image.new("RGB", (4, 4), red).quantize(4)))[0, 0].tolist() == list(red)
    cmyk = decode.decode(encode(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=95))[8, 8]
    assert cmyk[0] > 200
    assert cmyk[1] < 60
    assert cmyk[2] < 60


@pytest.mark.parametrize("value", [0, 257, 32768, 65535])
def test_sixteen_bits_are_scaled_not_clipped(value):
    image = Image.fromarray(np.full((4, 4), value, np.uint16))
    assert decode.decode(encode(image))[0, 0].tolist() == [round(value / 257)] * 3


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_lies_over_white(mode):
    if mode == "P":
        data = encode(Image.new("P", (4, 4), 0), transparency=0)
    else:
        data = encode(Image.new(mode, (4, 4), (0, 0, 0, 0) if mode == "RGBA" else (0, 0)))
    assert decode.decode(data)[0, 0].tolist() == [255] * 3


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone(orientation):
    upright = np.zeros((16, 32, 3), np.uint8)
    upright[:8, :16] = 255  # white at the upper left
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: upright.transpose(1, 0, 2)[::-1, ::-1],
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(Image.fromarray(np.ascontiguousarray(stored)), "PNG", exif=exif)
    np.testing.assert_array_equal(decode.decode(data), upright)


def test_an_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (8, 8), c) for c in ("red", "blue")]
    data = encode(frames[0], "PNG", save_all=True, append_images=frames[1:])
    assert decode.decode(data)[0, 0].tolist() == [255, 0, 0]


def test_to_square():
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    np.testing.assert_array_equal(decode.to_square(pixels, 64), pixels)
    wide = np.zeros((10, 30, 3), np.uint8)
    wide[:, 10:20] = 200
    np.testing.assert_array_equal(decode.to_square(wide, 10), wide[:, 10:20])
    assert decode.to_square(wide, 7).shape == (7, 7, 3)
    assert decode.to_square(np.zeros((1000, 333, 3), np.uint8), 64).shape == (64, 64, 3)
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    assert np.abs(decode.to_square(stripes, 16).astype(int)[:, 2:-2] - 127).max() <= 4  # antialiased: gray, not moire


def test_to_tensor_spans_minus_one_to_one():
    x = decode.to_tensor(np.array([[[[0, 255, 51]]]], np.uint8))
    assert x.shape == (1, 3, 1, 1)
    assert x.dtype == torch.float32
    torch.testing.assert_close(x.flatten(), torch.tensor([-1.0, 1.0, -0.6]))
