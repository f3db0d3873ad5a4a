"""The order: a bijection, every sample once an epoch, the same for any number of ranks and workers."""

import collections
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latentray.data.ordering import Cursor, Order, chi
from latentray.errors import ConfigError, FingerprintMismatch

sizes = st.integers(1, 400)
seeds = st.integers(0, 2**63)


@settings(max_examples=25, deadline=None)
@given(n=sizes, key=st.integers(0, 2**64 - 1))
def test_chi_is_a_bijection(n, key):
    assert sorted(chi(np.arange(n, dtype=np.uint64), n, key).tolist()) == list(range(n))


def test_chi_is_a_bijection_of_many():
    x = chi(np.arange(200_003, dtype=np.uint64), 200_003, 99)
    assert len(np.unique(x)) == 200_003
    assert x.max() == 200_002


def test_chi_mixes():
    n = 100_000
    x = chi(np.arange(n, dtype=np.uint64), n, 5).astype(np.float64)
    assert abs(np.corrcoef(np.arange(n), x)[0, 1]) < 0.015
    assert abs(np.corrcoef(x[:-1], x[1:])[0, 1]) < 0.015
    counts = np.histogram(x[: n // 10], bins=100, range=(0, n))[0]  # a tenth of the epoch, 100 per bin expected
    assert ((counts - 100) ** 2 / 100).sum() < 160  # chi-square, 99 degrees of freedom


@settings(max_examples=15, deadline=None)
@given(n=sizes, seed=seeds, batch=st.integers(1, 64))
def test_each_sample_exactly_once_per_epoch(n, seed, batch):
    order = Order(n, seed, batch)
    steps = -(-3 * n // batch)
    line = list(itertools.chain.from_iterable(order.step(k) for k in range(steps)))
    for epoch in range(3):
        assert sorted(i.index for i in line if i.epoch == epoch) == list(range(n))
    assert [i.epoch for i in line] == sorted(i.epoch for i in line)


@settings(max_examples=15, deadline=None)
@given(n=st.integers(8, 300), seed=seeds, batch=st.integers(1, 8))
def test_drop_mode_has_whole_steps_of_one_epoch_without_repetition(n, seed, batch):
    order = Order(n, seed, batch, drop_remainder=True)
    steps = n // batch
    assert order.steps_in(1) == steps
    for epoch in range(2):
        ids = [i for k in range(epoch * steps, (epoch + 1) * steps) for i in order.step(k)]
        assert {i.epoch for i in ids} == {epoch} == {order.epoch_of(epoch * steps)}
        assert len({i.index for i in ids}) == steps * batch


@settings(max_examples=15, deadline=None)
@given(n=sizes, seed=seeds, step=st.integers(0, 10**9), batch=st.sampled_from([6, 12, 24]))
def test_any_world_size_sees_the_same_step(n, seed, step, batch):
    order = Order(n, seed, batch)
    whole = order.step(step)
    assert [order.sample(step * batch + i) for i in range(batch)] == whole
    for world in (1, 2, 3, 6):
        assert [i for rank in range(world) for i in order.share(step, rank, world)] == whole


def test_epochs_and_seeds_differ():
    order = Order(1000, 0, 1000)
    first, second = order.step(0), order.step(1)
    assert collections.Counter(i.index for i in first) == collections.Counter(i.index for i in second)
    same = sum(a.index == b.index for a, b in zip(first, second, strict=True))
    assert same < 10
    assert [i.index for i in Order(1000, 1, 1000).step(0)] != [i.index for i in first]


def test_a_world_that_does_not_divide_is_refused_with_the_divisors():
    with pytest.raises(ConfigError) as caught:
        Order(100, 0, 12).share(0, 0, 5)
    assert "1, 2, 3, 4, 6, 12" in caught.value.mend


@pytest.mark.parametrize("arguments", [(0, 0, 4), (10, 0, 0), (3, 0, 4, True)])
def test_impossible_orders_are_refused(arguments):
    with pytest.raises(ConfigError):
        Order(*arguments)


def test_cursor_round_trip_and_refusal():
    order = Order(10, 7, 4)
    cursor = order.cursor(6, "digest")
    assert cursor.epoch == 2
    again = Cursor.from_dict(cursor.to_dict())
    assert order.resume(again, "digest") == 6
    for other, digest in ((Order(10, 8, 4), "digest"), (Order(10, 7, 2), "digest"), (order, "other")):
        with pytest.raises(FingerprintMismatch):
            other.resume(again, digest)
