"""Group `beside`: what a denoiser sees beside its noisy latent, as further channels."""

from __future__ import annotations

import dataclasses

from latentray.errors import ConfigError

KINDS = ("none", "inpainting", "super_resolution")


@dataclasses.dataclass(kw_only=True)
class BesideConfig:
    """Spatial conditions (Rombach et al. 2022, sections 4.4 and 4.5), made from the sample's own picture as it is trained on."""

    kind: str = "none"
    """none; inpainting: a drawn mask and the latent of the picture without what it covers; super_resolution: the picture made
    small. Both need online.enabled, and denoiser.in_channels to hold them."""
    factor: int = 4
    """super_resolution: how much smaller along each side."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(
                f"There is no kind {self.kind!r}.", where="beside.kind", mend=f"Known: {', '.join(KINDS)}."
            )
        if self.factor < 2:
            raise ConfigError("A small picture is smaller.", where="beside.factor", mend="Set it to 2 or more.")

    def channels(self, latent_channels: int) -> int:
        """How many channels stand beside a latent of so many."""
        return {"none": 0, "inpainting": 1 + latent_channels, "super_resolution": 3}[self.kind]
