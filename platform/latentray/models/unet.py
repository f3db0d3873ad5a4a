"""The denoising U-Net with cross-attention (Rombach et al. 2022, section 3.3), in Stable Diffusion's layout."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from latentray.config.denoiser import DenoiserConfig
from latentray.models.attention import SpatialTransformer
from latentray.models.layers import Downsample, ResBlock, Upsample, group_norm, sinusoidal_embedding

_EPS = 1e-5


class _Block(nn.Module):
    """A residual block, a spatial transformer where the level has one, and a change of resolution at a level's end."""

    def __init__(
        self, res: ResBlock, transformer: SpatialTransformer | None, resample: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.res, self.transformer, self.resample = res, transformer, resample

    def forward(self, x: Tensor, time: Tensor, context: Tensor | None) -> Tensor:
        x = self.res(x, time)
        return x if self.transformer is None else self.transformer(x, context)


class UNet(nn.Module):
    """y = net(u, t, context).

    forward(u_BChw, t_B, context_BLD) -> (B, out_channels, h, w). `t` is what the network was trained on: 0 ... T-1 for a
    discrete schedule, 1000 t for flows. h and w must divide by 2^(levels-1).
    """

    def __init__(self, config: DenoiserConfig) -> None:
        super().__init__()
        self.config = config
        widths, time_width = config.channels, 4 * config.channels[0]
        self.time_in, self.time_out = nn.Linear(widths[0], time_width), nn.Linear(time_width, time_width)
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)

        def res(i: int, o: int) -> ResBlock:
            return ResBlock(i, o, groups=config.groups, eps=_EPS, time_width=time_width)

        def transformer(width: int, depth: int) -> SpatialTransformer | None:
            if depth == 0:
                return None
            return SpatialTransformer(
                width,
                heads=config.heads_at(width),
                depth=depth,
                context_width=config.context_width,
                groups=config.groups,
                linear_projection=config.linear_projection,
            )

        width, skips = widths[0], [widths[0]]
        down: list[_Block] = []
        for level, out in enumerate(widths):
            for _ in range(config.blocks):
                down.append(_Block(res(width, out), transformer(out, config.depth[level])))
                width = out
                skips.append(width)
            if level < len(widths) - 1:
                down[-1].resample = Downsample(width, asymmetric=False)
                skips.append(width)
        self.down = nn.ModuleList(down)
        self.middle_in = _Block(res(width, width), transformer(width, config.middle_depth))
        self.middle_out = res(width, width)
        up: list[_Block] = []
        for level, out in reversed(list(enumerate(widths))):
            for _ in range(config.blocks + 1):
                up.append(_Block(res(width + skips.pop(), out), transformer(out, config.depth[level])))
                width = out
            if level > 0:
                up[-1].resample = Upsample(width)
        self.up = nn.ModuleList(up)
        self.norm_out = group_norm(width, config.groups, eps=_EPS)
        self.conv_out = nn.Conv2d(width, config.out_channels, 3, padding=1)

    def forward(self, u_BChw: Tensor, t_B: Tensor, context_BLD: Tensor | None = None) -> Tensor:
        time = sinusoidal_embedding(t_B, self.config.channels[0]).to(u_BChw.dtype)
        time = self.time_out(F.silu(self.time_in(time)))
        h = self.conv_in(u_BChw)
        skips = [h]
        for block in self.down:
            h = block(h, time, context_BLD)
            skips.append(h)
            if block.resample is not None:
                h = block.resample(h)
                skips.append(h)
        h = self.middle_out(self.middle_in(h, time, context_BLD), time)
        for block in self.up:
            h = block(torch.cat([h, skips.pop()], dim=1), time, context_BLD)
            if block.resample is not None:
                h = block.resample(h)
        return self.conv_out(F.silu(self.norm_out(h)))
