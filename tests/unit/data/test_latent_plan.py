"""Units, parts and cuts: nothing is lost or done twice, and a cut is where the same picture has it elsewhere."""

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latentray.data import decode, latent_plan
from latentray.data.latent_plan import Gathering, Part, Shapes, cut, parts_of, units_of, variants
from latentray.errors import ConfigError


def test_a_variant_keeps_its_number_whatever_else_is_stored():
    assert variants(1, False) == (0,)
    assert variants(1, True) == (0, 1)
    assert variants(3, False) == (0, 2, 4)
    assert set(variants(2, False)) < set(variants(2, True)) < set(variants(3, True))
    assert max(variants(32, True)) < latent_plan.VARIANTS


@settings(deadline=None)
@given(
    rows=st.integers(0, 40),
    crops=st.integers(1, 3),
    flips=st.booleans(),
    batch=st.integers(1, 20),
    held=st.integers(0, 2**32 - 1),
    stores=st.integers(1, 2),
    buckets=st.integers(1, 4),
)
def test_every_unit_is_in_one_part_and_parts_are_of_one_shape_and_full_but_the_last(
    rows, crops, flips, batch, held, stores, buckets
):
    units = units_of(range(5, 5 + rows), variants(crops, flips))
    random = np.random.default_rng(held)
    older, bucket = random.integers(-1, 3, (len(units), stores)), random.integers(0, buckets, len(units))
    parts = parts_of(0, 7, units, bucket, older, batch)
    assert [part.number for part in parts] == list(range(len(parts))) and parts
    assert sorted(np.concatenate([part.units for part in parts]).tolist()) == units.tolist()
    reused = [part for part in parts if len(part.older)]
    for several in ([part for part in parts if not len(part.older)], reused):
        assert [part.bucket for part in several] == sorted(part.bucket for part in several)
        for number in range(buckets):
            mine = [part for part in several if part.bucket == number]
            assert all(len(part.units) == batch for part in mine[:-1])
            joined = np.concatenate([np.empty(0, np.int64), *(part.units for part in mine)])
            assert (np.diff(joined) > 0).all() and set(bucket[np.isin(units, joined)].tolist()) <= {number}
    known = {unit: row.tolist() for unit, row in zip(units.tolist(), older, strict=True) if min(row) >= 0}
    assert {u: r.tolist() for part in reused for u, r in zip(part.units.tolist(), part.older, strict=True)} == known
    for part in parts:
        again = Part.from_row(part.to_row(), stores=stores)
        assert (again.shard, again.number, again.bucket) == (7, part.number, part.bucket)
        np.testing.assert_array_equal(again.units, part.units)
        np.testing.assert_array_equal(again.older, part.older)


def test_the_fill_of_batches_counts_what_is_no_padding():
    units, zeros = np.arange(10), np.zeros(10, np.int64)
    older = np.full((10, 1), -1)
    assert latent_plan.fill(parts_of(0, 0, units, zeros, older, 4), 1, 4) == 10 / 12
    assert latent_plan.fill(parts_of(0, 0, units, zeros, older, 1), 6, 4) == 60 / 80
    assert latent_plan.fill(parts_of(0, 0, units, units % 5, older, 4), 1, 4) == 10 / 20
    assert latent_plan.fill(parts_of(0, 0, units[:0], zeros[:0], older[:0], 4), 1, 4) == 0


@settings(deadline=None)
@given(
    order=st.permutations([(shard, number) for shard in range(3) for number in range(shard + 1)]), twice=st.booleans()
)
def test_a_shard_is_complete_once_and_with_its_last_part(order, twice):
    gathering = Gathering({(0, shard): shard + 1 for shard in range(3)})
    complete = {}
    arrivals = [one for pair in order for one in ([pair, pair] if twice else [pair])]
    for at, (shard, number) in enumerate(arrivals):
        names = gathering.arrived((0, shard), number, f"{shard}.{number}")
        if names is not None:
            assert shard not in complete
            complete[shard] = at
            assert names == [f"{shard}.{k}" for k in range(shard + 1)]
            assert {pair for pair in arrivals[: at + 1] if pair[0] == shard} == {(shard, k) for k in range(shard + 1)}
    assert set(complete) == {0, 1, 2}


def picture(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height * width).integers(0, 255, (height, width, 3), dtype=np.uint8)


@settings(deadline=None)
@given(height=st.integers(8, 60), width=st.integers(8, 60), shape=st.tuples(st.integers(8, 40), st.integers(8, 40)))
def test_the_first_cut_is_the_centre_that_training_takes(height, width, shape):
    pixels = picture(height, width)
    plain, flipped = (cut(pixels, (height, width), shape, number, b"0" * 32) for number in (0, 1))
    np.testing.assert_array_equal(plain.pixels, decode.to_size(pixels, *shape))
    np.testing.assert_array_equal(flipped.pixels, plain.pixels[:, ::-1])
    assert plain.conditioning.original_size == (height, width)
    assert plain.conditioning.target_size == flipped.conditioning.target_size == shape


@settings(deadline=None)
@given(words=st.lists(st.binary(min_size=32, max_size=32), min_size=1, max_size=20, unique=True))
def test_further_cuts_belong_to_the_picture_and_stay_inside(words):
    pixels = picture(16, 48)
    for digest in words:
        numbers = variants(4, True)
        found = {number: cut(pixels, (16, 48), (16, 16), number, digest) for number in numbers}
        for number, one in found.items():
            top, left = one.conditioning.crop_top_left
            assert top == 0 and 0 <= left <= 32
            seen = pixels[:, ::-1] if number % 2 else pixels
            np.testing.assert_array_equal(one.pixels, seen[:, left : left + 16])


def test_cuts_are_spread_over_the_longer_side():
    digests = [hashlib.sha256(bytes([i])).digest() for i in range(200)]
    lefts = [cut(picture(8, 18), (8, 18), (8, 8), 2, one).conditioning.crop_top_left[1] for one in digests]
    counts = np.bincount(lefts, minlength=11)
    assert len(counts) == 11 and counts.min() >= 6 and counts.max() <= 36  # expected 18.2 each, within 4.5 deviations


@settings(deadline=None)
@given(
    frames=st.integers(1, 4), height=st.integers(8, 40), width=st.integers(8, 40),
    shape=st.tuples(st.integers(8, 24), st.integers(8, 24)), number=st.integers(0, 5), word=st.binary(min_size=32, max_size=32),
)  # fmt: skip
def test_the_frames_of_a_clip_are_cut_alike(frames, height, width, shape, number, word):
    clip = np.stack([picture(height, width) // (t + 1) for t in range(frames)])
    whole = cut(clip, (height, width), shape, number, word)
    assert whole.pixels.shape == (frames, *shape, 3)
    for t in range(frames):
        one = cut(clip[t], (height, width), shape, number, word)
        np.testing.assert_array_equal(whole.pixels[t], one.pixels)
        assert one.conditioning == whole.conditioning


def test_a_clip_starts_first_at_its_beginning_and_then_where_it_is_drawn():
    digests = [hashlib.sha256(bytes([i])).digest() for i in range(200)]
    assert {latent_plan.start(number, one) for one in digests for number in (0, 1)} == {0.0}
    drawn = np.array([[latent_plan.start(number, one) for number in (2, 3, 4)] for one in digests])
    assert (drawn[:, 0] == drawn[:, 1]).all() and (drawn[:, 0] != drawn[:, 2]).all()  # a mirror shows the same frames
    assert drawn.min() >= 0 and drawn.max() < 1 and abs(drawn[:, 0].mean() - 0.5) < 0.1


@settings(deadline=None)
@given(pictures=st.lists(st.tuples(st.integers(1, 900), st.integers(1, 900)), min_size=1, max_size=20))
def test_a_picture_gets_the_nearest_aspect_of_the_greatest_resolution_it_fills(pictures):
    shapes = Shapes.of([128, 256], step=64, max_aspect=2.0)
    sides = {shape: one.size for one in shapes.table for shape in [(one.height, one.width)]}
    assert list(shapes.all) == sorted(set(shapes.all))
    for (height, width), number in zip(pictures, shapes.assign(*np.array(pictures).T[::-1]).tolist(), strict=True):
        chosen = shapes.all[number]
        size = 256 if height * width >= 256 * 256 else 128
        distances = {
            shape: abs(np.log(shape[1] / shape[0] * height / width)) for shape in shapes.all if sides[shape] == size
        }
        assert sides[chosen] == size and distances[chosen] <= min(distances.values()) + 1e-9


def test_shapes_that_two_resolutions_share_are_one_and_too_many_are_refused():
    alone = [set(Shapes.of([size], step=8, max_aspect=2.0).all) for size in (64, 72)]
    both = Shapes.of([64, 72], step=8, max_aspect=2.0)
    assert set(both.all) == alone[0] | alone[1] and len(both.table) == len(alone[0]) + len(alone[1])
    with pytest.raises(ConfigError, match="more than 256"):
        Shapes.of([512, 768], step=2, max_aspect=2.0)
