"""Keyed bijections: every value once, for one key or a key per element, and well mixed."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from latentray.data.permutation import chi, mixed
from latentray.randomness import mix


@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 400), key=st.integers(0, 2**64 - 1))
def test_chi_is_a_bijection(n, key):
    assert sorted(chi(np.arange(n), n, key).tolist()) == list(range(n))


def test_chi_is_a_bijection_of_many():
    x = chi(np.arange(200_003), 200_003, 99)
    assert len(np.unique(x)) == 200_003
    assert x.max() == 200_002


@settings(max_examples=10, deadline=None)
@given(n=st.integers(1, 60), keys=st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=4))
def test_a_key_per_element_gives_what_each_key_gives_alone(n, keys):
    u, of = np.meshgrid(np.arange(n), np.array(keys, dtype=np.uint64))
    together = chi(u.ravel(), n, of.ravel()).reshape(len(keys), n)
    for row, key in zip(together, keys, strict=True):
        assert row.tolist() == chi(np.arange(n), n, key).tolist()


def test_chi_mixes():
    n = 100_000
    x = chi(np.arange(n), n, 5).astype(np.float64)
    assert abs(np.corrcoef(np.arange(n), x)[0, 1]) < 0.015
    assert abs(np.corrcoef(x[:-1], x[1:])[0, 1]) < 0.015
    counts = np.histogram(x[: n // 10], bins=100, range=(0, n))[0]  # a tenth of the epoch, 100 per bin expected
    assert ((counts - 100) ** 2 / 100).sum() < 160  # chi-square, 99 degrees of freedom


@given(words=st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=4))
def test_the_array_hash_is_the_hash_of_single_words(words):
    assert int(mixed(*words)) == mix(*words)
