"""A variance that the network learns besides (Nichol & Dhariwal 2021, section 3.1).

Its output has twice the channels: the prediction y, and v. The variance of a step from (alpha, sigma) to (alpha', sigma') lies
between those of the two ends of what is possible, exp(u log beta + (1 - u) log beta~) with u = (v + 1) / 2 (equation 15), where
beta = sigma^2 - (alpha sigma' / alpha')^2 is that of the forward step and beta~ = beta sigma'^2 / sigma^2 that of the posterior.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from latentray.config.objective import ObjectiveConfig
from latentray.diffusion import parameterization
from latentray.diffusion.executor import Table
from latentray.diffusion.losses import Noised
from latentray.diffusion.schedules import AnySchedule

USED_BY = ("ddpm",)
"""The samplers that take the learned variance; the others look at the prediction alone."""


def split(config: ObjectiveConfig, y: Tensor) -> tuple[Tensor, Tensor | None]:
    """A network's output -> the prediction, and v where a variance is learned."""
    if not config.learned_variance:
        return y, None
    prediction, v = y.chunk(2, dim=-3)
    return prediction, v


def bound(config: ObjectiveConfig, schedule: AnySchedule, y: Tensor, v: Tensor, x0: Tensor, batch: Noised) -> Tensor:
    """The term of the variational bound that belongs to each sample's timestep, (B,) float32, bits per number.

    KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)), at t = 0 the negative log density of x_0 (Nichol & Dhariwal 2021, equations
    4 to 7). The mean is not learned from it: y passes no gradient (section 3.1).

    Args:
        y, v: as `split` gives them.
        x0: clean latents.
    """
    t_B = batch.t_B.long()
    first_B = t_B == 0
    wide = (-1, *[1] * (x0.ndim - 1))

    def level(t: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = schedule.alpha_sigma(t)
        return alpha.view(wide), sigma.view(wide)

    (a, s), (a1, s1) = level(t_B), level((t_B - 1).clamp(min=0))
    is_first = first_B.view(wide)
    a1, s1 = torch.where(is_first, torch.ones_like(a1), a1), torch.where(is_first, torch.zeros_like(s1), s1)
    beta = s.square() - (a * s1 / a1).square()
    # beta~ is 0 at t = 0: there the next one stands for it, as in the paper's code.
    (b0, q0), (b1, q1) = level(torch.zeros_like(t_B)), level(torch.ones_like(t_B))
    least = (q1.square() - (b1 * q0 / b0).square()) * q0.square() / q1.square()
    log_beta = beta.log().float()
    log_posterior = torch.where(is_first, least, beta * s1.square() / s.square()).log().float()
    u = (v.float() + 1) / 2
    log_variance = u * log_beta + (1 - u) * log_posterior
    c = parameterization.coefficients(config.prediction, a, s)
    estimate = c.x0_x.float() * batch.x_BChw + c.x0_y.float() * y.detach().float()
    difference = ((a1 * beta / s.square()).float() * (x0 - estimate)).square() * torch.exp(-log_variance)
    divergence = log_variance - log_posterior + torch.exp(log_posterior - log_variance) - 1 + difference
    density = math.log(2 * math.pi) + log_variance + difference
    return torch.where(is_first, density, divergence).flatten(1).mean(1) / (2 * math.log(2))


def hybrid(
    config: ObjectiveConfig, schedule: AnySchedule, error_B: Tensor, y: Tensor, v: Tensor, x0: Tensor, batch: Noised
) -> Tensor:
    """L_simple + variance_weight L_vlb per sample (Nichol & Dhariwal 2021, equation 16), (B,); `error_B` is L_simple."""
    vlb = schedule.timesteps * bound(config, schedule, y, v, x0, batch)
    return error_B + config.variance_weight * vlb


class LearnedNoise:
    """Makes the fresh noise of requests as wide as the network says, while they are sampled.

    A step's posterior variance is what the solver's table holds; the learned one is (sigma / sigma')^(2u) times it.
    """

    def __init__(self, schedule: AnySchedule, tables: Sequence[Table], samplers: Sequence[str]) -> None:
        self._ratios: list[Tensor] = []
        for table, name in zip(tables, samplers, strict=True):
            _, sigma = schedule.alpha_sigma(table.t)
            log_ratio = torch.zeros_like(sigma)
            if name in USED_BY:
                log_ratio[:-1] = sigma[:-1].log() - sigma[1:].log()
            self._ratios.append(log_ratio)
        self._v: dict[int, Tensor] = {}

    def note(self, v: Tensor, rows: Sequence[int]) -> None:
        """What the network said of each of these requests, in the step at hand."""
        self._v = dict(zip(rows, v.float(), strict=True))

    def widened(self, noise: Tensor, rows: Sequence[int], row: int) -> Tensor:
        """Fresh noise of these requests for a row of their tables."""
        return torch.stack(
            [
                one.to(self._v[i]) * torch.exp(float(self._ratios[i][row]) * (self._v[i] + 1) / 2)
                for one, i in zip(noise, rows, strict=True)
            ]
        )
