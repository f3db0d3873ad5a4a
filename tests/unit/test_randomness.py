"""Draws belong to the sample: known answers, the right distributions, and no dependence on who else is in the batch."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from latentray import randomness
from latentray.randomness import Purpose
from latentray.records import SampleId

IDS = [SampleId(epoch=0, dataset=0, index=0), SampleId(epoch=1, dataset=2, index=3)]


def many(n: int) -> list[SampleId]:
    return [SampleId(epoch=0, dataset=0, index=i) for i in range(n)]


def test_known_answers():
    """Frozen: another number here means that every run, data order and picture of every release changes."""
    assert randomness.mix(0) == 0xE220A8397B1DCDAF  # the published first output of splitmix64 from state 0
    assert randomness.mix(1, 2, 3) == 0x6AE515C1C0AC7E37
    assert randomness.mix(-1) == randomness.mix((1 << 64) - 1) == 0xE4D971771B652C20
    keys = randomness.keys_of(7, Purpose.NOISE, IDS)
    assert keys.tolist() == [-2365856003535358614, 6178103957690175978]
    assert randomness.bits(keys, 3).tolist() == [
        [8040734935807627571, 6812169012151590197, -2349957760452650941],
        [-3180417983588956573, 6347971548617493804, -347637731896782365],
    ]
    assert [x.hex() for x in randomness.uniform(keys, (2,))[0].tolist()] == [
        "0x1.be59b40000000p-2",
        "0x1.7a26bc0000000p-2",
    ]
    expected = torch.tensor([[0.89745003, 1.40875232, -0.92483419], [0.61089694, 0.42954933, -0.07267596]])
    torch.testing.assert_close(randomness.normal(keys, (3,)), expected, rtol=1e-6, atol=1e-6)
    assert randomness.keys_from_seeds([5], Purpose.INITIAL_LATENT, 2).tolist() == [2799940499906969161]


def test_the_purposes_keep_their_numbers():
    assert {purpose.name: int(purpose) for purpose in Purpose} == {
        "NOISE": 1, "TIMESTEP": 2, "POSTERIOR": 3, "CROP": 4, "FLIP": 5, "CAPTION": 6, "CAPTION_DROPOUT": 7,
        "INITIAL_LATENT": 8, "SAMPLER_NOISE": 9, "ORDER": 10, "SPLIT": 11, "DRAWING": 12, "WEIGHTS": 13,
        "OFFSET_NOISE": 14, "TIMESTEP_SHIFT": 15, "BUCKET_TURNS": 16, "SLOT_TURNS": 17, "TAGS": 18,
            "ENCODER_DROPOUT": 19, "MASK": 20, "CODEBOOK": 21,
    }  # fmt: skip


def test_uniform_is_uniform():
    u = randomness.uniform(randomness.keys_of(0, Purpose.NOISE, many(100)), (1000,)).double().flatten()
    assert u.min() >= 0 and u.max() < 1
    n = len(u)
    assert abs(u.mean() - 0.5) < 5 / math.sqrt(12 * n)
    assert abs(u.var() - 1 / 12) < 1e-3
    ordered, steps = u.sort().values, (torch.arange(n) + 1) / n
    assert (ordered - steps).abs().max() < 2.2 / math.sqrt(n)  # Kolmogorov-Smirnov, p < 1e-4


def test_normal_is_normal():
    z = randomness.normal(randomness.keys_of(0, Purpose.NOISE, many(100)), (1000,)).double().flatten()
    n = len(z)
    assert torch.isfinite(z).all()
    assert abs(z.mean()) < 5 / math.sqrt(n)
    assert abs(z.var() - 1) < 5 * math.sqrt(2 / n)
    assert abs((z**3).mean()) < 5 * math.sqrt(15 / n)
    assert abs((z**4).mean() - 3) < 5 * math.sqrt(96 / n)
    steps = (torch.arange(n) + 1) / n
    assert (torch.special.ndtr(z.sort().values) - steps).abs().max() < 2.2 / math.sqrt(n)


def test_neighbouring_keys_and_counters_are_uncorrelated():
    z = randomness.normal(randomness.keys_of(0, Purpose.NOISE, many(200)), (200,)).double()
    off_diagonal = torch.corrcoef(z) - torch.eye(200)  # between samples
    assert off_diagonal.abs().max() < 6 / math.sqrt(200)
    along = (z[:, :-1] * z[:, 1:]).mean()  # between counters of one sample
    assert abs(along) < 5 / math.sqrt(z.numel())


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 2**40), min_size=1, max_size=8, unique=True), st.randoms(use_true_random=False))
def test_a_draw_does_not_depend_on_the_batch_or_its_order(indices, shuffler):
    ids = [SampleId(epoch=index % 3, dataset=index % 2, index=index) for index in indices]
    shuffled = list(ids)
    shuffler.shuffle(shuffled)
    together = randomness.normal(randomness.keys_of(1, Purpose.NOISE, shuffled), (3, 2))
    for one in ids:
        alone = randomness.normal(randomness.keys_of(1, Purpose.NOISE, [one]), (3, 2))
        assert torch.equal(alone[0], together[shuffled.index(one)])


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 4), st.lists(st.integers(1, 5), max_size=3))
def test_shapes(batch, shape):
    keys = randomness.keys_of(0, Purpose.CROP, many(batch)) if batch else torch.zeros(0, dtype=torch.int64)
    if batch:  # an empty batch has no shape to infer from
        assert randomness.uniform(keys, shape).shape == (batch, *shape)
        assert randomness.normal(keys, shape).shape == (batch, *shape)
        assert randomness.normal(keys, shape).dtype == torch.float32
    assert randomness.bits(keys, 7).shape == (batch, 7)


def test_every_part_of_the_key_counts():
    base = dict(epoch=1, dataset=1, index=1)
    ids = [SampleId(**base | {field: 2}) for field in base] + [SampleId(**base)]
    keys = [randomness.keys_of(seed, purpose, ids) for seed in (0, 1) for purpose in Purpose]
    assert len(torch.cat(keys).unique()) == 2 * len(Purpose) * len(ids)


def test_counters_of_a_request_are_streams_of_their_own():
    keys = torch.cat([randomness.keys_from_seeds([0, 1, 2**63], Purpose.SAMPLER_NOISE, row) for row in range(50)])
    assert len(keys.unique()) == 150


@pytest.mark.parametrize("offset", [0, 1, 17])
def test_an_offset_continues_the_stream(offset):
    keys = randomness.keys_of(0, Purpose.ORDER, many(3))
    assert torch.equal(randomness.bits(keys, 20)[:, offset:], randomness.bits(keys, 20 - offset, offset=offset))
