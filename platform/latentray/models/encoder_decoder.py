"""The two halves of an autoencoder in Stable Diffusion's layout (Rombach et al. 2022, appendix G)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from latentray.config.autoencoder import AutoencoderConfig
from latentray.models.attention import PixelAttention
from latentray.models.layers import Downsample, ResBlock, group_norm, laid_out
from latentray.models.upsampling import Upsample

_EPS = 1e-6


def _res_block(in_channels: int, out_channels: int, config: AutoencoderConfig) -> ResBlock:
    return ResBlock(in_channels, out_channels, groups=config.groups, eps=_EPS, overwrites=True)


class Middle(nn.Sequential):
    """Two residual blocks at the latent's resolution, and one self-attention between them."""

    def __init__(self, channels: int, config: AutoencoderConfig) -> None:
        layers: list[nn.Module] = [_res_block(channels, channels, config)]
        if config.attention:
            layers.append(PixelAttention(channels, groups=config.groups))
        layers.append(_res_block(channels, channels, config))
        super().__init__(*layers)


class Encoder(nn.Module):
    """(B,3,H,W) -> (B,out,h,w): mean and log-variance (kl), or what is quantised (vq)."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.patch = config.patch
        width = config.channels[0]
        self.conv_in = nn.Conv2d(config.in_channels * config.patch**2, width, 3, padding=1)
        levels: list[nn.Module] = []
        for level, out in enumerate(config.channels):
            for _ in range(config.blocks):
                levels.append(_res_block(width, out, config))
                width = out
            if level < len(config.channels) - 1:
                levels.append(Downsample(width, asymmetric=True))
        self.levels = nn.Sequential(*levels)
        self.middle = Middle(width, config)
        self.norm_out = group_norm(width, config.groups, eps=_EPS)
        made = config.latent_channels * (2 if config.kind == "kl" else 1)
        self.conv_out = nn.Conv2d(width, made, 3, padding=1)
        self.quant = nn.Conv2d(made, made, 1) if config.quant_convolutions else nn.Identity()

    def finish(self, h: Tensor) -> Tensor:
        """From the last level's output on."""
        return self.quant(self.conv_out(self.norm_out(self.middle(h), silu=True)))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.finish(self.levels(self.conv_in(laid_out(F.pixel_unshuffle(x_BCHW, self.patch)))))


class Decoder(nn.Module):
    """(B,C,h,w) -> (B,3,H,W). `features` is the input of the last convolution, which the adaptive weight needs."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.patch = config.patch
        width, latent = config.channels[-1], config.latent_channels
        self.post_quant = nn.Conv2d(latent, latent, 1) if config.quant_convolutions else nn.Identity()
        self.conv_in = nn.Conv2d(latent, width, 3, padding=1)
        self.middle = Middle(width, config)
        levels: list[nn.Module] = []
        for level, out in reversed(list(enumerate(config.channels))):
            for _ in range(config.blocks + 1):
                levels.append(_res_block(width, out, config))
                width = out
            if level > 0:
                levels.append(Upsample(width))
        self.levels = nn.Sequential(*levels)
        self.norm_out = group_norm(width, config.groups, eps=_EPS)
        self.conv_out = nn.Conv2d(width, config.in_channels * config.patch**2, 3, padding=1)

    def begin(self, latent_BChw: Tensor) -> Tensor:
        """Up to the first level's input."""
        return self.middle(self.conv_in(self.post_quant(laid_out(latent_BChw))))

    def features(self, latent_BChw: Tensor) -> Tensor:
        return self.norm_out(self.levels(self.begin(latent_BChw)), silu=True)

    def last(self, features: Tensor) -> Tensor:
        return F.pixel_shuffle(self.conv_out(features), self.patch)

    def forward(self, latent_BChw: Tensor) -> Tensor:
        return self.last(self.features(latent_BChw))


def last_layer_gradient(grad_BCHW: Tensor, features: Tensor, patch: int, weight_shape: torch.Size) -> Tensor:
    """Gradient of a loss with respect to the decoder's last convolution, from the loss's gradient in the picture.

    It needs no autograd pass through the network, so it works under every ZeRO stage: d loss/d W is the correlation of
    the convolution's input with the gradient of its output (before the pixel shuffle).
    """
    return torch.nn.grad.conv2d_weight(
        features.detach().float(), list(weight_shape), F.pixel_unshuffle(grad_BCHW.float(), patch), padding=1
    )
