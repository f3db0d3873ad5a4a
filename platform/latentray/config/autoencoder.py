"""Group `autoencoder`: the architecture of stage 1."""

from __future__ import annotations

import dataclasses

from latentray.errors import ConfigError

KINDS = ("kl", "vq", "identity")


@dataclasses.dataclass(kw_only=True)
class AutoencoderConfig:
    """A convolutional autoencoder in Stable Diffusion's layout (Rombach et al. 2022), or none: the identity."""

    kind: str = "kl"
    """kl (a Gaussian posterior), vq (the nearest vector of a codebook) or identity (pixels are the latents: no weights)."""
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
    quant_convolutions: bool = True
    """1x1 convolutions on both sides of the latent, as in SD 1, SD 2 and SDXL; SD 3 has none."""
    codebook_size: int | None = None
    """Vectors in the codebook of kind vq; null for the others."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(
                f"There is no kind of autoencoder {self.kind!r}.",
                where="autoencoder.kind",
                mend=f"Known: {', '.join(KINDS)}.",
            )
        if not self.channels or min(self.channels) < 1:
            raise ConfigError(
                "An autoencoder needs at least one level.", where="autoencoder.channels", mend="Give [64,128], say."
            )
        for field in ("in_channels", "latent_channels", "blocks", "patch", "groups"):
            if getattr(self, field) < 1:
                raise ConfigError("It must be at least 1.", where=f"autoencoder.{field}", mend="Raise it.")
        for width in self.channels:
            if width % self.groups:
                raise ConfigError(
                    f"{width} channels do not divide into {self.groups} groups.",
                    where="autoencoder.channels",
                    mend="Choose multiples of autoencoder.groups.",
                )
        if (self.kind == "vq") != (self.codebook_size is not None) or (self.codebook_size or 2) < 2:
            raise ConfigError(
                f"A codebook of {self.codebook_size} vectors does not go with the kind {self.kind}.",
                where="autoencoder.codebook_size",
                mend="Set it to 2 or more with kind=vq (8192, say), and to null with the others.",
            )
        if self.kind == "identity" and self.latent_channels != self.in_channels:
            raise ConfigError(
                f"The identity makes {self.in_channels} channels of {self.in_channels}, not {self.latent_channels}.",
                where="autoencoder.latent_channels",
                mend=f"Set it to {self.in_channels}.",
            )

    @property
    def downsampling(self) -> int:
        """Pixels per latent pixel, along each side."""
        return 1 if self.kind == "identity" else self.patch * 2 ** (len(self.channels) - 1)
