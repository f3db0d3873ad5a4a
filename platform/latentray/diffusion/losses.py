"""The denoising loss: noise a latent, predict, compare."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from latentray.config.objective import ObjectiveConfig
from latentray.diffusion import parameterization, timesteps
from latentray.diffusion.schedules import AnySchedule


@dataclasses.dataclass(kw_only=True)
class Noised:
    """A batch ready for the network, and what the network should say."""

    x_BChw: Tensor
    t_B: Tensor
    target_BChw: Tensor
    weight_B: Tensor


def noised(config: ObjectiveConfig, schedule: AnySchedule, x0_BChw: Tensor, noise_BChw: Tensor, t_B: Tensor) -> Noised:
    """x_t = alpha x_0 + sigma noise, the prediction's target and the loss weights, in float32."""
    alpha, sigma = schedule.alpha_sigma(t_B)
    a, s = (value.float().view(-1, *[1] * (x0_BChw.ndim - 1)) for value in (alpha, sigma))
    return Noised(
        x_BChw=a * x0_BChw + s * noise_BChw,
        t_B=t_B,
        target_BChw=parameterization.target(config.prediction, x0_BChw, noise_BChw, a, s),
        weight_B=timesteps.weights(config, alpha, sigma),
    )


def mean_squared(prediction_BChw: Tensor, batch: Noised, counts: Tensor | None = None) -> Tensor:
    """Weighted squared error per sample, mean over its latent, (B,) float32 (Ho et al. 2020, equation 14).

    Args:
        counts: 1 where a number of the latent counts and 0 where it does not, broadcastable to it; at least one counts.
    """
    error = (prediction_BChw.float() - batch.target_BChw).square()
    if counts is None:
        return batch.weight_B * error.flatten(1).mean(1)
    counts = counts.float().expand_as(error)
    return batch.weight_B * (error * counts).flatten(1).sum(1) / counts.flatten(1).sum(1)


def offset_noise(noise_BChw: Tensor, offset_BC: Tensor, strength: float) -> Tensor:
    """Noise with a constant added to each channel, N(0, strength^2): lets a model move a picture's mean brightness.

    Guttenberg 2023, "Diffusion with offset noise". `offset_BC` is standard normal.
    """
    like = (len(offset_BC), *[1] * (noise_BChw.ndim - 4), -1, 1, 1)  # the frames of a clip share it
    return noise_BChw + strength * offset_BC.view(like)
