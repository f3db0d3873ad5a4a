"""Transforms: the crop that was asked for at the place that is told, and every draw as likely as it should be."""

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from latentray.data import transforms
from latentray.data.transforms import Augment, Draws
from latentray.errors import ConfigError
from latentray.randomness import Purpose, keys_of, uniform
from latentray.records import SampleId

IDS = [SampleId(epoch=0, dataset=0, index=i) for i in range(400)]
unit = st.floats(0, 1, exclude_max=True, width=32)


def ramp(height: int, width: int) -> np.ndarray:
    """Red grows to the right, green downwards, both from 0 to 255: a pixel tells where it is from."""
    y, x = np.mgrid[:height, :width]
    stacked = [(x + 0.5) * 255 / width, (y + 0.5) * 255 / height, np.zeros_like(x)]
    return np.rint(np.stack(stacked, -1)).astype(np.uint8)


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)


def some_draws(**changed) -> Draws:
    return Draws(**({"crop": (0.0, 0.0), "flip": 0.9, "caption": 0.0, "tags": 1} | changed))


sizes = st.integers(1, 90)


@settings(max_examples=60, deadline=None)
@given(
    have=st.tuples(sizes, sizes),
    want=st.tuples(sizes, sizes),
    u=st.tuples(unit, unit),
    crop=st.sampled_from(["centre", "random"]),
)
def test_a_crop_has_its_size_and_lies_inside(have, want, u, crop):
    pixels, (y, x) = transforms.resized_crop(noise(*have), *want, crop=crop, u=u)
    assert pixels.shape == (*want, 3) and pixels.dtype == np.uint8
    height, width = transforms.covering_size(have, *want)
    assert 0 <= y <= height - want[0] and 0 <= x <= width - want[1]
    assert height == want[0] or width == want[1]


@pytest.mark.parametrize("have", [(64, 64), (100, 64), (64, 100), (333, 517), (341, 258), (40, 90), (700, 500)])
@pytest.mark.parametrize("want", [(64, 64), (30, 100), (100, 30)])
@pytest.mark.parametrize("u", [(0.0, 0.0), (0.37, 0.81), (0.999, 0.999)])
def test_only_the_crop_is_computed_and_nothing_differs(have, want, u):
    """Resizing all and cutting then is the definition; the box of Pillow's resize must give the same.

    To the two roundings, one after each axis, and with values that no overshoot of Lanczos takes out of 0 to 255: Pillow
    chooses which axis goes first by the sizes, and clips after each.
    """
    source = 64 + noise(*have) // 2
    got, (y, x) = transforms.resized_crop(source, *want, crop="random", u=u)
    height, width = transforms.covering_size(have, *want)
    whole = np.asarray(Image.fromarray(source).resize((width, height), Image.Resampling.LANCZOS))
    assert np.abs(whole[y : y + want[0], x : x + want[1]].astype(int) - got).max() <= 2


def test_the_coordinates_say_where_the_crop_is_from():
    pixels, (y, x) = transforms.resized_crop(ramp(300, 600), 64, 64, crop="random", u=(0.5, 0.6))
    assert (y, x) == (0, int(0.6 * 65))
    right, down = pixels[32, 32, :2] / 255 * (128, 64)  # back to the resized picture's coordinates
    assert right == pytest.approx(x + 32.5, abs=0.6)
    assert down == pytest.approx(y + 32.5, abs=0.6)


def test_a_picture_of_the_right_size_keeps_its_pixels():
    source = noise(64, 80)
    pixels, place = transforms.resized_crop(source, 64, 64)
    assert place == (0, 8)
    np.testing.assert_array_equal(pixels, source[:, 8:72])


def test_every_place_of_a_crop_is_equally_likely():
    source = np.zeros((8, 11, 3), np.uint8)
    draws = [d.crop for d in transforms.draws_of(3, [SampleId(epoch=0, dataset=0, index=i) for i in range(4000)])]
    found = Counter(transforms.resized_crop(source, 8, 8, crop="random", u=u)[1][1] for u in draws)
    assert sorted(found) == [0, 1, 2, 3]
    assert max(abs(n - 1000) for n in found.values()) < 5 * np.sqrt(4000 * 3 / 16)


@settings(max_examples=40, deadline=None)
@given(size=st.tuples(st.integers(64, 2000), st.integers(64, 2000)), eighths=st.integers(1, 8), u=st.tuples(unit, unit))
def test_the_crop_is_the_same_whatever_scale_the_picture_was_decoded_at(size, eighths, u):
    scaled = [-(-side * eighths // 8) for side in size]
    if min(scaled) < 32:
        return
    _, whole = transforms.resized_crop(np.broadcast_to(np.uint8(0), (*size, 3)), 32, 32, crop="random", u=u)
    part = np.zeros((*scaled, 3), np.uint8)
    assert transforms.resized_crop(part, 32, 32, crop="random", u=u, original_size=size)[1] == whole


def test_mirroring_comes_before_cropping():
    source, (height, width) = noise(64, 150), (64, 64)
    cut, place = source[:, 20:84], (0, 20)
    pixels, (y, x) = transforms.mirrored(cut, place, 150)
    np.testing.assert_array_equal(pixels, source[:, ::-1][y : y + height, x : x + width])
    again, back = transforms.mirrored(pixels, (y, x), 150)
    np.testing.assert_array_equal(again, cut)
    assert back == place


@given(n=st.integers(1, 9), u=unit)
def test_a_caption_is_one_of_those_given(n, u):
    texts = [str(i) for i in range(n)]
    assert transforms.caption(texts, u) == texts[int(u * n)]


def test_captions_are_equally_likely():
    found = Counter(transforms.caption("abcd", d.caption) for d in transforms.draws_of(0, IDS))
    assert max(abs(n - 100) for n in found.values()) < 5 * np.sqrt(400 * 3 / 16)


words = st.text(
    st.characters(codec="utf-8", exclude_characters=",", exclude_categories=["Z", "C"]), min_size=1, max_size=5
)


@given(tags=st.lists(words, max_size=12), keep=st.integers(0, 14), key=st.integers(-(2**63), 2**63 - 1))
def test_shuffled_tags_are_the_same_tags(tags, keep, key):
    text = ", ".join(tags)
    shuffled = transforms.shuffle_tags(text, key=key, keep_first=keep).split(", ")
    assert sorted(shuffled) == sorted(text.split(", "))
    assert shuffled[:keep] == text.split(", ")[:keep]
    assert transforms.shuffle_tags(text, key=key, keep_first=keep) == ", ".join(shuffled)


def test_every_order_of_tags_is_equally_likely():
    keys = keys_of(0, Purpose.TAGS, [SampleId(epoch=0, dataset=0, index=i) for i in range(2400)]).tolist()
    found = Counter(transforms.shuffle_tags("x, a, b, c, d", key=key, keep_first=1) for key in keys)
    assert set(found) == {"x, " + ", ".join(order) for order in itertools.permutations("abcd")}
    assert max(abs(n - 100) for n in found.values()) < 5 * np.sqrt(100)


def test_tags_are_tidied_and_a_sentence_is_left_alone():
    assert transforms.shuffle_tags("a cat on a mat.  ", key=5) == "a cat on a mat.  "
    assert transforms.shuffle_tags(" a,,b ,", key=5, keep_first=2) == " a,,b ,"
    assert sorted(transforms.shuffle_tags("a|| b|c d", key=5, separator="|").split("| ")) == ["a", "b", "c d"]


def test_draws_belong_to_the_sample():
    together = transforms.draws_of(7, IDS)
    assert transforms.draws_of(7, IDS[5:6]) == together[5:6]
    assert len({d.crop for d in together}) == len({d.tags for d in together}) == len(IDS)
    later = transforms.draws_of(7, [SampleId(epoch=1, dataset=0, index=5)])[0]
    assert later.crop != together[5].crop and later.tags != together[5].tags
    flips = uniform(keys_of(7, Purpose.FLIP, IDS))
    assert [d.flip for d in together] == flips.tolist()


def test_size_conditioning_is_in_the_order_the_network_reads():
    told = transforms.SizeConditioning(original_size=(768, 1024), crop_top_left=(3, 40), target_size=(512, 640))
    assert told.numbers() == (768, 1024, 3, 40, 512, 640)


def test_augmenting_a_picture_tells_what_was_done():
    source, augment = ramp(300, 600), Augment(crop="random", flip=True)
    plain, told = augment.picture(source, 64, 64, draws=some_draws(crop=(0.0, 0.9)), original_size=(600, 1200))
    assert told.numbers() == (600, 1200, 0, int(0.9 * 65), 64, 64)
    turned, told = augment.picture(
        source, 64, 64, draws=some_draws(crop=(0.0, 0.9), flip=0.1), original_size=(600, 1200)
    )
    assert told.crop_top_left == (0, 64 - int(0.9 * 65))
    np.testing.assert_array_equal(turned, plain[:, ::-1])
    still, _ = Augment().picture(source, 64, 64, draws=some_draws(flip=0.0), original_size=(600, 1200))
    np.testing.assert_array_equal(still, transforms.resized_crop(source, 64, 64)[0])


def test_augmenting_a_caption():
    texts, draws = ["a, b, c, d, e", "z"], some_draws(caption=0.2, tags=12)
    assert Augment().text(texts, draws) == texts[0]
    shuffled = Augment(shuffle_tags=True, keep_tags=2).text(texts, draws)
    assert shuffled.startswith("a, b, ") and sorted(shuffled) == sorted(texts[0])
    assert Augment(shuffle_tags=True).text(texts, some_draws(caption=0.7)) == "z"


@pytest.mark.parametrize(("field", "wrong"), [("crop", "left"), ("keep_tags", -1)])
def test_wrong_settings_are_refused(field, wrong):
    with pytest.raises(ConfigError) as caught:
        Augment(**{field: wrong})
    assert caught.value.where == f"augment.{field}"
