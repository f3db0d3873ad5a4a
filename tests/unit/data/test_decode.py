"""Decoding: every colour mode becomes RGB, and hostile or damaged files are refused by reason."""

import io
import multiprocessing
import resource
import struct
import zlib
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest
import simplejpeg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from latentray.data import decode
from latentray.errors import SampleRejected

READERS = {"simplejpeg": simplejpeg, "Pillow": None}


@pytest.fixture(params=READERS)
def reader(request, monkeypatch):
    """Each library that may read JPEG; without simplejpeg, Pillow reads all."""
    monkeypatch.setattr(decode, "simplejpeg", READERS[request.param])
    return request.param


def encode(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png(width: int, height: int, *, depth: int, colour: int, rows: bytes, before: bytes = b"") -> bytes:
    """A PNG from its parts; `rows` with their filter bytes, compressed."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + before + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def png_of_size(width: int, height: int) -> bytes:
    """A PNG whose header promises any size, with hardly any data behind it."""
    return png(width, height, depth=8, colour=2, rows=zlib.compress(b"\0" * 100))


def natural(height: int, width: int, seed: int = 0) -> np.ndarray:
    """A picture with a photograph's spectrum (amplitude 1/f), a smooth background, an edge and some fine texture."""
    rng = np.random.default_rng(seed)
    fy, fx = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
    frequency = np.hypot(fy, fx) + 1 / max(height, width)
    planes = []
    for _ in range(3):
        spectrum = (rng.normal(size=frequency.shape) + 1j * rng.normal(size=frequency.shape)) / frequency**1.2
        plane = np.fft.irfft2(spectrum, s=(height, width))
        planes.append(plane / plane.std())
    y, x = np.mgrid[:height, :width] / max(height, width)
    common, texture = planes[0], rng.normal(size=(height, width))
    disk = np.hypot(y - 0.5, x - 0.4) < 0.2
    mixed = [128 + 30 * common + 10 * p + 40 * (x - y) + 50 * disk + 2 * texture for p in planes]
    return np.clip(np.stack(mixed, -1), 0, 255).astype(np.uint8)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Decibels."""
    return 10 * np.log10(255**2 / np.mean((a.astype(float) - b) ** 2))


def turned_as_stored(upright: np.ndarray, orientation: int) -> np.ndarray:
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
    return np.ascontiguousarray(stored)


def exif_of(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def reason_of(data: bytes, **options) -> str:
    with pytest.raises(SampleRejected) as caught:
        decode.decode(data, **options)
    return caught.value.reason


@pytest.mark.parametrize("size", [(8001, 8000), (13_300, 13_300), (100_000, 100_000)])
def test_a_picture_of_too_many_pixels_is_refused_from_its_header(size):
    assert reason_of(png_of_size(*size)) == "too_many_pixels"


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
    data = encode(Image.fromarray(turned_as_stored(upright, orientation)), "PNG", exif=exif_of(orientation))
    np.testing.assert_array_equal(decode.decode(data), upright)


def test_an_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (8, 8), c) for c in ("red", "blue")]
    data = encode(frames[0], "PNG", save_all=True, append_images=frames[1:])
    assert decode.decode(data)[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize(
    "options", [{}, {"progressive": True}, {"subsampling": 0}, {"subsampling": 1}, {"optimize": True}]
)
@pytest.mark.parametrize("shape", [(64, 96), (61, 83)])
def test_jpeg_has_the_pixels_that_pillow_gives(shape, options):
    data = encode(Image.fromarray(natural(*shape)), "JPEG", **options)
    np.testing.assert_array_equal(decode.decode(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


def test_gray_jpeg_has_three_equal_channels(reader):
    gray = natural(64, 64)[:, :, 0]
    pixels, size = decode.decode_at_least(encode(Image.fromarray(gray), "JPEG"), 32, 32)
    assert pixels.shape == (32, 32, 3) and size == (64, 64)
    assert (pixels[:, :, 0] == pixels[:, :, 1]).all() and (pixels[:, :, 1] == pixels[:, :, 2]).all()


@pytest.mark.parametrize(
    ("have", "least", "got"),
    [
        ((512, 512), (256, 256), (256, 256)), ((513, 700), (256, 256), (257, 350)), ((512, 512), (257, 10), (512, 512)),
        ((511, 511), (256, 256), (511, 511)), ((800, 200), (100, 100), (400, 100)), ((64, 64), (100, 100), (64, 64)),
        ((333, 900), (80, 80), (84, 225)), ((801, 801), (100, 100), (101, 101)),
    ],
)  # fmt: skip
def test_a_jpeg_is_decoded_at_the_smallest_scale_that_covers_whoever_decodes(have, least, got, monkeypatch):
    data = encode(Image.fromarray(natural(*have)), "JPEG")
    pixels, size = decode.decode_at_least(data, *least)
    assert size == have
    assert pixels.shape == (*got, 3)
    monkeypatch.setattr(decode, "simplejpeg", None)
    np.testing.assert_array_equal(decode.decode_at_least(data, *least)[0], pixels)


@pytest.mark.parametrize("have", [(512, 512), (700, 300), (301, 977), (40, 40)])
@pytest.mark.parametrize("least", [(100, 100), (64, 150), (300, 20)])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_what_is_decoded_covers(have, least, kind, reader):
    data = encode(Image.new("RGB", have[::-1], (9, 99, 199)), kind)
    pixels, size = decode.decode_at_least(data, *least)
    assert size == have
    assert all(got >= min(own, wanted) for got, own, wanted in zip(pixels.shape, have, least, strict=False))
    assert np.abs(pixels.astype(int) - (9, 99, 199)).max() < 8


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("options", [{"quality": 75}, {"quality": 95, "subsampling": 0}])
def test_half_scale_is_close_to_pillow_and_lanczos(seed, options, reader):
    data = encode(Image.fromarray(natural(512, 512, seed)), "JPEG", **options)
    whole = Image.open(io.BytesIO(data)).convert("RGB")
    reference = np.asarray(whole.resize((256, 256), Image.Resampling.LANCZOS))
    assert psnr(decode.decode_at_least(data, 256, 256)[0], reference) >= 35


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("shape", [(128, 256), (256, 128)])
def test_exif_orientation_is_undone_at_a_scale(orientation, shape, reader):
    upright = natural(*shape)
    stored = Image.fromarray(turned_as_stored(upright, orientation))
    pixels, size = decode.decode_at_least(encode(stored, "JPEG", exif=exif_of(orientation)), 64, 64)
    assert size == shape
    assert pixels.shape[:2] == (shape[0] // 2, shape[1] // 2)
    reference = Image.fromarray(upright).resize(pixels.shape[1::-1], Image.Resampling.LANCZOS)
    assert psnr(pixels, np.asarray(reference)) > 30


def test_damaged_metadata_costs_no_picture(reader):
    data = encode(Image.new("RGB", (32, 16), "red"), "JPEG", exif=exif_of(6))
    assert decode.decode(data).shape == (32, 16, 3)
    damaged = data.replace(b"MM\0*\0\0\0\x08", b"\0\0\0*\0\0\0\xff")
    assert damaged != data
    assert decode.decode(damaged).shape == (16, 32, 3)


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_telephones_picture_with_another_behind_it_is_a_jpeg(orientation, reader):
    behind = Image.new("RGB", (32, 16), "blue")
    data = encode(
        Image.new("RGB", (32, 16), "red"), "MPO", save_all=True, append_images=[behind], exif=exif_of(orientation)
    )
    assert Image.open(io.BytesIO(data)).format == "MPO"
    pixels, suffix = decode.decode_with_format(data)
    assert suffix == "jpg"
    assert pixels.shape[:2] == ((16, 32) if orientation == 1 else (32, 16))
    assert pixels[8, 8, 0] > 240


def as_ycck(cmyk_jpeg: bytes) -> bytes:
    """The channels are said to be Y, Cb, Cr, K: byte 11 of Adobe's marker, its transform, from 0 to 2."""
    at = cmyk_jpeg.index(b"Adobe") + 11
    assert cmyk_jpeg[at] == 0
    return cmyk_jpeg[:at] + b"\2" + cmyk_jpeg[at + 1 :]


@pytest.mark.parametrize("scheme", ["CMYK", "YCCK"])
def test_four_channel_jpeg_is_read_by_pillow(scheme, reader):
    # Red. In YCCK: Pillow stores 255 - value, and (179, 171, 0) is the YCbCr of (0, 255, 255), red's complement.
    stored = {"CMYK": (0, 255, 255, 0), "YCCK": (76, 84, 255, 0)}[scheme]
    data = encode(Image.new("CMYK", (64, 48), stored), "JPEG", quality=95)
    pixels, size = decode.decode_at_least(as_ycck(data) if scheme == "YCCK" else data, 24, 24)
    assert size == (48, 64) and pixels.shape == (24, 32, 3)
    assert np.abs(pixels.astype(int) - (255, 0, 0)).max() < 8


def test_a_jpeg_of_rgb_channels_keeps_its_colours(reader):
    data = encode(Image.new("RGB", (32, 32), (250, 10, 90)), "JPEG", quality=95, keep_rgb=True)
    assert np.abs(decode.decode_at_least(data, 16, 16)[0].astype(int) - (250, 10, 90)).max() < 8


@pytest.mark.parametrize("options", [{}, {"progressive": True}])
def test_a_jpeg_cut_anywhere_is_unreadable(options, reader):
    data = encode(Image.fromarray(natural(96, 96)), "JPEG", **options)
    for kept in np.linspace(4, len(data) - 1, 60).astype(int):
        for least in ((96, 96), (48, 48), (12, 12)):
            with pytest.raises(SampleRejected) as caught:
                decode.decode_at_least(data[:kept], *least)
            assert caught.value.reason == "unreadable"


def test_a_cut_jpeg_with_a_new_end_is_unreadable_too():
    """Pillow alone fills the rest with gray."""
    data = encode(Image.fromarray(natural(96, 96)), "JPEG")
    assert reason_of(data[: len(data) // 2] + b"\xff\xd9") == "unreadable"


def test_bytes_too_many_cost_no_picture(reader):
    data = encode(Image.fromarray(natural(48, 48)), "JPEG")
    whole = decode.decode(data)
    np.testing.assert_array_equal(decode.decode(data[:-2] + b"\0\0\0\xff\xd9"), whole)
    np.testing.assert_array_equal(decode.decode(data + b"trailer"), whole)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_flipped_bits_give_a_picture_or_a_reason(given_data):
    data = bytearray(
        encode(Image.fromarray(natural(40, 40)), given_data.draw(st.sampled_from(["JPEG", "PNG", "WEBP"])))
    )
    for _ in range(given_data.draw(st.integers(1, 4))):
        at = given_data.draw(st.integers(0, len(data) - 1))
        data[at] ^= 1 << given_data.draw(st.integers(0, 7))
    try:
        pixels, size = decode.decode_at_least(bytes(data), 10, 10, max_pixels=10_000)
    except SampleRejected as error:
        assert error.reason in ("format", "unreadable", "too_many_pixels")
    else:
        assert pixels.dtype == np.uint8 and pixels.ndim == 3 and size[0] * size[1] <= 10_000


def sixteen_bits(*channels: int, colour: int, before: bytes = b"") -> bytes:
    """A 2 x 2 PNG of one colour, 16 bits a channel."""
    row = b"\0" + struct.pack(f">{len(channels)}H", *channels) * 2
    return png(2, 2, depth=16, colour=colour, rows=zlib.compress(row * 2), before=before)


def test_sixteen_bits_a_channel():
    """Gray is rounded; of colour Pillow keeps the upper byte."""
    assert decode.decode(sixteen_bits(0x10FF, 0x8000, 0xFFFF, colour=2))[1, 1].tolist() == [16, 128, 255]
    assert decode.decode(sixteen_bits(0x10FF, 0x8000, 0, 0xFFFF, colour=6))[1, 1].tolist() == [16, 128, 0]
    assert decode.decode(sixteen_bits(0, 0, 0, 0, colour=6))[1, 1].tolist() == [255] * 3
    assert decode.decode(sixteen_bits(0, 0, colour=4))[1, 1].tolist() == [255] * 3
    assert decode.decode(sixteen_bits(0x10FF, colour=0))[1, 1].tolist() == [17] * 3


def test_one_transparent_gray_of_sixteen_bits_lies_over_white():
    transparent = chunk(b"tRNS", struct.pack(">H", 0x1234))
    assert decode.decode(sixteen_bits(0x1234, colour=0, before=transparent))[1, 1].tolist() == [255] * 3
    assert decode.decode(sixteen_bits(0x1334, colour=0, before=transparent))[1, 1].tolist() == [19] * 3


def test_partly_transparent_palettes_lie_over_white():
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 200, 100, 0])
    assert decode.decode(encode(image, transparency=b"\xff\x80"))[0, 0].tolist() == pytest.approx(
        [227, 177, 127], abs=1
    )


def test_an_animated_webp_gives_its_first_frame():
    frames = [Image.new("RGB", (8, 8), c) for c in ("red", "blue")]
    data = encode(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    assert decode.decode(data)[0, 0].tolist() == [255, 0, 0]


def webp_of_size(side: int) -> bytes:
    """A lossless WebP whose header promises up to 16384 x 16384."""
    data = bytearray(encode(Image.new("RGB", (8, 8)), "WEBP", lossless=True))
    at = data.index(b"VP8L") + 9  # 14 bits each of width - 1 and height - 1 follow the signature
    bits = int.from_bytes(data[at : at + 4], "little") >> 28 << 28 | (side - 1) << 14 | (side - 1)
    data[at : at + 4] = bits.to_bytes(4, "little")
    return bytes(data)


def jpeg_of_size(side: int) -> bytes:
    """A JPEG whose header promises up to 65535 x 65535."""
    data = bytearray(encode(Image.new("RGB", (8, 8)), "JPEG"))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", side, side)
    return bytes(data)


def real_png_bomb(side: int) -> bytes:
    """All the rows that its header promises, black: 1 bit a pixel, compressed a thousand times."""
    packer = zlib.compressobj(9)
    row = b"\0" * (1 + -(-side // 8))
    return png(side, side, depth=1, colour=0, rows=b"".join(packer.compress(row) for _ in range(side)) + packer.flush())


BOMBS = {
    "png": lambda: real_png_bomb(13_300),
    "webp": lambda: webp_of_size(16_000),
    "jpeg": lambda: jpeg_of_size(20_000),
}


@pytest.mark.parametrize("kind", BOMBS)
def test_a_pixel_bomb_costs_little_memory(kind):
    """In a process of its own, since the peak of this one may lie far above what it has now."""
    data = BOMBS[kind]()
    assert len(data) < 30_000
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as pool:
        reason, before, after = pool.submit(refused_at_a_cost, data).result()
    assert reason == "too_many_pixels"
    assert after - before < 50_000  # KiB


def refused_at_a_cost(data: bytes) -> tuple[str, int, int]:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        decode.decode_at_least(data, 256, 256)
    except SampleRejected as error:
        return error.reason, before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return "", before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def test_the_limit_holds_at_every_scale(reader):
    data = encode(Image.new("RGB", (200, 100)), "JPEG")
    assert decode.decode_at_least(data, 10, 10, max_pixels=20_000)[1] == (100, 200)
    with pytest.raises(SampleRejected) as caught:
        decode.decode_at_least(data, 10, 10, max_pixels=19_999)
    assert caught.value.reason == "too_many_pixels"


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
