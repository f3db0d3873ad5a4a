"""Which noise level a sample trains at, and how much its loss weighs."""

from __future__ import annotations

import torch
from torch import Tensor

from latentray.config.objective import ObjectiveConfig
from latentray.diffusion.schedules import DiscreteVP, RectifiedFlow

_EDGE = 1e-5


def from_uniform(config: ObjectiveConfig, schedule: DiscreteVP | RectifiedFlow, u_B: Tensor) -> Tensor:
    """Uniform numbers in [0, 1) -> timesteps: int64 in 0 ... T-1 for discrete schedules, float in (0, T) for flow.

    logit_normal is sigmoid of a standard normal (Esser et al. 2024, section 3.1), by the inverse normal CDF.
    """
    if isinstance(schedule, DiscreteVP):
        return (u_B.double() * schedule.timesteps).long().clamp(max=schedule.timesteps - 1)
    s = u_B.double().clamp(_EDGE, 1 - _EDGE)
    if config.timestep_draw == "logit_normal":
        s = torch.sigmoid(torch.special.ndtri(s))
    return schedule.shifted(s) * schedule.timesteps


def fixed(schedule: DiscreteVP | RectifiedFlow, count: int = 8) -> Tensor:
    """The middles of `count` equal parts of the range: where the held-out loss is measured."""
    u = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    if isinstance(schedule, DiscreteVP):
        return (u * schedule.timesteps).long()
    return u * schedule.timesteps


def weights(config: ObjectiveConfig, alpha_B: Tensor, sigma_B: Tensor) -> Tensor:
    """Loss weight per sample, float32.

    min_snr: min(SNR, gamma) as weight of the x_0 loss (Hang et al. 2023), hence min(SNR, gamma)/SNR for epsilon,
    min(SNR, gamma)/(SNR + 1) for v, min(SNR, gamma) for x0.
    """
    if config.weighting == "none":
        return torch.ones_like(alpha_B, dtype=torch.float32)
    snr = (alpha_B / sigma_B).square()
    capped = snr.clamp(max=config.min_snr_gamma)
    divisor = {"epsilon": snr, "v": snr + 1, "x0": torch.ones_like(snr)}[config.prediction]
    return (capped / divisor).float()
