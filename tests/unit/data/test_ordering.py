"""The order: every sample once an epoch, the same for any number of ranks and workers, from any step, through any resume."""

import collections
import dataclasses
import json
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latentray.data.lines import _SHIFT, Reading
from latentray.data.ordering import Cursor, Order, Whole, require_divides
from latentray.data.permutation import mixed
from latentray.errors import ConfigError, FingerprintMismatch

seeds = st.integers(0, 2**63)
readings = st.builds(Reading, chunk=st.integers(1, 8), depth=st.integers(1, 16))


@dataclasses.dataclass(frozen=True)
class Buckets:
    """A data set whose sample x is of bucket x mod len(counts), as far as counts go."""

    counts: tuple[int, ...]

    @property
    def identity(self):
        return {"counts": self.counts}

    def index(self, bucket, ordinals):
        return ordinals * len(self.counts) + bucket


def ids_of(order: Order, first: int, last: int) -> list:
    return [i for t in range(first, last) for i in order.step(t).ids]


def indices(ids, epoch: int, dataset: int = 0) -> list[int]:
    return sorted(i.index for i in ids if (i.epoch, i.dataset) == (epoch, dataset))


@settings(max_examples=12, deadline=None)
@given(n=st.integers(1, 200), seed=seeds, batch=st.integers(1, 48), reading=readings)
def test_each_sample_exactly_once_an_epoch(n, seed, batch, reading):
    order = Order.of(n, seed, batch, reading=reading)
    ids = ids_of(order, 0, -(-(4 * n + batch) // batch))  # an epoch's tail is read in the next one's first rows
    for epoch in range(3):
        assert indices(ids, epoch) == list(range(n))


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(1, 400),
    seed=seeds,
    step=st.integers(0, 10**9),
    batch=st.sampled_from([6, 12, 24]),
    streams=st.sampled_from([1, 3, 6, None]),
    reading=readings,
)
def test_any_world_and_any_workers_see_the_same_step(n, seed, step, batch, streams, reading):
    order = Order.of(n, seed, batch, reading=dataclasses.replace(reading, streams=streams))
    whole = order.step(step).ids
    assert len(whole) == batch
    for parts in (1, 2, 3, 6, 5, 64):
        assert [i for part in range(parts) for i in order.part(step, part, parts).ids] == whole


def test_a_rank_reads_its_own_streams_only():
    order = Order.of(64_000, 3, 64, reading=Reading(chunk=8, depth=4, streams=32))
    turn = int(mixed(order._line(0, 0).key, 0, _SHIFT)) % 64_000  # where the epoch's chunks begin
    read = [set(), set()]
    for t in range(order.steps_in(1)):
        for rank in range(2):
            read[rank] |= {(i.index - turn) % 64_000 // 8 for i in order.part(t, rank, 2).ids}
    assert len(read[0] | read[1]) == 8000
    assert len(read[0] & read[1]) <= 32  # a chunk where one stream ends and the next begins


def test_epochs_and_seeds_differ():
    order = Order.of(1000, 0, 1000)
    first, second = order.step(0).ids, order.step(1).ids
    assert collections.Counter(i.index for i in first) == collections.Counter(i.index for i in second)
    assert sum(a.index == b.index for a, b in zip(first, second, strict=True)) < 10
    assert [i.index for i in Order.of(1000, 1, 1000).step(0).ids] != [i.index for i in first]


def test_the_remainder_is_dropped_by_setting_and_counted():
    kept, dropped = (Order.of(103, 0, 10, reading=Reading(drop_remainder=d)) for d in (False, True))
    assert (kept.dropped_per_epoch, dropped.dropped_per_epoch) == (0, 3)
    assert (kept.steps_in(1), dropped.steps_in(1), kept.steps_in(10), dropped.steps_in(10)) == (10, 10, 103, 100)
    assert [len(set(indices(ids_of(dropped, 10 * e, 10 * e + 10), e))) for e in range(3)] == [100, 100, 100]
    assert [dropped.epoch_of(t) for t in (0, 9, 10, 29)] == [0, 0, 1, 2]


# ---- buckets


@settings(max_examples=10, deadline=None)
@given(
    counts=st.lists(st.integers(0, 60), min_size=2, max_size=4).filter(sum),
    seed=seeds,
    sizes=st.lists(st.integers(1, 9), min_size=4, max_size=4),
    reading=readings,
)
def test_each_sample_of_each_bucket_exactly_once_an_epoch(counts, seed, sizes, reading):
    order = Order((Buckets(tuple(counts)),), seed, tuple(sizes[: len(counts)]), reading)
    taken, t, ids = collections.Counter(), 0, []
    while order.epoch_of(t) < 5 and t < 400:
        step = order.step(t)
        assert len(step.ids) == order.batches[step.bucket]
        assert {i.index % len(counts) for i in step.ids} == {step.bucket}
        assert order.samples_before(t) == len(ids)
        ids += step.ids
        taken[step.bucket] += 1
        t += 1
    for bucket, count in enumerate(counts):
        mine = [i for i in ids if i.index % len(counts) == bucket]
        for epoch in range(5):
            if count and epoch < len(mine) // count - 1 - order.batches[bucket] // count:
                assert indices(mine, epoch) == [o * len(counts) + bucket for o in range(count)]


def test_buckets_take_turns_evenly():
    order = Order((Buckets((600, 300, 100)),), 5, (10, 10, 10))
    turns = [order.step(t).bucket for t in range(100)]
    assert collections.Counter(turns) == {0: 60, 1: 30, 2: 10}
    for first in range(0, 100, 10):
        window = collections.Counter(turns[first : first + 10])
        assert all(abs(window[b] - share) <= 1.5 for b, share in enumerate((6, 3, 1)))
    assert turns != [order.step(t).bucket for t in range(100, 200)]


# ---- mixtures


def mixture(weights, sizes=(1000, 300, 70), batch=24, **reading) -> Order:
    return Order.mixture([Whole(n, str(n)) for n in sizes], weights, 9, (batch,), Reading(**reading))


@settings(max_examples=8, deadline=None)
@given(
    weights=st.lists(st.floats(0.01, 10), min_size=3, max_size=3),
    chunk=st.sampled_from([1, 4]),
    parts=st.sampled_from([1, 2, 6]),
)
def test_a_mixture_keeps_its_weights_in_every_batch_and_each_set_its_epochs(weights, chunk, parts):
    order = mixture(weights, chunk=chunk)
    ids = []
    for t in range(120):
        step = order.step(t).ids
        assert [i for part in range(parts) for i in order.part(t, part, parts).ids] == step
        found = collections.Counter(i.dataset for i in step)
        for number, weight in enumerate(weights):
            assert abs(found[number] - 24 * weight / sum(weights)) <= 2
        ids += step
    for number, (n, read) in enumerate(zip((1000, 300, 70), order.epochs_before(120), strict=True)):
        assert read * n == pytest.approx(sum(i.dataset == number for i in ids))
        for epoch in range(int(read) - 1):
            assert indices(ids, epoch, number) == list(range(n))


@settings(max_examples=8, deadline=None)
@given(
    first=st.lists(st.floats(0.05, 5), min_size=3, max_size=3),
    second=st.lists(st.floats(0.05, 5), min_size=3, max_size=3),
    at=st.integers(0, 90),
)
def test_weights_that_change_at_a_resume_neither_repeat_nor_skip(first, second, at):
    began = mixture(first, sizes=(200, 90, 40))
    cursor = Cursor.from_dict(json.loads(json.dumps(began.cursor(at).to_dict())))
    order = mixture(second, sizes=(200, 90, 40)).resume(cursor)
    assert ids_of(order, 0, at) == ids_of(began, 0, at)
    assert order.samples_before(at + 5) == 24 * (at + 5)
    ids = ids_of(order, 0, at + 100)
    for number, n in enumerate((200, 90, 40)):
        mine = [i for i in ids if i.dataset == number]
        for epoch in range(len(mine) // n - 1):
            assert indices(mine, epoch, number) == list(range(n))
    again = mixture(second, sizes=(200, 90, 40)).resume(order.cursor(at + 50))
    assert ids_of(again, at + 40, at + 60) == ids_of(order, at + 40, at + 60)
    changed = tuple(w / sum(second) for w in second) != tuple(w / sum(first) for w in first)
    assert [one.first_step for one in again.segments] == ([0, at] if changed else [0])


def test_mixed_buckets_keep_the_weights_over_all():
    sets = [Buckets((300, 100)), Buckets((50, 250))]
    order = Order.mixture(sets, [3, 1], 2, (12, 6))
    ids, buckets = [], collections.Counter()
    for t in range(1024):
        step = order.step(t)
        assert {i.index % 2 for i in step.ids} == {step.bucket}
        buckets[step.bucket] += len(step.ids)
        ids += step.ids
    share = sum(i.dataset == 0 for i in ids) / len(ids)
    assert share == pytest.approx(0.75, abs=0.003)
    assert buckets[0] / len(ids) == pytest.approx(0.75 * 0.75 + 0.25 * 50 / 300, abs=0.003)
    assert order.samples_before(1024) == len(ids)


# ---- what is refused, and what travels


def test_a_world_that_does_not_divide_is_refused_with_the_divisors():
    with pytest.raises(ConfigError) as caught:
        require_divides(12, 5)
    assert "1, 2, 3, 4, 6, 12" in caught.value.mend


@pytest.mark.parametrize(
    "make",
    [
        lambda: Order.of(0, 0, 4),
        lambda: Order.of(10, 0, 0),
        lambda: Order.of(3, 0, 4, reading=Reading(drop_remainder=True)),
        lambda: Order.of(30, 0, 8, reading=Reading(streams=3)),
        lambda: mixture([1, 0, 1]),
        lambda: mixture([1, float("nan"), 1]),
    ],
)
def test_impossible_orders_are_refused(make):
    with pytest.raises(ConfigError):
        make()


def test_cursor_round_trip_and_refusal():
    order = Order.of(10, 7, 4, digest="digest")
    cursor = order.cursor(6, damaged=2)
    assert (cursor.epoch, cursor.step) == (2, 6)
    again = Cursor.from_dict(json.loads(json.dumps(cursor.to_dict())))
    assert again == cursor
    assert order.resume(again) == order
    others = [
        Order.of(10, 8, 4, digest="digest"),
        Order.of(10, 7, 2, digest="digest"),
        Order.of(10, 7, 4, digest="other"),
        Order.of(10, 7, 4, digest="digest", reading=Reading(chunk=2)),
        mixture([1, 1, 1]),
    ]
    for other in others:
        with pytest.raises(FingerprintMismatch):
            other.resume(again)


def test_an_order_travels_to_another_process():
    order = mixture([1, 2, 3])
    assert pickle.loads(pickle.dumps(order)).step(77) == order.step(77)


def test_a_step_of_a_billion_samples_is_found_at_once():
    order = Order.of(10**9, 1, 1024, reading=Reading(chunk=8))
    far = order.part(10**8, 5, 64).ids
    assert len({i.index for i in far}) == 16
    assert {i.epoch for i in far} == {102}
    assert np.ptp([i.index for i in far]) > 10**7
