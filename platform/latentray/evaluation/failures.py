"""The four known failures of latent diffusion, as numbers. Pure functions of pictures, and one closed form.

Muted contrast: training that never sees pure noise lets a sampler start where it never trained; brightness then stays near the
mean (Lin et al. 2024). Oversaturation: strong guidance drives pixels to the ends of their range. Repeated objects: a size that
was never trained is filled with several. The ceiling: what the autoencoder cannot reconstruct, nothing draws.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import torch
from torch import Tensor

from latentray.diffusion import parameterization, samplers
from latentray.diffusion.schedules import DiscreteVP

SATURATED = (2, 253)
"""A channel at or beyond these is saturated; the shapes set itself never is (15 to 245)."""

_CONTRAST = 36.0
_LEAST_AREA = 50


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contrast:
    """Brightness of sampled pictures, where the data's is N(mean, spread^2)."""

    mean: float
    spread: float


def contrast_in_closed_form(schedule: DiscreteVP, *, mean: float, spread: float, pixels: int) -> Contrast:
    """The brightness that an exact denoiser and an exact solver give, started from N(0, I) at the last timestep.

    Pictures of constant brightness b ~ N(mean, spread^2): at (alpha, sigma) the mean of x is N(alpha mean, alpha^2 spread^2 +
    sigma^2/pixels), and the probability-flow ODE keeps its quantiles. N(0, I) has mean 0 and variance 1/pixels instead, so
    quantile q ends at mean + spread (q / sqrt(pixels) - alpha mean) / std: near the mean of all pictures.

    With zero terminal SNR the start is the true law. What remains is the one step out of pure noise, to the schedule's next
    timestep, where the best estimate of any picture is the mean: x has mean alpha mean there, and variance sigma^2/pixels.
    """
    alpha, sigma = (float(v) for v in schedule.alpha_sigma(torch.tensor(schedule.timesteps - 1)))
    begins, width = 0.0, 1 / math.sqrt(pixels)
    if alpha == 0:
        alpha, sigma = (float(v) for v in schedule.alpha_sigma(torch.tensor(schedule.timesteps - 2)))
        begins, width = alpha * mean, sigma / math.sqrt(pixels)
    std = math.sqrt((alpha * spread) ** 2 + sigma**2 / pixels)
    return Contrast(mean=mean + spread * (begins - alpha * mean) / std, spread=spread * width / std)


def contrast_measured(
    schedule: DiscreteVP,
    *,
    mean: float,
    spread: float,
    pixels: int,
    sampler: str = "ddim",
    steps: int = 1000,
    prediction: str = "v",
    spacing: str | None = None,
) -> Contrast:
    """The same by the real sampler over the real schedule, with the exact denoiser, in float64.

    Starts at the -1, 0 and +1 quantile of the mean brightness of N(0, I) and reads the law from where they end.
    """

    def exact(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = schedule.alpha_sigma(t[:1].long() if float(t[0]).is_integer() else t[:1].double())
        variance = (alpha * spread).square() + sigma.square() / pixels
        brightness = x.mean(1, keepdim=True)
        x0 = (mean + alpha * spread**2 / variance * (brightness - alpha * mean)).expand_as(x)
        noise = (x - alpha * x0) / sigma
        return parameterization.target(prediction, x0, noise, alpha, sigma)

    starts = torch.tensor([[-1.0], [0.0], [1.0]], dtype=torch.float64) / math.sqrt(pixels)
    ends = samplers.sample(
        exact, starts.expand(3, pixels), schedule, sampler, steps, prediction=prediction, spacing_name=spacing
    )
    low, middle, high = ends.mean(1).tolist()
    return Contrast(mean=middle, spread=(high - low) / 2)


def saturated_share(pictures_NHWC: np.ndarray) -> float:
    """Share of channel values, uint8, at the ends of their range."""
    return float(((pictures_NHWC <= SATURATED[0]) | (pictures_NHWC >= SATURATED[1])).mean())


def objects(picture_HWC: np.ndarray) -> int:
    """How many separate objects stand on the plain background of a picture, uint8 (H, W, 3)."""
    from scipy import ndimage

    pixels = picture_HWC.astype(np.float64)
    frame = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    apart = np.linalg.norm(pixels - np.median(frame, axis=0), axis=2) > _CONTRAST
    labels, count = ndimage.label(apart)
    return int((np.bincount(labels.ravel(), minlength=count + 1)[1:] >= _LEAST_AREA).sum())


def repeated_share(pictures_NHWC: np.ndarray) -> float:
    """Share of pictures that show more than one object, or none."""
    return float(np.mean([objects(picture) != 1 for picture in pictures_NHWC]))
