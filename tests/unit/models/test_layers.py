"""Building blocks: the time embedding in closed form, resolutions, and refusals at construction."""

import math

import pytest
import torch
from diffusers.models.embeddings import get_timestep_embedding

from latentray.errors import ConfigError
from latentray.models import layers


def test_the_time_embedding_in_closed_form():
    e = layers.sinusoidal_embedding(torch.tensor([0, 3]), 4)
    expected = [math.cos(3), math.cos(3 * 1e-2), math.sin(3), math.sin(3 * 1e-2)]
    torch.testing.assert_close(e, torch.tensor([[1.0, 1.0, 0.0, 0.0], expected]))


def test_the_time_embedding_equals_diffusers():
    t = torch.tensor([0.0, 1.5, 999.0])
    expected = get_timestep_embedding(t, 32, flip_sin_to_cos=True, downscale_freq_shift=0)
    torch.testing.assert_close(layers.sinusoidal_embedding(t, 32), expected, rtol=1e-5, atol=1e-5)


def test_half_precision_timesteps_stay_apart():
    e = layers.sinusoidal_embedding(torch.tensor([997, 998]), 64)
    assert e.dtype == torch.float32
    assert (e[0] - e[1]).abs().max() > 0.1


def test_resolutions():
    x = torch.randn(1, 4, 8, 6)
    assert layers.Upsample(4)(x).shape == (1, 4, 16, 12)
    for asymmetric in (True, False):
        assert layers.Downsample(4, asymmetric=asymmetric)(x).shape == (1, 4, 4, 3)


def test_a_block_without_weights_in_its_last_convolution_is_its_skip():
    block = layers.ResBlock(4, 4, groups=2, eps=1e-6)
    torch.nn.init.zeros_(block.conv2.weight)
    torch.nn.init.zeros_(block.conv2.bias)
    x = torch.randn(2, 4, 3, 3)
    assert torch.equal(block(x), x)


def test_groups_that_do_not_divide_are_refused():
    with pytest.raises(ConfigError, match="10 channels do not divide into 4 groups"):
        layers.group_norm(10, 4, eps=1e-6)
