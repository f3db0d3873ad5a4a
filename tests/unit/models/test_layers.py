"""Building blocks: resolutions, refusals at construction, and faster ways to the same numbers."""

import copy

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from latentray.errors import ConfigError
from latentray.models import layers
from latentray.models.layers import Downsample, ResBlock
from latentray.models.upsampling import Upsample

LAYOUTS = [torch.contiguous_format, torch.channels_last]
TYPES = [torch.float32, torch.bfloat16]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def error(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact).square().mean().sqrt() / exact.square().mean().sqrt())


def test_resolutions():
    x = torch.randn(1, 4, 8, 6)
    assert Upsample(4)(x).shape == (1, 4, 16, 12)
    for asymmetric in (True, False):
        assert Downsample(4, asymmetric=asymmetric)(x).shape == (1, 4, 4, 3)


def test_doubling_by_size_is_doubling_by_factor_and_other_sizes_are_possible():
    x, up = torch.randn(1, 4, 8, 6), Upsample(4)
    assert torch.equal(up(x, torch.Size([16, 12])), up(x))
    assert up(x, torch.Size([15, 11])).shape == (1, 4, 15, 11)


def test_a_block_without_weights_in_its_last_convolution_is_its_skip():
    block = ResBlock(4, 4, groups=2, eps=1e-6)
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


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(
    "layer",
    [
        Upsample(6),
        Downsample(6, asymmetric=True),
        ResBlock(6, 6, groups=3, eps=1e-6, overwrites=True),
        ResBlock(6, 10, groups=2, eps=1e-6),
    ],
)
def test_without_gradients_the_numbers_are_those_with(layer, dtype, layout):
    layer = copy.deepcopy(layer).to(dtype, memory_format=layout)
    x = drawn(2, 6, 10, 8).to(dtype).contiguous(memory_format=layout)
    expected = layer(x).detach()
    with torch.no_grad():
        got = layer(x.clone(memory_format=torch.preserve_format))
    assert got.shape == expected.shape
    exact = copy.deepcopy(layer).double()(x.double()).detach()
    # Sums of two weights are rounded once more, to an error as large as that of the result's own rounding: sqrt(2).
    assert error(got, exact) <= max(1.5 * error(expected, exact), 1e-6)


def test_a_block_leaves_its_input_alone_unless_it_may_overwrite_it():
    x = drawn(2, 6, 4, 4).bfloat16().contiguous(memory_format=torch.channels_last)
    for block, kept in (
        (ResBlock(6, 6, groups=3, eps=1e-6), True),
        (ResBlock(6, 10, groups=2, eps=1e-6), True),
        (ResBlock(6, 6, groups=3, eps=1e-6, overwrites=True), False),
    ):
        given = x.clone(memory_format=torch.preserve_format)
        with torch.no_grad():
            block.to(torch.bfloat16, memory_format=torch.channels_last)(given)
        assert torch.equal(given, x) == kept


@pytest.mark.parametrize("dtype", TYPES)
def test_what_is_told_of_time_is_added_between_the_convolutions(dtype):
    block = ResBlock(6, 8, groups=2, eps=1e-6, time_width=5)
    x, time = drawn(3, 6, 4, 4), drawn(3, 5, seed=1)
    h = block.conv1(F.silu(F.group_norm(x, 2, block.norm1.weight, block.norm1.bias, 1e-6)))
    h = h + block.time(F.silu(time))[:, :, None, None]
    expected = block.skip(x) + block.conv2(F.silu(F.group_norm(h, 2, block.norm2.weight, block.norm2.bias, 1e-6)))
    fast = copy.deepcopy(block).to(dtype, memory_format=torch.channels_last)
    got = fast(x.to(dtype).contiguous(memory_format=torch.channels_last), time.to(dtype))
    assert error(got.detach(), expected.detach().double()) < (1e-6 if dtype == torch.float32 else 1.5e-2)


def test_under_autocast_a_block_with_float32_weights_computes_without_gradients_too():
    block = ResBlock(6, 6, groups=3, eps=1e-6, overwrites=True).to(memory_format=torch.channels_last)
    x = drawn(2, 6, 4, 4).bfloat16().contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        expected = block(x).detach()
        with torch.no_grad():
            got = block(x.clone(memory_format=torch.preserve_format))
    assert error(got, expected.double()) < 1e-2


def test_upsampling_follows_its_weights_when_they_change():
    layer, x = Upsample(4).requires_grad_(False), drawn(1, 4, 3, 5)
    with torch.no_grad():
        layer(x)
        layer.conv.weight.mul_(2)
        torch.testing.assert_close(layer(x), layer.conv(F.interpolate(x, scale_factor=2.0)))
        layer.to(torch.float64)
        assert layer(x.double()).dtype == torch.float64
        layer.conv.weight = torch.nn.Parameter(torch.zeros_like(layer.conv.weight))
        assert (layer(x.double()) == layer.conv.bias[:, None, None]).all()


def test_what_is_folded_is_neither_saved_nor_copied():
    layer = Upsample(4)
    with torch.no_grad():
        layer(drawn(1, 4, 3, 5))
    assert list(layer.state_dict()) == ["conv.weight", "conv.bias"]
