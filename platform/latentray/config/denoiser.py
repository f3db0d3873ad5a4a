"""Group `denoiser`: the architecture of stage 2."""

from __future__ import annotations

import dataclasses

from latentray.errors import ConfigError


@dataclasses.dataclass(kw_only=True)
class DenoiserConfig:
    """A U-Net with text cross-attention in Stable Diffusion's layout."""

    in_channels: int = 4
    """Channels of the latent that goes in."""
    out_channels: int = 4
    """Channels of the prediction."""
    channels: list[int] = dataclasses.field(default_factory=lambda: [320, 640, 1280, 1280])
    """Width of each level, from the finest."""
    blocks: int = 2
    """Residual blocks per level on the way down; one more on the way up."""
    depth: list[int] = dataclasses.field(default_factory=lambda: [1, 1, 1, 0])
    """Transformer blocks behind each residual block of a level; 0 for none."""
    middle_depth: int = 1
    """Transformer blocks in the middle."""
    heads: int | None = 8
    """Attention heads at every level (SD 1.x), or null to set head_dim instead."""
    head_dim: int | None = None
    """Width of one head (SD 2, SDXL: 64), or null to set heads instead."""
    context_width: int | None = 768
    """Width of the text tokens; null for an unconditional network."""
    linear_projection: bool = False
    """Project into the transformers by Linear (SD 2, SDXL) instead of 1x1 convolution (SD 1.x)."""
    groups: int = 32
    """Groups of every GroupNorm."""

    def __post_init__(self) -> None:
        if len(self.depth) != len(self.channels):
            raise ConfigError(
                f"depth has {len(self.depth)} entries for {len(self.channels)} levels.",
                where="denoiser.depth",
                mend="Give one number per entry of denoiser.channels.",
            )
        if (self.heads is None) == (self.head_dim is None):
            raise ConfigError(
                "Set heads or head_dim, not both.", where="denoiser.heads", mend="Set the other one to null."
            )
        for width in self.channels:
            if width % self.groups:
                raise ConfigError(
                    f"{width} channels do not divide into {self.groups} groups.",
                    where="denoiser.channels",
                    mend="Choose multiples of denoiser.groups.",
                )
            if width % (self.heads or self.head_dim or 1):
                raise ConfigError(
                    f"{width} channels do not divide into the heads.",
                    where="denoiser.heads",
                    mend="Change heads or head_dim.",
                )

    def heads_at(self, width: int) -> int:
        return self.heads if self.heads is not None else width // (self.head_dim or width)
