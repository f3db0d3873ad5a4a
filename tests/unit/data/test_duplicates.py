"""Duplicates: a copy is found whatever was done to it, and pictures that differ are kept."""

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from latentray.data import duplicates


def picture(seed: int, size: int = 160) -> Image.Image:
    """A smooth picture with some detail, as photographs have."""
    generator = np.random.default_rng(seed)
    layers = [
        np.asarray(
            Image.fromarray(generator.integers(0, 256, (k, k, 3), dtype=np.uint8)).resize((size, size), 3), float
        )
        for k in (4, 9, 30)
    ]
    return Image.fromarray(np.clip(layers[0] * 0.6 + layers[1] * 0.3 + layers[2] * 0.1, 0, 255).astype(np.uint8))


def recompressed(image: Image.Image, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer).convert("RGB")


def flags(images, distance: int = 3) -> list[bool]:
    looks = [duplicates.look(np.asarray(image)) for image in images]
    hashes, colours = np.array([h for h, _ in looks], np.uint64), np.array([c for _, c in looks], np.uint8)
    return duplicates.near(hashes, colours, distance).tolist()


@pytest.mark.parametrize("seed", range(8))
def test_a_recompressed_resized_or_brightened_copy_is_found(seed):
    original = picture(seed)
    copies = [
        recompressed(original, 70),
        original.resize((97, 97), Image.Resampling.LANCZOS),
        recompressed(original.resize((320, 320), Image.Resampling.BICUBIC), 80),
        original.point(lambda v: min(v + 3, 255)),
    ]
    assert flags([original, *copies]) == [False, True, True, True, True]


def test_pictures_that_differ_are_kept():
    assert not any(flags([picture(seed) for seed in range(60)]))


def test_one_shape_in_two_colours_is_two_pictures():
    red, blue = (Image.new("RGB", (64, 64), colour) for colour in ("red", "blue"))
    assert flags([red, blue, red.resize((50, 50)), recompressed(blue, 70)]) == [False, False, True, True]


def test_mirrored_and_turned_pictures_are_kept():
    image = picture(3)
    assert not any(flags([image, image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), image.rotate(90)]))


@settings(deadline=None)
@given(st.lists(st.integers(0, 5), max_size=30))
def test_exact_duplicates_are_the_later_ones(values):
    rows = np.array([[value] * 16 for value in values], np.uint8).reshape(-1, 16)
    assert duplicates.exact(rows).tolist() == [value in values[:i] for i, value in enumerate(values)]


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 63), st.integers(0, 63), st.integers(0, 20)), max_size=25),
    st.integers(0, 7),
)
def test_bands_miss_no_pair_that_is_near(rows, distance):
    """Against all pairs: hashes of a few centres with up to two flipped bits, and colours near the limit."""
    centres = [0, 0xFFFF, 0xF0F0F0F0F0F0F0F0, 2**64 - 1]
    hashes = np.array([centres[c] ^ (1 << a) ^ (1 << b) for c, a, b, _ in rows], np.uint64)
    colours = np.array([(shade, 0, 0) for *_, shade in rows], np.uint8).reshape(-1, 3)
    expected = [
        any(
            (int(hashes[i]) ^ int(hashes[j])).bit_count() <= distance
            and abs(int(colours[i, 0]) - int(colours[j, 0])) <= duplicates._COLOUR_LEVELS
            for j in range(i)
        )
        for i in range(len(rows))
    ]
    assert duplicates.near(hashes, colours, distance).tolist() == expected


def test_a_hundred_thousand_hashes_take_moments():
    generator = np.random.default_rng(0)
    hashes = generator.integers(0, 2**64, 100_000, dtype=np.uint64)
    hashes[50_000] = hashes[7] ^ np.uint64(0b111)
    colours = np.zeros((100_000, 3), np.uint8)
    assert np.flatnonzero(duplicates.near(hashes, colours, 3)).tolist() == [50_000]
