"""The KL autoencoder of stage 1 in Stable Diffusion's layout (Rombach et al. 2022, section 3.1 and appendix G).

Pictures x are in [-1, 1]. The encoder gives mean and log-variance of a diagonal Gaussian over latents; the latent that a
denoiser sees is `z = (latent - shift) * scale`, and decoding undoes it with the very same two numbers, which belong to
the autoencoder's artifact (`LatentScale`).
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from latentray.config.autoencoder import AutoencoderConfig
from latentray.errors import ConfigError
from latentray.models.attention import PixelAttention
from latentray.models.layers import Downsample, ResBlock, Upsample, group_norm

_EPS = 1e-6
_LOGVAR_RANGE = (-30.0, 20.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentScale:
    """Measured mean and 1/standard deviation of an autoencoder's latents over its training pictures."""

    shift: float
    scale: float

    def normalise(self, latent: Tensor) -> Tensor:
        return (latent - self.shift) * self.scale

    def restore(self, z: Tensor) -> Tensor:
        return z / self.scale + self.shift


@dataclasses.dataclass(kw_only=True)
class Posterior:
    """A diagonal Gaussian over latents, (B,C,h,w) each."""

    mean_BChw: Tensor
    logvar_BChw: Tensor

    def draw(self, noise_BChw: Tensor) -> Tensor:
        """mean + std * noise (Kingma & Welling 2014, equation 4); the caller owns the noise."""
        return self.mean_BChw + (0.5 * self.logvar_BChw).exp() * noise_BChw

    def kl(self) -> Tensor:
        """KL divergence to N(0, I), summed over a sample's latent, (B,) nats (Kingma & Welling 2014, appendix B)."""
        mean, logvar = self.mean_BChw.float(), self.logvar_BChw.float()
        return 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).flatten(1).sum(1)


class _Middle(nn.Sequential):
    def __init__(self, channels: int, config: AutoencoderConfig) -> None:
        layers: list[nn.Module] = [ResBlock(channels, channels, groups=config.groups, eps=_EPS)]
        if config.attention:
            layers.append(PixelAttention(channels, groups=config.groups))
        layers.append(ResBlock(channels, channels, groups=config.groups, eps=_EPS))
        super().__init__(*layers)


class Encoder(nn.Module):
    """(B,3,H,W) -> (B,2C,h,w): mean and log-variance."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.patch = config.patch
        width = config.channels[0]
        self.conv_in = nn.Conv2d(config.in_channels * config.patch**2, width, 3, padding=1)
        levels: list[nn.Module] = []
        for level, out in enumerate(config.channels):
            for _ in range(config.blocks):
                levels.append(ResBlock(width, out, groups=config.groups, eps=_EPS))
                width = out
            if level < len(config.channels) - 1:
                levels.append(Downsample(width, asymmetric=True))
        self.levels = nn.Sequential(*levels)
        self.middle = _Middle(width, config)
        self.norm_out = group_norm(width, config.groups, eps=_EPS)
        self.conv_out = nn.Conv2d(width, 2 * config.latent_channels, 3, padding=1)
        self.quant = nn.Conv2d(2 * config.latent_channels, 2 * config.latent_channels, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        h = self.conv_in(F.pixel_unshuffle(x_BCHW, self.patch))
        h = self.middle(self.levels(h))
        return self.quant(self.conv_out(F.silu(self.norm_out(h))))


class Decoder(nn.Module):
    """(B,C,h,w) -> (B,3,H,W). `features` is the input of the last convolution, which the adaptive weight needs."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.patch = config.patch
        width = config.channels[-1]
        self.post_quant = nn.Conv2d(config.latent_channels, config.latent_channels, 1)
        self.conv_in = nn.Conv2d(config.latent_channels, width, 3, padding=1)
        self.middle = _Middle(width, config)
        levels: list[nn.Module] = []
        for level, out in reversed(list(enumerate(config.channels))):
            for _ in range(config.blocks + 1):
                levels.append(ResBlock(width, out, groups=config.groups, eps=_EPS))
                width = out
            if level > 0:
                levels.append(Upsample(width))
        self.levels = nn.Sequential(*levels)
        self.norm_out = group_norm(width, config.groups, eps=_EPS)
        self.conv_out = nn.Conv2d(width, config.in_channels * config.patch**2, 3, padding=1)

    def features(self, latent_BChw: Tensor) -> Tensor:
        h = self.middle(self.conv_in(self.post_quant(latent_BChw)))
        return F.silu(self.norm_out(self.levels(h)))

    def last(self, features: Tensor) -> Tensor:
        return F.pixel_shuffle(self.conv_out(features), self.patch)

    def forward(self, latent_BChw: Tensor) -> Tensor:
        return self.last(self.features(latent_BChw))


@dataclasses.dataclass(kw_only=True)
class Reconstruction:
    """What one training forward gives: the picture, the posterior, and the last convolution's input."""

    x_BCHW: Tensor
    posterior: Posterior
    features: Tensor


class KLAutoencoder(nn.Module):
    """Encoder and decoder; `forward` is the training pass, `encode` and `decode` the two halves."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder, self.decoder = Encoder(config), Decoder(config)

    def encode(self, x_BCHW: Tensor) -> Posterior:
        """Raises ConfigError where H or W is no multiple of the downsampling factor."""
        f = self.config.downsampling
        if x_BCHW.shape[-1] % f or x_BCHW.shape[-2] % f:
            raise ConfigError(
                f"A picture of {x_BCHW.shape[-1]}x{x_BCHW.shape[-2]} does not divide by {f}.",
                where="size",
                mend=f"Choose a size that is a multiple of {f}.",
            )
        mean, logvar = self.encoder(x_BCHW).chunk(2, dim=1)
        return Posterior(mean_BChw=mean, logvar_BChw=logvar.clamp(*_LOGVAR_RANGE))

    def decode(self, latent_BChw: Tensor) -> Tensor:
        return self.decoder(latent_BChw)

    def forward(self, x_BCHW: Tensor, noise_BChw: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(reconstruction, mean, logvar, features); without noise the posterior's mean is decoded.

        A plain tuple, because DeepSpeed's hooks look for tensors in the outputs.
        """
        posterior = self.encode(x_BCHW)
        latent = posterior.mean_BChw if noise_BChw is None else posterior.draw(noise_BChw)
        features = self.decoder.features(latent)
        return self.decoder.last(features), posterior.mean_BChw, posterior.logvar_BChw, features


def last_layer_gradient(grad_BCHW: Tensor, features: Tensor, patch: int, weight_shape: torch.Size) -> Tensor:
    """Gradient of a loss with respect to the decoder's last convolution, from the loss's gradient in the picture.

    It needs no autograd pass through the network, so it works under every ZeRO stage: d loss/d W is the correlation of
    the convolution's input with the gradient of its output (before the pixel shuffle).
    """
    return torch.nn.grad.conv2d_weight(
        features.detach().float(), list(weight_shape), F.pixel_unshuffle(grad_BCHW.float(), patch), padding=1
    )
