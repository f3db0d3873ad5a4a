"""Faster ways to the same numbers: fused GroupNorm and SiLU, folded upsampling, sums in place."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from latentray.models import fused_norm
from latentray.models.autoencoder_layers import Downsample, ResBlock, Upsample
from latentray.models.layers import GroupNorm

LAYOUTS = [torch.contiguous_format, torch.channels_last]
TYPES = [torch.float32, torch.bfloat16]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def norm_of(channels: int, groups: int) -> GroupNorm:
    norm = GroupNorm(groups, channels, eps=1e-6)
    norm.weight.data, norm.bias.data = drawn(channels, seed=1), drawn(channels, seed=2)
    return norm.bfloat16().requires_grad_(False)


def error(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact).square().mean().sqrt() / exact.square().mean().sqrt())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("layer", [Upsample(6), Downsample(6), ResBlock(6, 6, groups=3), ResBlock(6, 10, groups=2)])
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


@pytest.mark.parametrize(
    ("shape", "groups"), [((2, 64, 8, 8), 32), ((3, 24, 1, 7), 4), ((1, 128, 40, 33), 32), ((2, 5, 6, 6), 1)]
)
@pytest.mark.parametrize("offset", [0.0, 300.0])
def test_the_fused_function_is_nearer_to_the_exact_numbers_than_torchs_own(shape, groups, offset):
    norm = norm_of(shape[1], groups)
    x = (offset + drawn(*shape)).bfloat16().contiguous(memory_format=torch.channels_last)
    exact = F.silu(F.group_norm(x.double(), groups, norm.weight.double(), norm.bias.double(), norm.eps))
    with torch.no_grad():
        got, plain = fused_norm.silu_of_norm(norm, x), F.silu(norm(x))
    assert got.dtype == torch.bfloat16 and got.stride() == x.stride()
    assert error(got, exact) <= 1.01 * error(plain, exact) + 1e-4
    assert error(got, exact) < 3e-3


def test_it_is_compiled_where_there_is_a_compiler():
    assert fused_norm._function() is not None  # the tests' machines have one


def test_in_place_is_the_same_to_the_bit():
    norm, x = norm_of(64, 8), drawn(2, 64, 9, 5).bfloat16().contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        apart = fused_norm.silu_of_norm(norm, x)
        together = fused_norm.silu_of_norm(norm, x, inplace=True)
    assert torch.equal(apart, together) and together.data_ptr() == x.data_ptr()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_is_seen(value):
    norm, x = norm_of(8, 2), drawn(2, 8, 4, 4).bfloat16().contiguous(memory_format=torch.channels_last)
    x[1, 0, 2, 2] = value
    with torch.no_grad():
        got = fused_norm.silu_of_norm(norm, x)
    assert got[0].isfinite().all() and not got[1, :4].isfinite().any() and got[1, 4:].isfinite().all()


def test_extreme_values_come_out_as_silu_has_them():
    norm = GroupNorm(1, 2, eps=1e-6).bfloat16().requires_grad_(False)
    norm.weight.fill_(0.0)
    norm.bias.copy_(torch.tensor([1e4, -1e4]))
    x = drawn(1, 2, 3, 3).bfloat16().contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        got = fused_norm.silu_of_norm(norm, x)
    assert (got[:, 0] == norm.bias[0]).all() and (got[:, 1].abs() < 1e-30).all()


@pytest.mark.parametrize("why", ["no compiler", "turned off", "cannot be compiled"])
def test_without_the_function_torchs_own_is_used(monkeypatch, tmp_path, why):
    norm, x = norm_of(16, 4), drawn(1, 16, 5, 5).bfloat16().contiguous(memory_format=torch.channels_last)
    if why == "no compiler":
        monkeypatch.setenv("CXX", "no-such-compiler")
    elif why == "turned off":
        monkeypatch.setenv("LATENTRAY_FUSED", "0")
    else:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        monkeypatch.setattr(fused_norm, "_FLAGS", ("-no-such-flag",))
    fused_norm._function.cache_clear()
    try:
        with torch.no_grad():
            assert fused_norm._function() is None
            assert torch.equal(fused_norm.silu_of_norm(norm, x), F.silu(norm(x)))
    finally:
        fused_norm._function.cache_clear()


def test_gradients_flow_as_ever():
    norm = norm_of(8, 2).float()
    x = drawn(2, 8, 4, 4).contiguous(memory_format=torch.channels_last).requires_grad_(True)
    fused_norm.silu_of_norm(norm, x).sum().backward()
    (expected,) = torch.autograd.grad(F.silu(norm(x)).sum(), x)
    torch.testing.assert_close(x.grad, expected)
