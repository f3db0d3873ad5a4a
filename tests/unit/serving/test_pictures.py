"""Pictures that clients send: transparency, masks, sizes."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from PIL import Image

from latentray.data import decode
from serving import pictures


def sent(image: Image.Image, kind: str = "PNG", **options) -> str:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return base64.b64encode(buffer.getvalue()).decode()


def noise(height: int, width: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


def test_an_opaque_picture_keeps_its_pixels():
    image = pictures.read(sent(Image.fromarray(noise(5, 7))))
    assert np.array_equal(pictures.opaque(image), noise(5, 7)) and pictures.transparent(image) is None


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_transparency_lies_over_white_as_in_training(kind):
    text = sent(Image.fromarray(noise(6, 6, 4), "RGBA"), kind, **({"lossless": True} if kind == "WEBP" else {}))
    assert np.array_equal(pictures.opaque(pictures.read(text)), decode.decode(base64.b64decode(text)))


def test_a_picture_is_read_upright():
    exif = Image.Exif()
    exif[0x0112] = 6
    assert pictures.read(sent(Image.fromarray(noise(4, 8)), exif=exif)).size == (4, 8)


def test_sixteen_bits_are_refused_and_not_cut_off():
    with pytest.raises(ValueError, match="16 bits"):
        pictures.read(sent(Image.fromarray(np.full((4, 4), 40_000, np.uint16))))


def test_a_mask_paints_where_it_is_transparent_and_if_nowhere_where_it_is_light():
    left = np.zeros((4, 6), bool)
    left[:, :3] = True
    gray = Image.fromarray(np.where(left, 255, 0).astype(np.uint8))
    alpha = np.concatenate([noise(4, 6), np.where(left, 0, 255).astype(np.uint8)[..., None]], -1)
    whole = Image.merge("RGBA", [gray, gray, gray, Image.new("L", gray.size, 255)])
    for mask in (gray, Image.fromarray(alpha, "RGBA"), whole, gray.convert("1"), gray.convert("P")):
        assert np.array_equal(pictures.painted(pictures.read(sent(mask))), left)


@pytest.mark.parametrize(("height", "width"), [(8, 8), (16, 8), (4, 12)])
def test_fitting_is_what_training_does(height, width):
    pixels = noise(16, 24)
    ours = pictures.fitted(pixels, width, height).astype(int)
    assert abs(ours - decode.to_size(pixels, height, width)).max() <= 1
    assert pictures.fitted(pixels, 24, 16) is pixels
