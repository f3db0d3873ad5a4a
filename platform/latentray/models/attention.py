"""Scaled dot-product attention and the transformer block of latent-diffusion U-Nets."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from latentray.errors import ConfigError
from latentray.models import cpu_attention, fused
from latentray.models.layers import group_norm

_CACHED = 2**21
"""Numbers between the two products of a feed-forward that stay in a CPU's cache; more go sample by sample."""
_NORM_EPS = 1e-6


def attend(q_BHLD: Tensor, k_BHMD: Tensor, v_BHMD: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v, shape (B,H,L,D) (Vaswani et al. 2017, equation 1)."""
    if q_BHLD.device.type == "cpu":
        return cpu_attention.attend(q_BHLD, k_BHMD, v_BHMD)
    return F.scaled_dot_product_attention(q_BHLD, k_BHMD, v_BHMD)


class Attention(nn.Module):
    """Multi-head attention of x over `context`, or over itself where there is none.

    Args:
        width: channels of x.
        context_width: channels of the context; None for self-attention.
        heads: number of heads; must divide width.
        qk_norm: normalise each head's queries and keys by their root mean square (Esser et al. 2024, section 5.3.2).
        output: project what was attended to; False leaves it to nobody (the text of an MMDiT's last block).
    """

    def __init__(
        self,
        width: int,
        *,
        heads: int,
        context_width: int | None = None,
        bias: bool = False,
        qk_norm: bool = False,
        output: bool = True,
    ) -> None:
        super().__init__()
        if width % heads:
            raise ConfigError(
                f"{width} channels do not divide into {heads} heads.",
                where="heads",
                mend="Choose another number of heads.",
            )
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=bias)
        self.to_k = nn.Linear(context_width or width, width, bias=bias)
        self.to_v = nn.Linear(context_width or width, width, bias=bias)
        self.to_out = nn.Linear(width, width) if output else None
        self.norm_q = nn.RMSNorm(width // heads, eps=_NORM_EPS) if qk_norm else None
        self.norm_k = nn.RMSNorm(width // heads, eps=_NORM_EPS) if qk_norm else None

    def project(self, x_BLD: Tensor, context_BMD: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of x, keys and values of the context, (B,H,L,D) each."""
        context = x_BLD if context_BMD is None else context_BMD
        q, k, v = (
            project(source).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project, source in ((self.to_q, x_BLD), (self.to_k, context), (self.to_v, context))
        )
        if self.norm_q is not None and self.norm_k is not None:
            q, k = self.norm_q(q), self.norm_k(k)
        return q, k, v

    def merge(self, attended_BHLD: Tensor) -> Tensor:
        """The heads side by side, (B,L,D), projected."""
        assert self.to_out is not None
        return self.to_out(attended_BHLD.transpose(1, 2).flatten(2))

    def forward(self, x_BLD: Tensor, context_BMD: Tensor | None = None) -> Tensor:
        return self.merge(attend(*self.project(x_BLD, context_BMD)))


class FeedForward(nn.Module):
    """GEGLU feed-forward of four times the width (Shazeer 2020)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 8 * width)
        self.out = nn.Linear(4 * width, width)

    def forward(self, x_BLD: Tensor) -> Tensor:
        large = x_BLD.shape[:-1].numel() * self.proj.out_features > _CACHED
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or not (large and _bf16_on_cpu(x_BLD)):
            return self._geglu(x_BLD)
        return torch.cat([self._geglu(x_1LD) for x_1LD in x_BLD.split(1)])

    def _geglu(self, x: Tensor) -> Tensor:
        both = self.proj(x)
        if fused.gates(both):
            return self.out(fused.geglu(both))
        value, gate = both.chunk(2, dim=-1)
        if _bf16_on_cpu(gate):
            gate = gate.contiguous()  # where GELU is vectorised; the same bits, which is not so in float32
        gate = F.gelu(gate)
        return self.out(value * gate if torch.is_grad_enabled() else gate.mul_(value))


def _bf16_on_cpu(x: Tensor) -> bool:
    return x.dtype == torch.bfloat16 and x.device.type == "cpu"


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention and feed-forward, each with LayerNorm before and a residual around.

    Without a context the second attention is self-attention too.
    """

    def __init__(self, width: int, *, heads: int, context_width: int | None) -> None:
        super().__init__()
        self.norm1, self.attn1 = nn.LayerNorm(width), Attention(width, heads=heads)
        self.norm2, self.attn2 = nn.LayerNorm(width), Attention(width, heads=heads, context_width=context_width)
        self.norm3, self.ff = nn.LayerNorm(width), FeedForward(width)

    def forward(self, x_BLD: Tensor, context_BMD: Tensor | None) -> Tensor:
        x = x_BLD + self.attn1(self.norm1(x_BLD))
        x = x + self.attn2(self.norm2(x), context_BMD)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Transformer blocks over the pixels of a feature map, around a residual (Rombach et al. 2022, appendix E.2.1).

    Args:
        linear_projection: project by Linear (SD 2, SDXL) instead of 1x1 convolution (SD 1); the same mathematics,
            another weight layout.
    """

    def __init__(
        self, channels: int, *, heads: int, depth: int, context_width: int | None, groups: int, linear_projection: bool
    ) -> None:
        super().__init__()
        self.linear_projection = linear_projection
        self.norm = group_norm(channels, groups, eps=1e-6)
        self.proj_in = nn.Linear(channels, channels) if linear_projection else nn.Conv2d(channels, channels, 1)
        self.blocks = nn.ModuleList(
            TransformerBlock(channels, heads=heads, context_width=context_width) for _ in range(depth)
        )
        self.proj_out = nn.Linear(channels, channels) if linear_projection else nn.Conv2d(channels, channels, 1)

    def forward(self, x_BCHW: Tensor, context_BMD: Tensor | None) -> Tensor:
        size = x_BCHW.shape[-2:]
        h = self.norm(x_BCHW)
        if self.linear_projection:
            h = self.proj_in(h.flatten(2).transpose(1, 2))
        else:
            h = self.proj_in(h).flatten(2).transpose(1, 2)
        for block in self.blocks:
            h = block(h, context_BMD)
        if self.linear_projection:
            h = self.proj_out(h).transpose(1, 2).unflatten(-1, size)
        else:
            h = self.proj_out(h.transpose(1, 2).unflatten(-1, size))
        return x_BCHW + h


class PixelAttention(nn.Module):
    """One-head self-attention over the pixels of a feature map: the middle of Stable Diffusion's autoencoder."""

    def __init__(self, channels: int, *, groups: int) -> None:
        super().__init__()
        self.norm = group_norm(channels, groups, eps=1e-6)
        self.attn = Attention(channels, heads=1, bias=True)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        h = self.attn(self.norm(x_BCHW).flatten(2).transpose(1, 2))
        return x_BCHW + h.transpose(1, 2).unflatten(-1, x_BCHW.shape[-2:])
