"""The policy: a 1-D conditional U-Net over a sequence of actions, told what was seen by FiLM.

Chi et al. 2023, "Diffusion Policy: Visuomotor Policy Learning via Action Diffusion", section III.A; its own code's layout:
the first level's skip connection is not read, since nothing is cut into half before it.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from latentray.config.denoiser import DenoiserConfig
from latentray.errors import ConfigError
from latentray.models.embeddings import required, sinusoidal_embedding
from latentray.models.layers import group_norm

_EPS = 1e-5


class _ConvBlock(nn.Module):
    """Convolution along the steps, GroupNorm, Mish."""

    def __init__(self, in_channels: int, out_channels: int, *, kernel: int, groups: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(in_channels, out_channels, kernel, padding=kernel // 2)
        self.norm = group_norm(out_channels, groups, eps=_EPS)

    def forward(self, x_BCT: Tensor) -> Tensor:
        return F.mish(self.norm(self.conv(x_BCT)))


class _ResBlock(nn.Module):
    """Two convolutions around an identity or 1x1 skip; between them FiLM: scale x + shift, both read off what is told.

    Perez et al. 2018, "FiLM: Visual Reasoning with a General Conditioning Layer".
    """

    def __init__(self, in_channels: int, out_channels: int, *, told_width: int, kernel: int, groups: int) -> None:
        super().__init__()
        self.first = _ConvBlock(in_channels, out_channels, kernel=kernel, groups=groups)
        self.film = nn.Linear(told_width, 2 * out_channels)
        self.second = _ConvBlock(out_channels, out_channels, kernel=kernel, groups=groups)
        self.skip = nn.Conv1d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x_BCT: Tensor, told_BD: Tensor) -> Tensor:
        scale, shift = self.film(F.mish(told_BD))[..., None].chunk(2, dim=1)
        return self.second(scale * self.first(x_BCT) + shift) + self.skip(x_BCT)


class ActionUNet(nn.Module):
    """y = net(u, t, None, observations=...).

    forward(u_BTA, t_B, context, observations=(B, To, D)) -> (B, T, A). `t` is what the network was trained on: 0 ... T-1 for
    a discrete schedule, 1000 t for flows. T is any multiple of 2^(levels - 1); To and D are the configuration's. A context is
    ignored. Raises ConfigError for observations that are missing or of another shape.
    """

    def __init__(self, config: DenoiserConfig) -> None:
        super().__init__()
        assert config.family == "policy"
        self.config = config
        widths = config.channels
        time_width = widths[0]
        seen_width = config.observation_steps * (config.observation_width or 0)
        self.time_in, self.time_out = nn.Linear(time_width, 4 * time_width), nn.Linear(4 * time_width, time_width)

        def run(in_channels: int, out_channels: int) -> nn.ModuleList:
            """A level's residual blocks."""
            ends = [in_channels, *[out_channels] * config.blocks]
            told = time_width + seen_width
            return nn.ModuleList(
                _ResBlock(i, o, told_width=told, kernel=config.kernel, groups=config.groups)
                for i, o in itertools.pairwise(ends)
            )

        begins = [config.in_channels, *widths[:-1]]
        self.down = nn.ModuleList(run(i, o) for i, o in zip(begins, widths, strict=True))
        self.shrink = nn.ModuleList(nn.Conv1d(width, width, 3, stride=2, padding=1) for width in widths[:-1])
        self.middle = run(widths[-1], widths[-1])
        finer = list(itertools.pairwise(widths))[::-1]
        self.up = nn.ModuleList(run(2 * coarse, fine) for fine, coarse in finer)
        self.grow = nn.ModuleList(nn.ConvTranspose1d(fine, fine, 4, stride=2, padding=1) for fine, _ in finer)
        self.last = _ConvBlock(widths[0], widths[0], kernel=config.kernel, groups=config.groups)
        self.out = nn.Conv1d(widths[0], config.out_channels, 1)

    def forward(
        self, u_BTA: Tensor, t_B: Tensor, context: Tensor | None = None, *, observations: Tensor | None = None
    ) -> Tensor:
        told = self._told(t_B, self._seen(observations).to(u_BTA.dtype))
        h, skips = u_BTA.transpose(1, 2), []
        for level, blocks in enumerate(self.down):
            h = self._run(blocks, h, told)
            skips.append(h)
            if level < len(self.shrink):
                h = self.shrink[level](h)
        h = self._run(self.middle, h, told)
        for blocks, grow in zip(self.up, self.grow, strict=True):
            h = grow(self._run(blocks, torch.cat([h, skips.pop()], dim=1), told))
        return self.out(self.last(h)).transpose(1, 2)

    def _seen(self, observations_BTD: Tensor | None) -> Tensor:
        seen = required(observations_BTD, "observations")
        wanted = (self.config.observation_steps, self.config.observation_width)
        if seen.ndim != 3 or tuple(seen.shape[1:]) != wanted:
            raise ConfigError(
                f"The policy reads (B, {wanted[0]}, {wanted[1]}), and got {tuple(seen.shape)}.",
                where="observations",
                mend="Pass as many steps and numbers as denoiser.observation_steps and observation_width say.",
            )
        return seen

    def _told(self, t_B: Tensor, seen_BTD: Tensor) -> Tensor:
        """(B, channels[0] + To D): the noise level's embedding and what was seen."""
        time = sinusoidal_embedding(t_B, self.config.channels[0]).to(seen_BTD.dtype)
        return torch.cat([self.time_out(F.mish(self.time_in(time))), seen_BTD.flatten(1)], dim=1)

    def _run(self, blocks: nn.Module, h: Tensor, told: Tensor) -> Tensor:
        assert isinstance(blocks, nn.ModuleList)
        for block in blocks:
            if self.config.checkpoint_activations and torch.is_grad_enabled():
                h = checkpoint(block, h, told, use_reentrant=False, preserve_rng_state=False)
            else:
                h = block(h, told)
        return h
