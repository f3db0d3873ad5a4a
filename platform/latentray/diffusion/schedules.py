"""Noise schedules: t -> (alpha, sigma) of x_t = alpha x_0 + sigma noise, in float64.

A schedule alone knows what a timestep means. Discrete variance-preserving schedules take t in 0 ... T-1 (fractional t is
interpolated in log-SNR); rectified flow takes t in (0, T], alpha = 1 - t/T, sigma = t/T; the variance-exploding schedule
takes t = 250 ln(sigma), EDM's c_noise times 1000, so that the same sinusoidal embedding serves all three.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Protocol

import torch
from torch import Tensor

from latentray.config.objective import ObjectiveConfig


class Schedule(Protocol):
    """What training and samplers need to know about a schedule."""

    timesteps: int

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Signal and noise scale at timesteps t, float64, of t's shape."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiscreteVP:
    """A variance-preserving schedule given by its cumulative product (Ho et al. 2020, equation 4)."""

    alphas_cumprod: Tensor
    """(T,) float64, falling from near 1 to near 0."""

    @property
    def timesteps(self) -> int:
        return len(self.alphas_cumprod)

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """t in [0, T-1]; between two timesteps log-SNR is interpolated."""
        table = self.alphas_cumprod.to(t.device)
        if not t.is_floating_point():
            abar = table[t]
        else:
            log_snr = torch.log(table) - torch.log1p(-table)
            low = t.double().floor().clamp(0, self.timesteps - 1)
            high = (low + 1).clamp(max=self.timesteps - 1)
            w = t.double() - low
            between = torch.sigmoid((1 - w) * log_snr[low.long()] + w * log_snr[high.long()])
            abar = torch.where(
                w == 0, table[low.long()], between
            )  # at zero terminal SNR, 0 times infinity is no number
        return abar.sqrt(), (1 - abar).sqrt()


@dataclasses.dataclass(frozen=True, kw_only=True)
class RectifiedFlow:
    """Straight paths from data to noise (Liu et al. 2022): x_t = (1 - s) x_0 + s noise with s = t/T."""

    timesteps: int = 1000
    shift: float = 1.0

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        s = t.double() / self.timesteps
        return 1 - s, s

    def shifted(self, s: Tensor) -> Tensor:
        """s -> shift s / (1 + (shift - 1) s) (Esser et al. 2024, equation 23)."""
        return self.shift * s / (1 + (self.shift - 1) * s)


@dataclasses.dataclass(frozen=True, kw_only=True)
class VarianceExploding:
    """x = x_0 + s noise with s falling geometrically (Song & Ermon 2019), seen through EDM's c_in (Karras et al. 2022).

    x_t = c_in x, so alpha = c_in = 1 / sqrt(s^2 + sigma_data^2) and sigma = s c_in: whatever s is, x_t has unit variance, and
    every solver works on it as on the other schedules.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    sigma_data: float = 1.0
    timesteps: int = 1000
    """The most steps a sampler may take; t itself is continuous."""

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        s = torch.exp(t.double() / TIME_PER_LOG_SIGMA)
        c_in = (s.square() + self.sigma_data**2).rsqrt()
        return c_in, s * c_in

    def time_of(self, s: Tensor) -> Tensor:
        """Noise standard deviation s -> t."""
        return TIME_PER_LOG_SIGMA * torch.log(s.double())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Unnoised:
    """No noise and no signal, at every t: x_t = 0. What predicts x_0 of it is a regression on the conditions."""

    timesteps: int = 1
    """A single step is all there is to take."""

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        nothing = torch.zeros(t.shape, dtype=torch.float64, device=t.device)
        return nothing, nothing


TIME_PER_LOG_SIGMA = 250.0
"""c_noise = ln(sigma) / 4 (Karras et al. 2022, table 1), times 1000."""

AnySchedule = DiscreteVP | RectifiedFlow | VarianceExploding | Unnoised


def zero_terminal_snr(schedule: DiscreteVP) -> DiscreteVP:
    """The same schedule with SNR exactly 0 at T-1 (Lin et al. 2024, algorithm 1): sqrt(abar) shifted, then scaled back."""
    root = schedule.alphas_cumprod.sqrt()
    shifted = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
    return DiscreteVP(alphas_cumprod=shifted.square())


def linear(timesteps: int) -> DiscreteVP:
    """beta linear from 1e-4 to 0.02 at T = 1000 (Ho et al. 2020)."""
    scale = 1000 / timesteps
    return _from_betas(torch.linspace(scale * 1e-4, scale * 0.02, timesteps, dtype=torch.float64))


def scaled_linear(timesteps: int) -> DiscreteVP:
    """sqrt(beta) linear from sqrt(0.00085) to sqrt(0.012): Stable Diffusion's (Rombach et al. 2022)."""
    scale = 1000 / timesteps
    root = torch.linspace(math.sqrt(scale * 0.00085), math.sqrt(scale * 0.012), timesteps, dtype=torch.float64)
    return _from_betas(root.square())


def cosine(timesteps: int) -> DiscreteVP:
    """abar(t) = cos^2((t/T + s)/(1 + s) pi/2), s = 0.008, beta <= 0.999 (Nichol & Dhariwal 2021, equation 17)."""
    u = torch.arange(timesteps + 1, dtype=torch.float64) / timesteps
    abar = torch.cos((u + 0.008) / 1.008 * math.pi / 2).square()
    return _from_betas((1 - abar[1:] / abar[:-1]).clamp(max=0.999))


def _from_betas(betas: Tensor) -> DiscreteVP:
    return DiscreteVP(alphas_cumprod=torch.cumprod(1 - betas.clamp(max=0.999), dim=0))


_DISCRETE = {"linear": linear, "scaled_linear": scaled_linear, "cosine": cosine}


def build(config: ObjectiveConfig) -> AnySchedule:
    """The schedule an objective names."""
    if config.schedule == "flow":
        return RectifiedFlow(timesteps=config.timesteps, shift=config.shift)
    if config.schedule == "ve":
        return VarianceExploding(
            sigma_min=config.sigma_min,
            sigma_max=config.sigma_max,
            sigma_data=config.sigma_data,
            timesteps=config.timesteps,
        )
    if config.schedule == "unnoised":
        return Unnoised()
    schedule = _DISCRETE[config.schedule](config.timesteps)
    return zero_terminal_snr(schedule) if config.zero_terminal_snr else schedule


def shift_for(resolution: int, *, trained_at: int, shift: float = 1.0) -> float:
    """The flow shift at which `resolution` (latent height times width) is as noisy as `trained_at` was with `shift`.

    sqrt(m / n) times the trained shift (Esser et al. 2024, equation 23).
    """
    return shift * math.sqrt(resolution / trained_at)
