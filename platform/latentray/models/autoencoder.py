"""The autoencoders of stage 1: KL and VQ in Stable Diffusion's layout (Rombach et al. 2022, section 3.1), and the identity.

Pictures x are in [-1, 1]. An encoder gives mean and log-variance of a diagonal Gaussian over latents; the latent that a
denoiser sees is `z = (latent - shift) * scale`, and decoding undoes it with the very same two numbers, which belong to
the autoencoder's artifact (`LatentScale`). Where there is no Gaussian, the log-variance is at its lowest: a draw is the
mean.
"""

from __future__ import annotations

import abc
import dataclasses

import torch
from torch import Tensor, nn

from latentray.config.autoencoder import AutoencoderConfig
from latentray.errors import ConfigError
from latentray.models.encoder_decoder import Decoder, Encoder, last_layer_gradient
from latentray.models.quantizer import Quantizer

__all__ = [
    "Autoencoder",
    "IdentityAutoencoder",
    "KLAutoencoder",
    "LatentScale",
    "Posterior",
    "VQAutoencoder",
    "last_layer_gradient",
]
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

    @classmethod
    def certain(cls, latent_BChw: Tensor) -> Posterior:
        """All mass at one latent, or as good as: the standard deviation is 3e-7."""
        return cls(mean_BChw=latent_BChw, logvar_BChw=torch.full_like(latent_BChw, _LOGVAR_RANGE[0]))

    def draw(self, noise_BChw: Tensor) -> Tensor:
        """mean + std * noise (Kingma & Welling 2014, equation 4); the caller owns the noise."""
        return self.mean_BChw + (0.5 * self.logvar_BChw).exp() * noise_BChw

    def kl(self) -> Tensor:
        """KL divergence to N(0, I), summed over a sample's latent, (B,) nats (Kingma & Welling 2014, appendix B)."""
        mean, logvar = self.mean_BChw.float(), self.logvar_BChw.float()
        return 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).flatten(1).sum(1)


class Autoencoder(nn.Module, abc.ABC):
    """What every kind can do: `encode` a picture, `decode` a latent."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config

    def encode(self, x_BCHW: Tensor) -> Posterior:
        """Raises ConfigError where H or W is no multiple of the downsampling factor."""
        self.require_size(x_BCHW)
        return self.posterior(x_BCHW)

    def require_size(self, x_BCHW: Tensor) -> None:
        """Raise ConfigError where H or W is no multiple of the downsampling factor."""
        f = self.config.downsampling
        if x_BCHW.shape[-1] % f or x_BCHW.shape[-2] % f:
            raise ConfigError(
                f"A picture of {x_BCHW.shape[-1]}x{x_BCHW.shape[-2]} does not divide by {f}.",
                where="size",
                mend=f"Choose a size that is a multiple of {f}.",
            )

    @abc.abstractmethod
    def posterior(self, x_BCHW: Tensor) -> Posterior:
        """`encode`, of a size that divides."""

    @abc.abstractmethod
    def decode(self, latent_BChw: Tensor) -> Tensor:
        """(B,C,h,w) -> pictures in [-1, 1]."""


class KLAutoencoder(Autoencoder):
    """Encoder and decoder; `forward` is the training pass, `encode` and `decode` the two halves."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__(config)
        self.encoder, self.decoder = Encoder(config), Decoder(config)

    def posterior(self, x_BCHW: Tensor) -> Posterior:
        return self.posterior_of(self.encoder(x_BCHW))

    def posterior_of(self, moments_BChw: Tensor) -> Posterior:
        """What the encoder's output says, (B,2C,h,w)."""
        mean, logvar = moments_BChw.chunk(2, dim=1)
        return Posterior(mean_BChw=mean, logvar_BChw=logvar.clamp(*_LOGVAR_RANGE))

    def decode(self, latent_BChw: Tensor) -> Tensor:
        return self.decoder(latent_BChw)

    def decodable(self, latent_BChw: Tensor) -> Tensor:
        """What the decoder reads of a latent."""
        return latent_BChw

    def forward(self, x_BCHW: Tensor, noise_BChw: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(reconstruction, mean, logvar, features); without noise the posterior's mean is decoded.

        A plain tuple, because DeepSpeed's hooks look for tensors in the outputs.
        """
        posterior = self.encode(x_BCHW)
        latent = posterior.mean_BChw if noise_BChw is None else posterior.draw(noise_BChw)
        features = self.decoder.features(latent)
        return self.decoder.last(features), posterior.mean_BChw, posterior.logvar_BChw, features


class VQAutoencoder(Autoencoder):
    """Encoder, codebook and decoder (van den Oord et al. 2017; Esser et al. 2021).

    The latent is the encoder's output before quantisation: quantising belongs to decoding, which so takes what a denoiser
    made of it (Rombach et al. 2022, section 3.1).
    """

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__(config)
        assert config.codebook_size is not None
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.quantizer = Quantizer(config.codebook_size, config.latent_channels)

    def posterior(self, x_BCHW: Tensor) -> Posterior:
        return self.posterior_of(self.encoder(x_BCHW))

    def posterior_of(self, latent_BChw: Tensor) -> Posterior:
        """What the encoder's output says, (B,C,h,w)."""
        return Posterior.certain(latent_BChw)

    def decode(self, latent_BChw: Tensor) -> Tensor:
        return self.decoder(self.decodable(latent_BChw))

    def decodable(self, latent_BChw: Tensor) -> Tensor:
        """What the decoder reads of a latent: its nearest vectors."""
        return self.quantizer(latent_BChw)

    def forward(self, x_BCHW: Tensor, noise_BChw: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(reconstruction, latent, codes (B,1,h,w), features); noise there is none, whatever is given.

        The decoder's gradient passes by the quantisation straight to the encoder (van den Oord et al. 2017, section 3.2).
        """
        latent = self.encode(x_BCHW).mean_BChw
        codes = self.quantizer.nearest(latent)
        quantised = self.quantizer.lookup(codes).to(latent.dtype)
        features = self.decoder.features(latent + (quantised - latent).detach())
        return self.decoder.last(features), latent, codes, features


class IdentityAutoencoder(Autoencoder):
    """No autoencoder: a picture is its own latent, for diffusion in pixels (Ho et al. 2020)."""

    def posterior(self, x_BCHW: Tensor) -> Posterior:
        return Posterior.certain(x_BCHW)

    def decode(self, latent_BChw: Tensor) -> Tensor:
        return latent_BChw

    def forward(self, x_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """(reconstruction, latent): the picture, twice."""
        return x_BCHW, x_BCHW
