"""Units, parts and cuts: nothing is lost or done twice, and a cut is where the same picture has it elsewhere."""

import hashlib

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from latentray.data import decode, latent_plan
from latentray.data.latent_plan import Gathering, Part, parts_of, squares, units_of, variants


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
    sizes=st.integers(1, 2),
)
def test_every_unit_is_in_one_part_and_parts_are_full_but_the_last(rows, crops, flips, batch, held, sizes):
    units = units_of(range(5, 5 + rows), variants(crops, flips))
    older = np.random.default_rng(held).integers(-1, 3, (len(units), sizes))
    parts = parts_of(0, 7, units, older, batch)
    assert [part.number for part in parts] == list(range(len(parts))) and parts
    assert sorted(np.concatenate([part.units for part in parts]).tolist()) == units.tolist()
    reused = [part for part in parts if len(part.older)]
    for several in ([part for part in parts if not len(part.older)], reused):
        assert all(len(part.units) == batch for part in several[:-1])
        assert all((np.diff(part.units) > 0).all() for part in several)
    known = {unit: row.tolist() for unit, row in zip(units.tolist(), older, strict=True) if min(row) >= 0}
    assert {u: r.tolist() for part in reused for u, r in zip(part.units.tolist(), part.older, strict=True)} == known
    for part in parts:
        again = Part.from_row(part.to_row(), sizes=sizes)
        assert (again.shard, again.number) == (7, part.number)
        np.testing.assert_array_equal(again.units, part.units)
        np.testing.assert_array_equal(again.older, part.older)


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
@given(height=st.integers(8, 60), width=st.integers(8, 60), size=st.integers(8, 40))
def test_the_first_cut_is_the_centre_that_training_takes(height, width, size):
    pixels = picture(height, width)
    plain, flipped = squares(pixels, (height, width), size, (0, 1), b"0" * 32)
    np.testing.assert_array_equal(plain.pixels, decode.to_square(pixels, size))
    np.testing.assert_array_equal(flipped.pixels, plain.pixels[:, ::-1])
    assert plain.conditioning.original_size == (height, width)
    assert plain.conditioning.target_size == flipped.conditioning.target_size == (size, size)


@settings(deadline=None)
@given(words=st.lists(st.binary(min_size=32, max_size=32), min_size=1, max_size=20, unique=True))
def test_further_cuts_belong_to_the_picture_and_stay_inside(words):
    pixels = picture(16, 48)
    for digest in words:
        numbers = variants(4, True)
        found = dict(zip(numbers, squares(pixels, (16, 48), 16, numbers, digest), strict=True))
        for number, one in found.items():
            top, left = one.conditioning.crop_top_left
            assert top == 0 and 0 <= left <= 32
            seen = pixels[:, ::-1] if number % 2 else pixels
            np.testing.assert_array_equal(one.pixels, seen[:, left : left + 16])
        (alone,) = squares(pixels, (16, 48), 16, (4,), digest)
        assert alone.conditioning == found[4].conditioning


def test_cuts_are_spread_over_the_longer_side():
    digests = [hashlib.sha256(bytes([i])).digest() for i in range(200)]
    lefts = [squares(picture(8, 18), (8, 18), 8, (2,), one)[0].conditioning.crop_top_left[1] for one in digests]
    counts = np.bincount(lefts, minlength=11)
    assert len(counts) == 11 and counts.min() >= 6 and counts.max() <= 36  # expected 18.2 each, within 4.5 deviations
