"""GroupNorm with SiLU and GEGLU in one go: against torch's own in float64, forth and back; and where they are not to be had."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from latentray.models import fused
from latentray.models.attention import FeedForward
from latentray.models.layers import GroupNorm

SHAPES = [((2, 64, 8, 8), 32), ((3, 24, 1, 7), 4), ((1, 128, 40, 33), 32), ((2, 5, 6, 6), 1)]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def a_map(*shape: int, offset: float = 0.0) -> Tensor:
    return (offset + drawn(*shape)).bfloat16().contiguous(memory_format=torch.channels_last)


def norm_of(channels: int, groups: int) -> GroupNorm:
    norm = GroupNorm(groups, channels, eps=1e-6)
    norm.weight.data, norm.bias.data = drawn(channels, seed=1), drawn(channels, seed=2)
    return norm.bfloat16()


def plainly(norm: GroupNorm, x: Tensor, add: Tensor | None = None, *, silu: bool) -> Tensor:
    """By torch's own functions, in the type of x."""
    x = x if add is None else x + add[:, :, None, None]
    y = F.group_norm(x, norm.num_groups, norm.weight.to(x.dtype), norm.bias.to(x.dtype), norm.eps)
    return F.silu(y) if silu else y


def error(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact).square().mean().sqrt() / exact.square().mean().sqrt())


@pytest.mark.parametrize(("shape", "groups"), SHAPES)
@pytest.mark.parametrize("offset", [0.0, 300.0])
@pytest.mark.parametrize("silu", [True, False])
def test_a_norm_is_nearer_to_the_exact_numbers_than_torchs_own(shape, groups, offset, silu):
    norm, x = norm_of(shape[1], groups), a_map(*shape, offset=offset)
    with torch.no_grad():
        exact = plainly(norm, x.double(), silu=silu)
        got, plain = norm(x, silu=silu), plainly(norm, x, silu=silu)
    assert got.dtype == torch.bfloat16 and got.stride() == x.stride()
    assert error(got, exact) <= 1.01 * error(plain, exact) + 1e-4
    assert error(got, exact) < 3e-3


@pytest.mark.parametrize(("shape", "groups"), SHAPES)
@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float32])
def test_gradients_of_a_norm_are_those_of_float64_to_the_rounding(shape, groups, silu, weights):
    norm = norm_of(shape[1], groups).to(weights)
    x, add = a_map(*shape, offset=2.0).requires_grad_(), drawn(*shape[:2], seed=3).bfloat16().requires_grad_()
    given = drawn(*shape, seed=4).bfloat16()
    norm(x, silu=silu, add_BC=add).backward(given)
    exact_x, exact_add = x.detach().double().requires_grad_(), add.detach().double().requires_grad_()
    exact_norm = GroupNorm(groups, shape[1], eps=norm.eps).double()
    exact_norm.load_state_dict(norm.state_dict())
    plainly(exact_norm, exact_x, exact_add, silu=silu).backward(given.double())
    for got, exact in (
        (x.grad, exact_x.grad), (norm.weight.grad, exact_norm.weight.grad), (norm.bias.grad, exact_norm.bias.grad),
        (add.grad, exact_add.grad),
    ):  # fmt: skip
        assert got.dtype in (torch.bfloat16, weights)
        # Where all of a gradient cancels (of what is added to a group of one channel), its parts' rounding is left.
        assert error(got, exact) < 4e-3 or (got.double() - exact).abs().max() < 1e-2


def all_of_it() -> list[Tensor]:
    """What norm and GEGLU give, and their gradients, over whole groups of sixteen channels and over rests."""
    found = []
    for channels in (64, 24):
        norm, x = norm_of(channels, 4), a_map(2, channels, 5, 9).requires_grad_()
        y = norm(x, silu=True, add_BC=drawn(2, channels, seed=3).bfloat16())
        y.backward(drawn(*y.shape, seed=4).bfloat16())
        gates = drawn(7, 2 * channels, seed=5).bfloat16().requires_grad_()
        z = fused.geglu(gates)
        z.backward(drawn(*z.shape, seed=6).bfloat16())
        found += [y.detach(), x.grad, norm.weight.grad, norm.bias.grad, z.detach(), gates.grad]
    return found


def test_what_is_written_by_hand_for_a_processor_gives_what_the_compiler_makes_of_the_rest(monkeypatch):
    by_hand = all_of_it()
    monkeypatch.setattr(fused, "_FLAGS", (*fused._FLAGS, "-DLATENTRAY_PORTABLE"))
    portable = fused._library.__wrapped__()
    assert portable is not None and portable._name != fused._library()._name
    monkeypatch.setattr(fused, "_library", lambda: portable)
    for one, other in zip(by_hand, all_of_it(), strict=True):
        assert error(one, other.double()) < 1e-3


def test_with_gradients_and_without_the_numbers_are_the_same_to_the_bit():
    norm, x = norm_of(24, 4), a_map(2, 24, 5, 9)
    with torch.no_grad():
        without = norm(x, silu=True)
    assert torch.equal(norm(x.requires_grad_(), silu=True).detach(), without)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_gradient_is_the_same_to_the_bit_whatever_the_threads(threads):
    norm, before = norm_of(24, 4), torch.get_num_threads()
    found = []
    for number in (1, threads):
        torch.set_num_threads(number)
        x = a_map(4, 24, 5, 9).requires_grad_()
        norm.zero_grad()
        norm(x, silu=True).square().sum().backward()
        found.append((x.grad, norm.weight.grad.clone()))
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_in_place_is_the_same_to_the_bit():
    norm, x = norm_of(64, 8), a_map(2, 64, 9, 5)
    with torch.no_grad():
        apart = norm(x, silu=True)
        together = norm(x, silu=True, inplace=True)
    assert torch.equal(apart, together) and together.data_ptr() == x.data_ptr()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_is_seen(value):
    norm, x = norm_of(8, 2), a_map(2, 8, 4, 4)
    x[1, 0, 2, 2] = value
    x.requires_grad_()
    got = norm(x, silu=True)
    got.sum().backward()
    for one in (got.detach(), x.grad):
        assert one[0].isfinite().all() and not one[1, :4].isfinite().any() and one[1, 4:].isfinite().all()


def test_extreme_values_come_out_as_silu_has_them():
    norm = GroupNorm(1, 2, eps=1e-6).bfloat16().requires_grad_(False)
    norm.weight.fill_(0.0)
    norm.bias.copy_(torch.tensor([1e4, -1e4]))
    with torch.no_grad():
        got = norm(a_map(1, 2, 3, 3), silu=True)
    assert (got[:, 0] == norm.bias[0]).all() and (got[:, 1].abs() < 1e-30).all()


@pytest.mark.parametrize("shape", [(7, 2 * 24), (2, 5, 2 * 33), (1, 2)])
@pytest.mark.parametrize("spread", [1.0, 20.0])
def test_a_gated_product_and_its_gradients_are_those_of_float64_to_the_rounding(shape, spread):
    x, given = (
        (spread * drawn(*shape)).bfloat16().requires_grad_(),
        drawn(*shape[:-1], shape[-1] // 2, seed=1).bfloat16(),
    )
    assert fused.gates(x)
    got = fused.geglu(x)
    got.backward(given)
    exact_x = x.detach().double().requires_grad_()
    value, gate = exact_x.chunk(2, dim=-1)
    exact = value * F.gelu(gate)
    exact.backward(given.double())
    for one, other in ((got.detach(), exact.detach()), (x.grad, exact_x.grad)):
        # Far out in the tail the distribution function is exact to 1e-7, not to its own digits.
        assert (one.double() - other).abs().max() <= 2**-8 * other.abs().max() + 2e-7 * spread
    with torch.no_grad():
        assert torch.equal(fused.geglu(x), got)


def test_a_gated_product_of_what_is_no_number_is_none():
    x = torch.tensor([[1.0, float("nan"), float("nan"), 1.0]]).bfloat16()
    assert fused.geglu(x).isnan().all()


def test_they_are_compiled_where_there_is_a_compiler():
    assert fused.available()  # the tests' machines have one


@pytest.mark.parametrize("why", ["no compiler", "turned off", "cannot be compiled"])
def test_without_the_functions_torchs_own_are_used(monkeypatch, tmp_path, why):
    norm, x = norm_of(16, 4), a_map(2, 16, 5, 5)
    layer, tokens = FeedForward(8).bfloat16(), drawn(2, 3, 8).bfloat16()
    expected = layer(tokens).detach()
    if why == "no compiler":
        monkeypatch.setenv("CXX", "no-such-compiler")
    elif why == "turned off":
        monkeypatch.setenv("LATENTRAY_FUSED", "0")
    else:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        monkeypatch.setattr(fused, "_FLAGS", ("-no-such-flag",))
    fused._library.cache_clear()
    try:
        assert not fused.available()
        torch.testing.assert_close(norm(x, silu=True), plainly(norm, x, silu=True), rtol=2**-7, atol=2**-7)
        torch.testing.assert_close(layer(tokens), expected, rtol=2**-6, atol=2**-6)
    finally:
        fused._library.cache_clear()


@pytest.mark.parametrize("add", [True, False])
def test_in_a_compiled_graph_they_are_operators_of_the_same_bits(add, monkeypatch):
    monkeypatch.setattr(fused, "_GRAPH_FROM", 1)
    norm, layer = norm_of(16, 4), FeedForward(16).bfloat16()
    told = drawn(2, 16, seed=3).bfloat16() if add else None

    def both(x):
        y = norm(x, silu=True, add_BC=told)
        return layer(y.flatten(2).transpose(1, 2))

    graphs = []

    def noting(graph, inputs):
        graphs.append(str(graph.graph))
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(both, backend=noting, fullgraph=True)
    found = []
    for function in (both, compiled):
        x = a_map(2, 16, 5, 3).requires_grad_()
        norm.zero_grad()
        y = function(x)
        y.float().square().sum().backward()
        found.append((y.detach(), x.grad, norm.weight.grad, norm.bias.grad))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert "latentray.group_norm" in graphs[0] and "latentray.geglu" in graphs[0]


@pytest.mark.parametrize("add", [drawn(2, 8).bfloat16(), None])
def test_the_operators_keep_torchs_rules_for_operators(add):
    x, weight, bias = a_map(2, 8, 3, 5), drawn(8).bfloat16(), drawn(8, seed=1).bfloat16()
    rules = ("test_schema", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(fused._norm_operator, (x, weight, bias, add, 2, 1e-5, True), test_utils=rules)
    torch.library.opcheck(fused._geglu_operator, (drawn(3, 8).bfloat16(),), test_utils=rules)


def test_other_types_layouts_and_dimensions_are_left_to_torch():
    weight = torch.ones(4)
    x = drawn(2, 4, 3, 5)
    last = x.contiguous(memory_format=torch.channels_last)
    assert not any(
        fused.normalises(one, weight) for one in (x, last, x.bfloat16(), x.half(), drawn(2, 4, 9).bfloat16())
    )
    assert not fused.normalises(last.bfloat16(), weight.double()) and fused.normalises(last.bfloat16(), weight)
    norm = norm_of(4, 2).float()
    x.requires_grad_()
    norm(x, silu=True).sum().backward()
    (expected,) = torch.autograd.grad(plainly(norm, x, silu=True).sum(), x)
    torch.testing.assert_close(x.grad, expected)
