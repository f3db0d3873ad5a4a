"""Which noise level a sample trains at, and how much its loss weighs."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from latentray.config.objective import ObjectiveConfig
from latentray.diffusion.schedules import TIME_PER_LOG_SIGMA, AnySchedule, DiscreteVP, Unnoised, VarianceExploding

_EDGE = 1e-5
_COMPARED, _SAME = 256, 1e-6


def from_uniform(config: ObjectiveConfig, schedule: AnySchedule, u_B: Tensor) -> Tensor:
    """Uniform numbers in [0, 1) -> timesteps: int64 in 0 ... T-1 for discrete schedules, float64 for the continuous ones; 0
    without noise.

    uniform: in t, for variance-exploding in ln(sigma). For flow, logit_normal is sigmoid(N(m, s)) and mode is equation 20
    (Esser et al. 2024, section 3.1). For variance-exploding, log_normal is sigma = exp(N(m, s)) (Karras et al. 2022, table 1).
    Normal draws come from u by the inverse normal CDF.
    """
    if isinstance(schedule, Unnoised):
        return torch.zeros_like(u_B, dtype=torch.int64)
    if isinstance(schedule, DiscreteVP):
        return (u_B.double() * schedule.timesteps).long().clamp(max=schedule.timesteps - 1)
    u = u_B.double().clamp(_EDGE, 1 - _EDGE)
    normal = config.draw_mean + config.draw_std * torch.special.ndtri(u)
    if isinstance(schedule, VarianceExploding):
        low, high = math.log(schedule.sigma_min), math.log(schedule.sigma_max)
        log_sigma = normal.clamp(low, high) if config.timestep_draw == "log_normal" else low + u * (high - low)
        return TIME_PER_LOG_SIGMA * log_sigma
    if config.timestep_draw == "logit_normal":
        u = torch.sigmoid(normal)
    elif config.timestep_draw == "mode":
        u = 1 - u - config.mode_scale * (torch.cos(math.pi / 2 * u).square() - 1 + u)
    return schedule.shifted(u) * schedule.timesteps


def spread_over_batch(config: ObjectiveConfig, u_B: Tensor, slots_B: Tensor, shift: float, batch: int) -> Tensor:
    """Uniform numbers of one global batch, spread evenly over [0, 1) instead of drawn apart; each stays uniform.

    `slots_B` are the samples' positions in the global batch of `batch`, `u_B` their own draws, `shift` in [0, 1) a draw that
    the whole batch shares: so the numbers do not depend on the world size.

    stratified: slot i takes a draw from [i/B, (i+1)/B). sobol: the first B points of the base-2 (0,1)-sequence, rotated by
    `shift` (Owen's simplest randomisation): any power-of-two part of the batch is spread too.
    """
    if config.timestep_spread == "none":
        return u_B
    slots = slots_B.to(u_B.device)
    if config.timestep_spread == "stratified":
        return ((slots + u_B.double()) / batch).clamp(max=1 - 2.0**-40)
    return (_van_der_corput(slots) + shift) % 1


def _van_der_corput(n_B: Tensor) -> Tensor:
    """The one-dimensional Sobol sequence: the bits of n mirrored at the binary point."""
    out, left, place = torch.zeros_like(n_B, dtype=torch.float64), n_B.clone(), 0.5
    for _ in range(40):
        out += place * (left % 2)
        left, place = left // 2, place / 2
    return out


def fixed(schedule: AnySchedule, count: int = 8) -> Tensor:
    """The middles of `count` equal parts of the range: where the held-out loss is measured."""
    if isinstance(schedule, Unnoised):
        return torch.zeros(1, dtype=torch.int64)
    u = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    if isinstance(schedule, DiscreteVP):
        return (u * schedule.timesteps).long()
    if isinstance(schedule, VarianceExploding):
        low, high = math.log(schedule.sigma_min), math.log(schedule.sigma_max)
        return TIME_PER_LOG_SIGMA * (low + u * (high - low))
    return u * schedule.timesteps


THIRDS = ("low", "middle", "high")
"""Of a schedule's range of timesteps, from the least noise on."""


def third(schedule: AnySchedule, t_B: Tensor) -> Tensor:
    """(B,) int64: the number of the third that each timestep lies in."""
    if isinstance(schedule, Unnoised):
        return torch.zeros_like(t_B, dtype=torch.int64)
    share = t_B.double() / schedule.timesteps
    if isinstance(schedule, VarianceExploding):
        low, high = math.log(schedule.sigma_min), math.log(schedule.sigma_max)
        share = (t_B.double() / TIME_PER_LOG_SIGMA - low) / (high - low)
    return (len(THIRDS) * share).long().clamp(0, len(THIRDS) - 1)


def same_levels(schedule: AnySchedule, other: AnySchedule) -> bool:
    """Whether two schedules make the same of a latent at each timestep: what a network of one and a network of the other see.

    A flow's shift decides which timesteps are visited, and not what they mean.
    """
    t, other_t = fixed(schedule, _COMPARED), fixed(other, _COMPARED)
    if type(schedule) is not type(other) or not torch.equal(t, other_t):
        return False
    here, there = (torch.stack(one.alpha_sigma(t)) for one in (schedule, other))
    return torch.allclose(here, there, rtol=0.0, atol=_SAME)


def weights(config: ObjectiveConfig, alpha_B: Tensor, sigma_B: Tensor) -> Tensor:
    """Loss weight per sample, float32.

    min_snr: min(SNR, gamma) as weight of the x_0 loss (Hang et al. 2023), hence min(SNR, gamma)/SNR for epsilon and
    min(SNR, gamma)/(SNR + 1) for v. soft_min_snr: SNR gamma / (SNR + gamma) in its place (Crowson et al. 2024, section 4.4).
    Both are written so that SNR = 0 is no 0/0.
    """
    if config.weighting == "none":
        return torch.ones_like(alpha_B, dtype=torch.float32)
    gamma, snr = config.min_snr_gamma, (alpha_B / sigma_B).square()
    if config.weighting == "min_snr":
        of_epsilon = (gamma / snr).clamp(max=1)
        of_x0 = snr.clamp(max=gamma)
    else:
        of_epsilon = gamma / (snr + gamma)
        of_x0 = snr * of_epsilon
    return {"epsilon": of_epsilon, "v": of_x0 / (snr + 1), "x0": of_x0}[config.prediction].float()
