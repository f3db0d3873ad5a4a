"""Attention on a CPU, by what is fastest there for its lengths and type, with gradients or without.

torch's fused attention loses to explicit products in three places: in its backward pass over few keys (up to 4x); in its
backward pass in bf16 over many (up to 1.7x), where products of a few heads at a time stay in the cache, over weights that are
computed again; and in its bf16 forward pass where the number of keys is no multiple of 16 (2x), which padding mends.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

_FEW = 256
"""Keys up to which explicit products are kept for the way back."""
_TILE = 16
"""Keys that the bf16 forward takes at a time: 77 tokens of CLIP are no multiple of it."""
_TOGETHER = 2**21
"""Attention weights computed at a time on the way back: they stay in a core's cache."""


def attend(q_BHLD: Tensor, k_BHMD: Tensor, v_BHMD: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v, shape (B,H,L,D) (Vaswani et al. 2017, equation 1)."""
    if not torch.is_grad_enabled():
        return _fused(q_BHLD, k_BHMD, v_BHMD)
    if k_BHMD.shape[-2] <= _FEW:
        weights = (q_BHLD * q_BHLD.shape[-1] ** -0.5) @ k_BHMD.transpose(-1, -2)
        return weights.softmax(dim=-1) @ v_BHMD
    if q_BHLD.dtype != torch.bfloat16:
        return F.scaled_dot_product_attention(q_BHLD, k_BHMD, v_BHMD)
    if torch.compiler.is_compiling():
        return _operator(q_BHLD, k_BHMD, v_BHMD)
    return _Attention.apply(q_BHLD, k_BHMD, v_BHMD)  # type: ignore[no-any-return, no-untyped-call]


def _fused(q_BHLD: Tensor, k_BHMD: Tensor, v_BHMD: Tensor) -> Tensor:
    """torch's own, with keys that are masked up to a whole number of tiles in bf16."""
    spare = -k_BHMD.shape[-2] % _TILE
    if not spare or q_BHLD.dtype != torch.bfloat16:
        return F.scaled_dot_product_attention(q_BHLD, k_BHMD, v_BHMD)
    mask_M = torch.zeros(k_BHMD.shape[-2] + spare, dtype=q_BHLD.dtype, device=q_BHLD.device)
    mask_M[-spare:] = -torch.inf
    k_BHMD, v_BHMD = (F.pad(both, (0, 0, 0, spare)) for both in (k_BHMD, v_BHMD))
    return F.scaled_dot_product_attention(q_BHLD, k_BHMD, v_BHMD, attn_mask=mask_M.expand(q_BHLD.shape[-2], -1))


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, v)
        return _fused(q, k, v)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return _gradients(dy, *ctx.saved_tensors)


def _gradients(dy: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; N heads of all samples stand one after another, n are done at a time."""
    (B, H, L, D), M = q.shape, k.shape[-2]
    N, n = B * H, max(min(_TOGETHER // (L * M), B * H), 1)
    q_NLD, dy_NLD = (one.reshape(N, L, D) for one in (q, dy))
    k_NMD, v_NMD = (one.reshape(N, M, D) for one in (k, v))
    dq_NLD, dk_NMD, dv_NMD = q.new_empty(N, L, D), q.new_empty(N, M, D), q.new_empty(N, M, D)
    weights, d_weights = q.new_empty(n, L, M), q.new_empty(n, L, M)
    for begin in range(0, N, n):
        these = slice(begin, min(begin + n, N))
        p, dp = weights[: these.stop - begin], d_weights[: these.stop - begin]
        scaled, given = q_NLD[these] * D**-0.5, dy_NLD[these]
        # bmm takes a transposed matrix as it lies; `@` would copy it, which takes five times the product.
        torch.softmax(torch.bmm(scaled, k_NMD[these].mT, out=p), -1, out=p)
        torch.bmm(p.mT, given, out=dv_NMD[these])
        torch.bmm(given, v_NMD[these].mT, out=dp)
        torch._softmax_backward_data(dp, p, -1, dp.dtype, grad_input=dp)
        torch.bmm(dp, k_NMD[these], out=dq_NLD[these])
        torch.bmm(dp.mT, scaled, out=dk_NMD[these])
    return dq_NLD.mul_(D**-0.5).view_as(q), dk_NMD.view_as(k), dv_NMD.view_as(v)


@torch.library.custom_op("latentray::attention", mutates_args=())
def _operator(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _fused(q, k, v).contiguous()


@torch.library.custom_op("latentray::attention_backward", mutates_args=())
def _back_operator(dy: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _gradients(dy, q, k, v)


@_operator.register_fake
def _(q: Any, k: Any, v: Any) -> Any:
    return q.new_empty(q.shape)


@_back_operator.register_fake
def _(dy: Any, q: Any, k: Any, v: Any) -> Any:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


_operator.register_autograd(
    lambda ctx, dy: _back_operator(dy, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)
