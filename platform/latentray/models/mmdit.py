"""The multimodal diffusion transformer of Stable Diffusion 3 and 3.5 (Esser et al. 2024, section 4 and figure 2).

Picture tokens and text tokens keep weights of their own and meet in one attention over both.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from latentray.config.denoiser import DenoiserConfig
from latentray.errors import ConfigError
from latentray.models.attention import Attention, attend
from latentray.models.embeddings import Perceptron, grid_positions, required, sinusoidal_embedding

_EPS = 1e-6
_TIME_WIDTH = 256


def _zero_linear(in_width: int, out_width: int) -> nn.Linear:
    """A Linear that begins as zero: with it every block begins as the identity (adaLN-zero, Peebles & Xie 2023)."""
    linear = nn.Linear(in_width, out_width)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


def _norm(x_BLD: Tensor) -> Tensor:
    return F.layer_norm(x_BLD, x_BLD.shape[-1:], eps=_EPS)


def _modulated(normed_BLD: Tensor, shift_BD: Tensor, scale_BD: Tensor) -> Tensor:
    return torch.addcmul(shift_BD[:, None], normed_BLD, 1 + scale_BD[:, None])


class _FeedForward(nn.Module):
    """Four times the width, with GELU by its tanh approximation."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x_BLD: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x_BLD), approximate="tanh"))


class _Stream(nn.Module):
    """The weights of one kind of token in a block.

    `modulation` gives shift, scale and gate before the attention, the same before the feed-forward, and a third time
    before the second attention where there is one. The text of the last block is read only: scale and shift alone.
    """

    def __init__(self, width: int, *, heads: int, qk_norm: bool, dual: bool = False, read_only: bool = False) -> None:
        super().__init__()
        self.modulation = _zero_linear(width, (2 if read_only else 9 if dual else 6) * width)
        self.attn = Attention(width, heads=heads, bias=True, qk_norm=qk_norm, output=not read_only)
        self.attn2 = Attention(width, heads=heads, bias=True, qk_norm=qk_norm) if dual else None
        self.ff = None if read_only else _FeedForward(width)

    def add(self, x_BLD: Tensor, attended_BHLD: Tensor, normed_BLD: Tensor, parts: tuple[Tensor, ...]) -> Tensor:
        """x with what it attended to, its second attention and its feed-forward added."""
        assert self.ff is not None
        _, _, gate, shift_ff, scale_ff, gate_ff, *second = parts
        x = torch.addcmul(x_BLD, gate[:, None], self.attn.merge(attended_BHLD))
        if self.attn2 is not None:
            shift, scale, gate = second
            x = torch.addcmul(x, gate[:, None], self.attn2(_modulated(normed_BLD, shift, scale)))
        return torch.addcmul(x, gate_ff[:, None], self.ff(_modulated(_norm(x), shift_ff, scale_ff)))


class JointBlock(nn.Module):
    """Picture and text tokens attend to one another, then each goes through a feed-forward of its own.

    Args:
        dual: a second self-attention over the picture alone, beside the joint one (SD 3.5 medium).
        last: the text is read for the last time: it is neither attended from nor passed on.
    """

    def __init__(self, width: int, *, heads: int, qk_norm: bool, dual: bool, last: bool) -> None:
        super().__init__()
        self.picture = _Stream(width, heads=heads, qk_norm=qk_norm, dual=dual)
        self.text = _Stream(width, heads=heads, qk_norm=qk_norm, read_only=last)

    def forward(self, x_BLD: Tensor, text_BMD: Tensor, vector_BD: Tensor) -> tuple[Tensor, Tensor]:
        """`vector` is the embedding of time and pooled text, through SiLU."""
        picture_parts = self.picture.modulation(vector_BD).chunk(9 if self.picture.attn2 is not None else 6, dim=1)
        normed, normed_text = _norm(x_BLD), _norm(text_BMD)
        if self.text.ff is None:
            text_scale, text_shift = self.text.modulation(vector_BD).chunk(2, dim=1)
            text_parts: tuple[Tensor, ...] = ()
        else:
            text_parts = self.text.modulation(vector_BD).chunk(6, dim=1)
            text_shift, text_scale = text_parts[:2]
        own = self.picture.attn.project(_modulated(normed, picture_parts[0], picture_parts[1]))
        other = self.text.attn.project(_modulated(normed_text, text_shift, text_scale))
        attended = attend(*(torch.cat(pair, dim=2) for pair in zip(own, other, strict=True)))
        seen, seen_by_text = attended.split([x_BLD.shape[1], text_BMD.shape[1]], dim=2)
        x = self.picture.add(x_BLD, seen, normed, picture_parts)
        return x, self.text.add(text_BMD, seen_by_text, normed_text, text_parts) if text_parts else text_BMD


class MMDiT(nn.Module):
    """y = net(u, t, context, pooled=...).

    forward(u_BChw, t_B, context_BLD, pooled=(B,D)) -> (B, out_channels, h, w). h and w divide by the patch, into at most
    max_grid tokens each. `size` and `labels` are taken, so that every family is called alike, and ignored.
    """

    def __init__(self, config: DenoiserConfig) -> None:
        super().__init__()
        assert config.family == "mmdit" and config.heads is not None and config.context_width is not None
        self.config = config
        width = config.width
        self.patch_in = nn.Conv2d(config.in_channels, width, config.patch, stride=config.patch)
        self.register_buffer("positions", grid_positions(width, config.max_grid, config.base_grid))
        self.time = Perceptron(_TIME_WIDTH, width)
        self.pooled = Perceptron(config.pooled_width, width) if config.pooled_width is not None else None
        self.context_in = nn.Linear(config.context_width, width)
        self.blocks = nn.ModuleList(
            JointBlock(
                width,
                heads=config.heads,
                qk_norm=config.qk_norm,
                dual=number in config.dual_attention,
                last=number == config.layers - 1,
            )
            for number in range(config.layers)
        )
        self.modulation_out = _zero_linear(width, 2 * width)
        self.proj_out = _zero_linear(width, config.patch**2 * config.out_channels)

    def forward(
        self,
        u_BChw: Tensor,
        t_B: Tensor,
        context_BLD: Tensor | None = None,
        *,
        pooled: Tensor | None = None,
        size: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Tensor:
        rows, columns = (side // self.config.patch for side in u_BChw.shape[-2:])
        x = self.patch_in(u_BChw).flatten(2).transpose(1, 2)
        x = (x + self._positions(u_BChw.shape[-2], u_BChw.shape[-1])).to(u_BChw.dtype)
        text = self.context_in(required(context_BLD, "context"))
        vector = self.time(sinusoidal_embedding(t_B, _TIME_WIDTH).to(u_BChw.dtype))
        if self.pooled is not None:
            vector = vector + self.pooled(required(pooled, "pooled"))
        vector = F.silu(vector)
        for block in self.blocks:
            if self.config.checkpoint_activations and torch.is_grad_enabled():
                x, text = checkpoint(block, x, text, vector, use_reentrant=False, preserve_rng_state=False)
            else:
                x, text = block(x, text, vector)
        scale, shift = self.modulation_out(vector).chunk(2, dim=1)
        y = self.proj_out(_modulated(_norm(x), shift, scale))
        y = y.unflatten(2, (self.config.patch, self.config.patch, -1)).unflatten(1, (rows, columns))
        return y.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)

    def _positions(self, height: int, width: int) -> Tensor:
        """(L, D): the middle of the table, for a latent of this size. Raises ConfigError for one that does not fit."""
        patch, grid = self.config.patch, self.config.max_grid
        if height % patch or width % patch or max(height, width) > patch * grid:
            raise ConfigError(
                f"A latent of {width}x{height} is no grid of {patch}x{patch} patches, at most {grid} along each side.",
                where="size",
                mend=f"Choose multiples of {patch} latent pixels, up to {patch * grid}.",
            )
        rows, columns = height // patch, width // patch
        top, left = (grid - rows) // 2, (grid - columns) // 2
        return self.positions[top : top + rows, left : left + columns].flatten(0, 1)
