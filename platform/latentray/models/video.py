"""The video U-Net: an image U-Net with layers over time behind its own (Blattmann et al. 2023, section 3.1).

A temporal convolution stands behind each residual block on the way down and up, a temporal attention behind each spatial
transformer. Its weights are the image U-Net's, by the same names, and those of the layers over time beside them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from latentray.config.denoiser import DenoiserConfig
from latentray.errors import ConfigError
from latentray.models.temporal import TemporalAttention, TemporalConvolution
from latentray.models.unet import Block, UNet

_LAYERS = ("temporal_convolution", "temporal_attention")


def is_temporal(name: str) -> bool:
    """Whether a weight belongs to a layer over time, by its name in the state dict."""
    return not set(_LAYERS).isdisjoint(name.split("."))


class VideoUNet(UNet):
    """y = net(u, t, context).

    forward(u_BTChw, t_B, context_BLD, pooled=(B,D), size=(B,N), labels=(B,), positions=(B,T)) -> (B,T,out_channels,h,w).
    All frames of a clip share noise level and conditions. Any number of frames is taken, one too; `positions` says when
    each is, in frames of the clips that the network was trained on, 0 ... T-1 where it is left out. With fresh temporal
    layers each frame is drawn as the image U-Net would draw it, exactly.
    """

    def __init__(self, config: DenoiserConfig) -> None:
        super().__init__(config)
        assert config.family == "video"
        # After the image's own, so that these begin with the very weights of an image U-Net of the same seed.
        for level, block in self._levels():
            width = config.channels[level]
            if config.temporal_convolution:
                block.temporal_convolution = TemporalConvolution(width, groups=config.groups)
            if config.temporal_attention and block.transformer is not None:
                heads = config.temporal_heads or config.heads_at(level)
                block.temporal_attention = TemporalAttention(width, heads=heads, groups=config.groups)
        if config.train_only_temporal:
            for name, parameter in self.named_parameters():
                parameter.requires_grad_(is_temporal(name))

    def _levels(self) -> list[tuple[int, Block]]:
        """Every block and the number of its level."""
        last, blocks = len(self.config.channels) - 1, self.config.blocks
        found = [(place // blocks, block) for place, block in enumerate(self.down)]
        found.append((last, self.middle_in))
        found += [(last - place // (blocks + 1), block) for place, block in enumerate(self.up)]
        return found

    def forward(
        self,
        u_BTChw: Tensor,
        t_B: Tensor,
        context_BLD: Tensor | None = None,
        *,
        pooled: Tensor | None = None,
        size: Tensor | None = None,
        labels: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        if u_BTChw.ndim != 5:
            raise ConfigError(
                f"A clip is (B,T,C,h,w), and this is {tuple(u_BTChw.shape)}.",
                where="frames",
                mend="Give frames: a picture is a clip of one.",
            )
        clips, frames = u_BTChw.shape[:2]
        if positions is None:
            positions = torch.arange(frames, device=u_BTChw.device).expand(clips, -1)

        def of_each_frame(told: Tensor | None) -> Tensor | None:
            return None if told is None else told[:, None].expand(-1, frames, *told.shape[1:]).flatten(0, 1)

        t_N = of_each_frame(t_B)
        assert t_N is not None
        y = self._drawn(
            u_BTChw.flatten(0, 1),
            t_N,
            of_each_frame(self.read(context_BLD)),
            pooled=of_each_frame(pooled),
            size=of_each_frame(size),
            labels=of_each_frame(labels),
            positions_BT=positions,
        )
        return y.unflatten(0, (clips, frames))
