"""Embeddings: closed forms, diffusers' numbers, and what is refused."""

import math

import pytest
import torch
from diffusers.models.embeddings import get_2d_sincos_pos_embed, get_timestep_embedding

from latentray.errors import ConfigError
from latentray.models import embeddings


def test_the_time_embedding_in_closed_form():
    e = embeddings.sinusoidal_embedding(torch.tensor([0, 3]), 4)
    expected = [math.cos(3), math.cos(3 * 1e-2), math.sin(3), math.sin(3 * 1e-2)]
    torch.testing.assert_close(e, torch.tensor([[1.0, 1.0, 0.0, 0.0], expected]))


def test_the_time_embedding_equals_diffusers():
    t = torch.tensor([0.0, 1.5, 999.0])
    expected = get_timestep_embedding(t, 32, flip_sin_to_cos=True, downscale_freq_shift=0)
    torch.testing.assert_close(embeddings.sinusoidal_embedding(t, 32), expected, rtol=1e-5, atol=1e-5)


def test_half_precision_timesteps_stay_apart():
    e = embeddings.sinusoidal_embedding(torch.tensor([997, 998]), 64)
    assert e.dtype == torch.float32
    assert (e[0] - e[1]).abs().max() > 0.1


def test_positions_in_closed_form():
    table = embeddings.grid_positions(8, 4, 8)  # coordinates 0, 2, 4, 6
    column, row = [math.sin(4), math.sin(0.04), math.cos(4), math.cos(0.04)], [math.sin(6), math.sin(0.06)]
    torch.testing.assert_close(table[3, 2, :4], torch.tensor(column))
    torch.testing.assert_close(table[3, 2, 4:6], torch.tensor(row))


@pytest.mark.parametrize(("width", "grid", "base"), [(8, 5, 5), (24, 12, 7), (64, 48, 64)])
def test_positions_are_those_of_diffusers_bit_for_bit(width, grid, base):
    expected = get_2d_sincos_pos_embed(width, grid, base_size=base).float()
    assert torch.equal(embeddings.grid_positions(width, grid, base).flatten(0, 1), expected)


def test_each_size_number_has_its_place():
    net = embeddings.AddedConditions(pooled_width=4, size_numbers=6, size_width=8, width=16)
    pooled, size = torch.randn(1, 4), torch.tensor([[512.0, 768.0, 0.0, 32.0, 512.0, 640.0]])
    base = net(pooled, size, torch.float32)
    for i in range(6):
        other = size.clone()
        other[0, i] += 100
        assert not torch.allclose(net(pooled, other, torch.float32), base)
    assert not torch.allclose(net(pooled, size[:, [1, 0, 2, 3, 4, 5]], torch.float32), base)


def test_either_condition_stands_alone():
    pooled = embeddings.AddedConditions(pooled_width=4, size_numbers=0, size_width=8, width=16)
    assert pooled(torch.randn(2, 4), None, torch.float32).shape == (2, 16)
    size = embeddings.AddedConditions(pooled_width=None, size_numbers=5, size_width=8, width=16)
    assert size(None, torch.randn(2, 5), torch.float32).shape == (2, 16)


@pytest.mark.parametrize(
    ("pooled", "size", "where"),
    [(None, (2, 6), "pooled"), ((2, 4), None, "size"), ((2, 4), (2, 5), "size")],
)
def test_a_condition_that_is_missing_or_cut_is_refused_by_name(pooled, size, where):
    net = embeddings.AddedConditions(pooled_width=4, size_numbers=6, size_width=8, width=16)
    given = (None if shape is None else torch.randn(shape) for shape in (pooled, size))
    with pytest.raises(ConfigError) as caught:
        net(*given, torch.float32)
    assert caught.value.where == where
