"""What one picture is drawn from, and what comes back."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from latentray.config.bounds import IDENTITY, check_guidance
from latentray.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingRequest:
    """One picture to draw. `height` and `width` are in pixels, multiples of the model's downsampling.

    Raises ConfigError, naming the field, for guidance out of bounds, a strength without a picture, a mask of another size.
    """

    prompt: str
    negative_prompt: str = ""
    steps: int
    guidance_scale: float
    seed: int
    sampler: str
    height: int
    width: int
    eta: float = 0.0
    """Of ddim."""
    order: int = 2
    """Of unipc."""
    spacing: str | None = None
    """Which noise levels are visited; None for the schedule's default."""
    guidance_rescale: float = 0.0
    """Share of the guided output's standard deviation that is brought back to the conditional one's."""
    guidance_interval: tuple[float, float] = (0.0, math.inf)
    """Noise levels sigma/alpha, (low, high], in which guidance acts."""
    bound: str = IDENTITY
    """What is done to each estimate of x_0: identity, clamp or threshold."""
    quantile: float = 0.995
    """Of the dynamic threshold."""
    resolution_shift: bool = False
    """Rectified flow: shift the noise levels for a size other than the trained one."""
    picture_HWC: np.ndarray | None = None
    """Picture-to-picture and inpainting: where to start from, uint8 RGB (height, width, 3)."""
    strength: float = 1.0
    """Share of the steps that is run; at 1 nothing of the picture is kept but what the mask keeps."""
    mask_HW: np.ndarray | None = None
    """Inpainting: True or nonzero where to paint, (height, width); the rest of the picture stays as it is."""

    def __post_init__(self) -> None:
        check_guidance(self.guidance_scale, rescale_share=self.guidance_rescale, interval=self.guidance_interval)
        wanted = (self.height, self.width)
        if self.picture_HWC is None and (self.mask_HW is not None or self.strength != 1.0):
            raise ConfigError(
                "A mask or a strength asks for a picture to start from.", where="picture", mend="Give one."
            )
        if self.picture_HWC is not None and self.picture_HWC.shape != (*wanted, 3):
            raise ConfigError(
                f"The picture is {self.picture_HWC.shape}, not (height, width, 3) = {(*wanted, 3)}.",
                where="picture",
                mend="Resize it.",
            )
        if self.mask_HW is not None and self.mask_HW.shape != wanted:
            raise ConfigError(
                f"The mask is {self.mask_HW.shape}, not (height, width) = {wanted}.", where="mask", mend="Resize it."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampledPicture:
    """A drawn picture, uint8 RGB (H,W,3), and what the user should know of how it came about."""

    pixels_HWC: np.ndarray
    truncated: bool
    """The prompt was longer than the tokenizer takes."""
    warnings: tuple[str, ...] = ()
