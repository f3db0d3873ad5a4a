"""The denoising U-Net with cross-attention, in the layouts of Stable Diffusion 1 and 2 and of SDXL.

Rombach et al. 2022, section 3.3; Podell et al. 2023, section 2.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from latentray.config.denoiser import DenoiserConfig
from latentray.models.attention import SpatialTransformer
from latentray.models.context_encoder import ContextEncoder
from latentray.models.embeddings import AddedConditions, ClassEmbedding, required, sinusoidal_embedding
from latentray.models.layers import Downsample, ResBlock, group_norm, laid_out
from latentray.models.upsampling import Upsample

_EPS = 1e-5


class Block(nn.Module):
    """A residual block, a spatial transformer where the level has one, and a change of resolution at a level's end.

    The change of resolution is the network's to apply: a skip connection may come before it. A video network puts a layer
    over time behind either (`models/video.py`); `positions_BT` are its frames'.
    """

    def __init__(
        self, res: ResBlock, transformer: SpatialTransformer | None, resample: Downsample | Upsample | None = None
    ) -> None:
        super().__init__()
        self.res, self.transformer, self.resample = res, transformer, resample
        self.temporal_convolution: nn.Module | None = None
        self.temporal_attention: nn.Module | None = None

    def forward(
        self,
        x: Tensor,
        time: Tensor,
        context: Tensor | None,
        skip: Tensor | None = None,
        positions_BT: Tensor | None = None,
    ) -> Tensor:
        x = self.res(x if skip is None else torch.cat([x, skip], dim=1), time)
        if self.temporal_convolution is not None:
            x = self.temporal_convolution(x, positions_BT)
        if self.transformer is not None:
            x = self.transformer(x, context)
        return x if self.temporal_attention is None else self.temporal_attention(x, positions_BT)


class DownwardHalf(nn.Module):
    """The way down and the middle, told the noise level: what denoiser and classifier of noisy latents have in common."""

    def __init__(self, config: DenoiserConfig) -> None:
        super().__init__()
        self.config = config
        widths, time_width = config.channels, 4 * config.channels[0]
        self.time_in, self.time_out = nn.Linear(widths[0], time_width), nn.Linear(time_width, time_width)
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        width = widths[0]
        down: list[Block] = []
        for level, out in enumerate(widths):
            for _ in range(config.blocks):
                down.append(Block(self._res(width, out), self._transformer(level, config.depth[level])))
                width = out
            if level < len(widths) - 1:
                down[-1].resample = Downsample(width, asymmetric=False)
        self.down = nn.ModuleList(down)
        self.middle_in = Block(self._res(width, width), self._transformer(len(widths) - 1, config.middle_depth))
        self.middle_out = self._res(width, width)

    def _res(self, in_channels: int, out_channels: int) -> ResBlock:
        time_width = 4 * self.config.channels[0]
        return ResBlock(in_channels, out_channels, groups=self.config.groups, eps=_EPS, time_width=time_width)

    def _transformer(self, level: int, depth: int) -> SpatialTransformer | None:
        if depth == 0:
            return None
        return SpatialTransformer(
            self.config.channels[level],
            heads=self.config.heads_at(level),
            depth=depth,
            context_width=self.config.context_width,
            groups=self.config.groups,
            linear_projection=self.config.linear_projection,
        )

    def _noise_level(self, t_B: Tensor, dtype: torch.dtype) -> Tensor:
        """(B, 4 channels[0])."""
        time = sinusoidal_embedding(t_B, self.config.channels[0]).to(dtype)
        return self.time_out(F.silu(self.time_in(time)))

    def _descended(
        self, u_BChw: Tensor, time: Tensor, context: Tensor | None = None, positions_BT: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """The middle's output, and what skip connections take up again."""
        h = self.conv_in(laid_out(u_BChw))
        skips = [h]
        for block in self.down:
            h = self._run(block, h, time, context, None, positions_BT)
            skips.append(h)
            if block.resample is not None:
                h = block.resample(h)
                skips.append(h)
        h = self._run(self.middle_in, h, time, context, None, positions_BT)
        return self._run(self.middle_out, h, time), skips

    def _run(self, block: nn.Module, *args: Tensor | None) -> Tensor:
        if self.config.checkpoint_activations and torch.is_grad_enabled():
            return checkpoint(block, *args, use_reentrant=False, preserve_rng_state=False)
        return block(*args)


class UNet(DownwardHalf):
    """y = net(u, t, context).

    forward(u_BChw, t_B, context_BLD, pooled=(B,D), size=(B,N), labels=(B,)) -> (B, out_channels, h, w). `t` is what the
    network was trained on: 0 ... T-1 for a discrete schedule, 1000 t for flows. h and w are any. Conditions that the
    configuration has no use for are ignored; those it reads and does not get are refused with ConfigError. With a learned text
    encoder the context is token numbers (B,L,1), or what `read` made of them: once is enough for all steps of a sampling.
    """

    def __init__(self, config: DenoiserConfig) -> None:
        super().__init__(config)
        assert config.family in ("unet", "video")
        widths, time_width = config.channels, 4 * config.channels[0]
        skips, width = _skips(config), widths[-1]
        up: list[Block] = []
        for level, out in reversed(list(enumerate(widths))):
            for _ in range(config.blocks + 1):
                entering = self._res(width + skips.pop(), out)
                up.append(Block(entering, self._transformer(level, config.depth[level])))
                width = out
            if level > 0:
                up[-1].resample = Upsample(width)
        self.up = nn.ModuleList(up)
        self.norm_out = group_norm(width, config.groups, eps=_EPS)
        self.conv_out = nn.Conv2d(width, config.out_channels, 3, padding=1)
        # Last, so that a network without them draws the same initial weights as before there were any.
        self.added = (
            AddedConditions(
                pooled_width=config.pooled_width,
                size_numbers=config.size_numbers,
                size_width=config.size_width,
                width=time_width,
            )
            if config.pooled_width is not None or config.size_numbers
            else None
        )
        self.classes = ClassEmbedding(config.classes, time_width) if config.classes is not None else None
        self.context_encoder: ContextEncoder | None = None
        if config.context_layers:
            assert config.context_width is not None and config.context_vocabulary is not None
            self.context_encoder = ContextEncoder(
                vocabulary=config.context_vocabulary,
                tokens=config.context_tokens,
                width=config.context_width,
                layers=config.context_layers,
                heads=config.context_heads,
            )

    def read(self, context_BLD: Tensor | None) -> Tensor | None:
        """Token numbers (B,L,1) -> the context that the learned text encoder makes of them; any other context as it is."""
        if self.context_encoder is None or context_BLD is None or context_BLD.is_floating_point():
            return context_BLD
        return self.context_encoder(context_BLD)

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
        return self._drawn(u_BChw, t_B, self.read(context_BLD), pooled=pooled, size=size, labels=labels)

    def _drawn(
        self,
        u_BChw: Tensor,
        t_B: Tensor,
        context_BLD: Tensor | None,
        *,
        pooled: Tensor | None,
        size: Tensor | None,
        labels: Tensor | None,
        positions_BT: Tensor | None = None,
    ) -> Tensor:
        context = required(context_BLD, "context") if self.config.context_width is not None else None
        time = self._time(t_B, u_BChw.dtype, pooled, size, labels)
        h, skips = self._descended(u_BChw, time, context, positions_BT)
        for block in self.up:
            h = self._run(block, h, time, context, skips.pop(), positions_BT)
            if block.resample is not None:
                h = block.resample(h, skips[-1].shape[-2:])
        return self.conv_out(self.norm_out(h, silu=True, inplace=True))

    def _time(
        self, t_B: Tensor, dtype: torch.dtype, pooled: Tensor | None, size: Tensor | None, labels: Tensor | None
    ) -> Tensor:
        """(B, 4 channels[0]): all that is told to the residual blocks."""
        time = self._noise_level(t_B, dtype)
        if self.classes is not None:
            time = time + self.classes(required(labels, "labels"))
        if self.added is not None:
            time = time + self.added(pooled, size, dtype)
        return time


def _skips(config: DenoiserConfig) -> list[int]:
    """Widths of the maps that `_descended` keeps, in their order."""
    widths = config.channels
    found = [widths[0]]
    for level, width in enumerate(widths):
        found += [width] * (config.blocks + (level < len(widths) - 1))
    return found
