"""Lines: every sample once an epoch whatever the streams, chunks and depth; chunks are read whole, and few at a time."""

import collections

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latentray.data.lines import _SHIFT, Line, Reading
from latentray.data.permutation import mixed


def line(n, *, key=5, batch=8, streams=None, **reading) -> Line:
    return Line(n=n, key=key, streams=streams or batch, batch=batch, reading=Reading(**reading))


readings = st.fixed_dictionaries({"chunk": st.integers(1, 12), "depth": st.integers(1, 20)})


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 700), key=st.integers(0, 2**64 - 1), streams=st.integers(1, 12), reading=readings)
def test_each_sample_exactly_once_an_epoch(n, key, streams, reading):
    one = line(n, key=key, batch=streams, **reading)
    epochs, samples = one.at(np.arange(one.ranks_before(5 + streams // n)))  # an epoch's tail is read in the next
    for epoch in range(3):
        assert sorted(samples[epochs == epoch].tolist()) == list(range(n))
    rows = epochs.reshape(-1, streams)
    assert (np.ptp(rows, axis=1) <= -(-streams // n)).all()


@settings(max_examples=25, deadline=None)
@given(n=st.integers(8, 500), batch=st.sampled_from([2, 4, 8]), reading=readings)
def test_drop_mode_has_whole_batches_of_one_epoch_without_repetition(n, batch, reading):
    one = line(n, batch=batch, streams=batch // 2, drop_remainder=True, **reading)
    per_epoch = n // batch * batch
    assert one.per_epoch == per_epoch
    for epoch in range(3):
        epochs, samples = one.at(np.arange(epoch * per_epoch, (epoch + 1) * per_epoch))
        assert set(epochs.tolist()) == {epoch}
        assert len(set(samples.tolist())) == per_epoch


def test_dropped_samples_differ_from_epoch_to_epoch():
    one = line(1003, batch=100, drop_remainder=True)
    left = [set(range(1003)) - set(one.at(np.arange(e * 1000, (e + 1) * 1000))[1].tolist()) for e in range(3)]
    assert [len(some) for some in left] == [3, 3, 3]
    assert len(set().union(*left)) > 6


@given(rank=st.integers(0, 10**14), n=st.integers(1, 10**9))
@settings(max_examples=25, deadline=None)
def test_a_rank_far_away_costs_nothing_and_is_the_same_alone(rank, n):
    one = line(n, batch=256, chunk=8)
    epochs, samples = one.at(np.arange(rank, rank + 300))
    assert 0 <= samples.min() <= samples.max() < n
    alone = one.at([rank + 7])
    assert (alone[0][0], alone[1][0]) == (epochs[7], samples[7])


@pytest.mark.parametrize(("chunk", "depth"), [(8, 4), (8, 16), (32, 16)])
def test_a_stream_holds_few_chunks_and_leaves_none_behind(chunk, depth):
    one = line(400_000, batch=16, chunk=chunk, depth=depth)
    rows = one.ranks_before(1) // 16
    for stream in (0, 11):
        _, samples = one.at(np.arange(rows) * 16 + stream)
        unturned = (samples - int(mixed(one.key, 0, _SHIFT)) % one.n) % one.n  # a line's chunks are turned by rho
        first, last = {}, {}
        for row, number in enumerate((unturned // chunk).tolist()):
            first.setdefault(number, row)
            last[number] = row
        held = collections.Counter()
        for number, row in first.items():
            if last[number] - row < rows // 2:  # the ring's own seam parts a few chunks
                held.update(range(row, last[number] + 1))
        assert (
            max(held.values()) <= 2 * depth + 1
        )  # a segment begins anywhere: its chunks are parts of two of the line's


def test_chunks_and_streams_shuffle_as_well_as_a_full_shuffle():
    """Label-sorted data: the spread of label counts over h consecutive batches, against independent draws."""
    n, batch, labels = 400_000, 256, 100

    def spread(h, **reading):
        one = line(n, batch=batch, **reading)
        _, samples = one.at(np.arange(0, n - n % (h * batch)))
        label = samples * labels // n
        groups = label.reshape(-1, h * batch)
        counts = np.stack([np.bincount(group, minlength=labels) for group in groups])
        expected = h * batch / labels
        full = expected * (1 - 1 / labels) * (1 - h * batch / n)
        return float(counts.var(axis=0).mean() / full)

    assert 0.9 < spread(1) < 1.1
    assert 0.9 < spread(16) < 1.1
    assert spread(1, chunk=8, depth=16) < 1.1
    assert spread(16, chunk=8, depth=16) < 1.5
