"""Building blocks: resolutions, and refusals at construction."""

import pytest
import torch
from torch.nn import functional as F

from latentray.errors import ConfigError
from latentray.models import layers


def test_resolutions():
    x = torch.randn(1, 4, 8, 6)
    assert layers.Upsample(4)(x).shape == (1, 4, 16, 12)
    for asymmetric in (True, False):
        assert layers.Downsample(4, asymmetric=asymmetric)(x).shape == (1, 4, 4, 3)


def test_doubling_by_size_is_doubling_by_factor_and_other_sizes_are_possible():
    x, up = torch.randn(1, 4, 8, 6), layers.Upsample(4)
    assert torch.equal(up(x, torch.Size([16, 12])), up(x))
    assert up(x, torch.Size([15, 11])).shape == (1, 4, 15, 11)


def test_a_block_without_weights_in_its_last_convolution_is_its_skip():
    block = layers.ResBlock(4, 4, groups=2, eps=1e-6)
    torch.nn.init.zeros_(block.conv2.weight)
    torch.nn.init.zeros_(block.conv2.bias)
    x = torch.randn(2, 4, 3, 3)
    assert torch.equal(block(x), x)


def test_groups_that_do_not_divide_are_refused():
    with pytest.raises(ConfigError, match="10 channels do not divide into 4 groups"):
        layers.group_norm(10, 4, eps=1e-6)


@pytest.mark.parametrize("side", [(5, 7), (16, 16), (32, 32)])  # the last is large enough for torch's own way
def test_channels_last_normalises_like_any_other_memory_format(side):
    norm = layers.group_norm(24, 4, eps=1e-5)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    norm = norm.bfloat16()
    x = (3 + 2 * torch.randn(3, 24, *side)).bfloat16()
    exact = F.group_norm(x.float(), 4, norm.weight.float(), norm.bias.float(), 1e-5)
    last = x.contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        plain, got = norm(x), norm(last)
    assert got.dtype == torch.bfloat16 and got.is_contiguous(memory_format=torch.channels_last)
    assert (got - exact).abs().max() <= (plain - exact).abs().max() + 2**-7
    with_gradients = norm(last.requires_grad_(True))
    torch.testing.assert_close(with_gradients, got, rtol=2**-6, atol=2**-6)
