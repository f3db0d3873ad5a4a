"""Group `autoencoder`: the architecture of stage 1."""

from __future__ import annotations

import dataclasses

from latentray.errors import ConfigError


@dataclasses.dataclass(kw_only=True)
class AutoencoderConfig:
    """A convolutional KL autoencoder in Stable Diffusion's layout (Rombach et al. 2022)."""

    in_channels: int = 3
    """Channels of a picture."""
    latent_channels: int = 4
    """Channels of the latent."""
    channels: list[int] = dataclasses.field(default_factory=lambda: [128, 256, 512, 512])
    """Width of each level, from the finest; every level but the last halves the resolution."""
    blocks: int = 2
    """Residual blocks per level of the encoder; the decoder has one more."""
    patch: int = 1
    """Pixels are folded into channels by this factor before the first convolution (pixel-unshuffle); 1 is Stable
    Diffusion's layout, 4 or 8 keeps convolutions off full resolution for tiny runs."""
    attention: bool = True
    """One self-attention in the middle of encoder and decoder."""
    groups: int = 32
    """Groups of every GroupNorm."""

    def __post_init__(self) -> None:
        if not self.channels or min(self.channels) < 1:
            raise ConfigError(
                "An autoencoder needs at least one level.", where="autoencoder.channels", mend="Give [64,128], say."
            )
        for width in self.channels:
            if width % self.groups:
                raise ConfigError(
                    f"{width} channels do not divide into {self.groups} groups.",
                    where="autoencoder.channels",
                    mend="Choose multiples of autoencoder.groups.",
                )
        if self.patch < 1 or self.latent_channels < 1 or self.blocks < 1:
            raise ConfigError(
                "patch, latent_channels and blocks are at least 1.", where="autoencoder", mend="Raise it."
            )

    @property
    def downsampling(self) -> int:
        """Pixels per latent pixel, along each side."""
        return self.patch * 2 ** (len(self.channels) - 1)
