"""Attention: our explicit products, torch's fused kernel and the formula agree."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from latentray.errors import ConfigError
from latentray.models import attention


@pytest.mark.parametrize("keys", [5, 300])  # below and above the bound between the two paths
@pytest.mark.parametrize("grad", [True, False])
def test_both_paths_equal_the_fused_kernel(keys, grad, monkeypatch):
    q, k, v = (torch.randn(2, 3, n, 8, requires_grad=True) for n in (7, keys, keys))
    expected = F.scaled_dot_product_attention(q, k, v)
    fused = []
    real = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a: fused.append(1) or real(*a))
    with torch.set_grad_enabled(grad):
        got = attention.attend(q, k, v)
    assert bool(fused) == (keys == 300 or not grad)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    if grad:
        weight = torch.randn_like(expected)
        ours = torch.autograd.grad((got * weight).sum(), (q, k, v))
        theirs = torch.autograd.grad((expected * weight).sum(), (q, k, v))
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("keys", [1, 16, 77, 300])
def test_keys_added_for_speed_weigh_nothing(keys):
    """bf16 on a CPU attends over a multiple of 16 keys: against the formula in float32, no worse than torch's own."""
    q, k, v = (torch.randn(2, 2, n, 16).bfloat16() for n in (40, keys, keys))
    exact = F.scaled_dot_product_attention(q.float(), k.float(), v.float())
    with torch.no_grad():
        got, fused = attention.attend(q, k, v), F.scaled_dot_product_attention(q, k, v)
    assert got.dtype == torch.bfloat16
    assert (got - exact).abs().max() <= 1.5 * (fused - exact).abs().max() + 2e-3
    inputs = [one.requires_grad_(True) for one in (q, k, v)]
    weight = torch.randn(exact.shape)
    gradients = torch.autograd.grad((attention.attend(*inputs) * weight).sum(), inputs)
    wanted = [one.detach().float().requires_grad_(True) for one in inputs]
    expected = torch.autograd.grad((F.scaled_dot_product_attention(*wanted) * weight).sum(), wanted)
    for a, b in zip(gradients, expected, strict=True):
        assert (a - b).abs().max() <= 0.03 * b.abs().max() + 1e-3


@pytest.mark.parametrize(("heads", "queries", "keys"), [(1, 300, 300), (5, 40, 1000), (3, 2000, 1500)])
def test_gradients_over_many_keys_are_those_of_the_formula(heads, queries, keys):
    """bf16 on a CPU: a few heads at a time, weights computed again; also where the last few are fewer."""
    made = torch.Generator().manual_seed(keys)
    inputs = [torch.randn(2, n, heads, 16, generator=made).bfloat16().transpose(1, 2) for n in (queries, keys, keys)]
    weight = torch.randn(2, heads, queries, 16, generator=made)

    def gradients(call, *, dtype):
        taken = [one.detach().to(dtype).requires_grad_(True) for one in inputs]
        return torch.autograd.grad((call(*taken) * weight).sum(), taken)

    exact = gradients(F.scaled_dot_product_attention, dtype=torch.float64)
    ours = gradients(attention.attend, dtype=torch.bfloat16)
    explicit = gradients(lambda q, k, v: (q * 16**-0.5 @ k.mT).softmax(-1) @ v, dtype=torch.bfloat16)
    for a, b, wanted in zip(ours, explicit, exact, strict=True):
        assert (a - wanted).norm() <= 1.05 * (b - wanted).norm() + 1e-4 * wanted.norm()
        assert (a - wanted).norm() < 0.01 * wanted.norm()


def test_a_compiled_graph_has_the_same_gradients_over_many_keys():
    q, k, v = (torch.randn(2, 3, 400, 16).bfloat16().requires_grad_(True) for _ in range(3))
    eager = torch.autograd.grad(attention.attend(q, k, v).float().square().sum(), (q, k, v))
    torch._dynamo.reset()
    compiled = torch.compile(attention.attend, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(q, k, v).float().square().sum(), (q, k, v))
    assert all(torch.equal(a, b) for a, b in zip(got, eager, strict=True))


def test_geglu_in_closed_form_with_and_without_gradients():
    ff = attention.FeedForward(8)
    x = torch.randn(2, 3, 8)
    value, gate = F.linear(x, ff.proj.weight, ff.proj.bias).chunk(2, dim=-1)
    gelu = 0.5 * gate * (1 + torch.erf(gate / 2**0.5))
    expected = F.linear(value * gelu, ff.out.weight, ff.out.bias)
    torch.testing.assert_close(ff(x), expected, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(ff(x), expected, rtol=1e-5, atol=1e-6)


def test_a_feed_forward_too_large_for_the_cache_gives_each_sample_what_it_gets_alone():
    ff = attention.FeedForward(64).bfloat16()
    x = torch.randn(5, 1024, 64).bfloat16()
    with torch.no_grad():
        together = ff(x)
        assert all(torch.equal(together[i : i + 1], ff(x[i : i + 1])) for i in range(5))
    torch.testing.assert_close(together, ff(x), rtol=0.02, atol=0.01)  # with gradients all at once


def test_normalised_queries_and_keys_have_unit_mean_square_and_forget_their_length():
    attn = attention.Attention(16, heads=2, qk_norm=True)
    x = torch.randn(2, 6, 16)
    q, k, v = attn.project(x)
    for one in (q, k):
        torch.testing.assert_close(one.square().mean(-1), torch.ones(2, 2, 6), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(attn.project(3 * x)[0], q, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(attn.project(3 * x)[2], 3 * v)


@pytest.mark.parametrize("context_width", [None, 12])
def test_multi_head_attention_equals_torch(context_width):
    ours = attention.Attention(16, heads=4, context_width=context_width, bias=True)
    theirs = nn.MultiheadAttention(16, 4, kdim=context_width, vdim=context_width, batch_first=True)
    x = torch.randn(2, 6, 16)
    context = x if context_width is None else torch.randn(2, 3, context_width)
    with torch.no_grad():
        if context_width is None:
            theirs.in_proj_weight.copy_(torch.cat([ours.to_q.weight, ours.to_k.weight, ours.to_v.weight]))
        else:
            for name in "qkv":
                getattr(theirs, f"{name}_proj_weight").copy_(getattr(ours, f"to_{name}").weight)
        theirs.in_proj_bias.copy_(torch.cat([ours.to_q.bias, ours.to_k.bias, ours.to_v.bias]))
        theirs.out_proj.load_state_dict(ours.to_out.state_dict())
    expected, _ = theirs(x, context, context)
    torch.testing.assert_close(ours(x, None if context_width is None else context), expected, rtol=1e-5, atol=1e-6)


def test_the_order_of_context_tokens_does_not_matter():
    block = attention.TransformerBlock(16, heads=2, context_width=8)
    x, context = torch.randn(1, 4, 16), torch.randn(1, 6, 8)
    torch.testing.assert_close(block(x, context), block(x, context.flip(1)), rtol=1e-5, atol=1e-5)


def test_linear_and_convolutional_projections_are_the_same_mathematics():
    settings = dict(heads=2, depth=1, context_width=8, groups=4)
    convolution = attention.SpatialTransformer(16, **settings, linear_projection=False)
    linear = attention.SpatialTransformer(16, **settings, linear_projection=True)
    state = {
        name: value.squeeze(-1).squeeze(-1) if name in ("proj_in.weight", "proj_out.weight") else value
        for name, value in convolution.state_dict().items()
    }
    linear.load_state_dict(state)
    x, context = torch.randn(2, 16, 4, 6), torch.randn(2, 3, 8)
    torch.testing.assert_close(linear(x, context), convolution(x, context), rtol=1e-5, atol=1e-5)


def test_heads_that_do_not_divide_are_refused():
    with pytest.raises(ConfigError, match="10 channels do not divide into 4 heads"):
        attention.Attention(10, heads=4)
