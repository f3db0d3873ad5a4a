"""Finding records by what they were made from: exactly those, at any size."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from latentray.data.latent_plan import VARIANTS
from latentray.data.latent_reuse import Held, units_held

PICTURES = np.random.default_rng(0).integers(0, 256, (40, 32), dtype=np.uint8)
PICTURES[1, :8] = PICTURES[0, :8]  # two pictures whose digests begin alike
UNIT = st.tuples(st.integers(0, 39), st.integers(0, 3))
SHAPE = (64, 96)


def of(units: list[tuple[int, int]], shape: tuple[int, int] = SHAPE) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    shapes = np.tile(np.array(shape, np.int64), (len(units), 1))
    return PICTURES[[p for p, _ in units]].reshape(-1, 32), np.array([v for _, v in units], np.int64), shapes


@given(stored=st.lists(UNIT, max_size=60), asked=st.lists(UNIT, max_size=60))
def test_a_record_is_found_where_picture_and_variant_are_the_same(stored, asked):
    found = Held.of(*of(stored)).rows(*of(asked)).tolist()
    for unit, row in zip(asked, found, strict=True):
        clash = {0: 1, 1: 0}.get(unit[0])
        if row >= 0:
            assert stored[row] == unit
        elif (clash, unit[1]) not in stored:  # else 64 equal bits hide it, and it is encoded again
            assert unit not in stored


def test_units_of_a_data_set_are_looked_up_by_its_digests():
    held = Held.of(*of([(5, 0), (6, 2), (7, 0)]))
    units = np.array([0 * VARIANTS, 1 * VARIANTS + 2, 2 * VARIANTS + 1])
    shapes = np.tile(np.array(SHAPE), (3, 1))
    assert units_held(held, PICTURES[[7, 6, 5]], units, shapes).tolist() == [2, 1, -1]


def test_a_record_of_another_shape_is_none():
    units = [(5, 0), (6, 2)]
    held = Held.of(*of(units))
    assert held.rows(*of(units)).tolist() == [0, 1]
    assert held.rows(*of(units, (96, 64))).tolist() == [-1, -1]
