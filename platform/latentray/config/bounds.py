"""Bounds of what a request may ask of the mathematics. Without torch: the endpoint's front door checks them too."""

from __future__ import annotations

import math

from latentray.errors import ConfigError

IDENTITY, CLAMP, THRESHOLD = "identity", "clamp", "threshold"
"""What may be done to each estimate of x_0: nothing, clamp to [-1, 1], dynamic threshold."""


def check_guidance(
    scale: float, *, rescale_share: float = 0.0, interval: tuple[float, float] = (0.0, math.inf)
) -> None:
    """Raises ConfigError naming the field: guidance that is negative or no number, a share outside [0, 1], an empty interval."""
    if not math.isfinite(scale) or scale < 0:
        raise ConfigError(f"guidance_scale is {scale}.", where="guidance_scale", mend="Choose 0 or more; 1 is none.")
    if not 0 <= rescale_share <= 1:
        raise ConfigError(f"guidance_rescale is {rescale_share}.", where="guidance_rescale", mend="Choose 0 to 1.")
    low, high = interval
    if not 0 <= low < high:
        raise ConfigError(
            f"The guidance interval from {low} to {high} is empty.",
            where="guidance_interval",
            mend="Give two noise levels sigma/alpha, the lower first.",
        )
