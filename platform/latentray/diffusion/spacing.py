"""Which noise levels a sampler visits: a schedule and a number of steps -> a grid. Each spacing is a function of its own.

trailing   T-1 downwards in equal parts: starts at the noisiest level, as sampling must (Lin et al. 2024, table 2)
leading    1, 1 + T/N, ...: Stable Diffusion 1.x's, which never visits the noisiest levels
linspace   T-1 to 0 in N points; flow: 1 to 1/T
karras     sigma^(1/7) in equal parts (Karras et al. 2022, equation 5)
geometric  ln(sigma) in equal parts (Song & Ermon 2019)
once       the one step of a regression
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from latentray.diffusion.schedules import AnySchedule, DiscreteVP, RectifiedFlow, Unnoised, VarianceExploding
from latentray.errors import ConfigError

_RHO = 7.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grid:
    """The N + 1 noise levels a solver walks: alpha, sigma (N+1,), and the network's timestep at the first N, float64."""

    alpha: Tensor
    sigma: Tensor
    t: Tensor

    @property
    def steps(self) -> int:
        return len(self.alpha) - 1


def _to_clean(schedule: AnySchedule, t: Tensor) -> Grid:
    """A grid over timesteps t that ends at clean data: alpha = 1, sigma = 0."""
    alpha, sigma = schedule.alpha_sigma(t)
    end = torch.tensor([1.0], dtype=torch.float64)
    return Grid(alpha=torch.cat([alpha, end]), sigma=torch.cat([sigma, 0 * end]), t=t.double())


def _trailing(schedule: DiscreteVP, steps: int) -> Grid:
    t = torch.linspace(schedule.timesteps, 0, steps + 1, dtype=torch.float64)[:-1].round().long() - 1
    return _to_clean(schedule, t)


def _leading(schedule: DiscreteVP, steps: int) -> Grid:
    t = (torch.arange(steps) * (schedule.timesteps // steps) + 1).clamp(max=schedule.timesteps - 1).flip(0)
    return _to_clean(schedule, t)


def _linspace(schedule: DiscreteVP, steps: int) -> Grid:
    return _to_clean(schedule, torch.linspace(schedule.timesteps - 1, 0, steps, dtype=torch.float64).round().long())


def _karras_sigmas(low: float, high: float, steps: int) -> Tensor:
    roots = torch.linspace(high ** (1 / _RHO), low ** (1 / _RHO), steps, dtype=torch.float64)
    return roots**_RHO


def _karras(schedule: DiscreteVP, steps: int) -> Grid:
    abar = schedule.alphas_cumprod
    sigmas = ((1 - abar) / abar).sqrt()
    if not torch.isfinite(sigmas[-1]):
        raise ConfigError(
            "Karras spacing needs a largest sigma; with zero terminal SNR there is none.",
            where="spacing",
            mend="Use trailing.",
        )
    wanted = _karras_sigmas(float(sigmas[0]), float(sigmas[-1]), steps)
    return _to_clean(schedule, _times_of(sigmas, wanted))


def _times_of(sigmas: Tensor, wanted: Tensor) -> Tensor:
    """Fractional timesteps where the schedule, log-SNR interpolated between its points, has the wanted sigmas."""
    logs, goal = sigmas.log(), wanted.log()
    high = torch.searchsorted(logs, goal).clamp(1, len(logs) - 1)
    low = high - 1
    w = (goal - logs[low]) / (logs[high] - logs[low])
    return low + w.clamp(0, 1)


def _flow_of(s: Tensor, schedule: RectifiedFlow) -> Grid:
    return _to_clean(schedule, schedule.shifted(s) * schedule.timesteps)


def _flow_trailing(schedule: RectifiedFlow, steps: int) -> Grid:
    return _flow_of(torch.linspace(1, 0, steps + 1, dtype=torch.float64)[:-1], schedule)


def _flow_linspace(schedule: RectifiedFlow, steps: int) -> Grid:
    return _flow_of(torch.linspace(1, 1 / schedule.timesteps, steps, dtype=torch.float64), schedule)


def _flow_sd3(schedule: RectifiedFlow, steps: int) -> Grid:
    """As SD 3's reference code and diffusers: down to the schedule's own smallest level, which is shifted once more."""
    smallest = float(schedule.shifted(torch.tensor(1 / schedule.timesteps, dtype=torch.float64)))
    return _flow_of(torch.linspace(1, smallest, steps, dtype=torch.float64), schedule)


def _ve_karras(schedule: VarianceExploding, steps: int) -> Grid:
    return _to_clean(schedule, schedule.time_of(_karras_sigmas(schedule.sigma_min, schedule.sigma_max, steps)))


def _ve_geometric(schedule: VarianceExploding, steps: int) -> Grid:
    ends = torch.tensor([schedule.sigma_max, schedule.sigma_min], dtype=torch.float64).log()
    s = torch.exp(torch.linspace(float(ends[0]), float(ends[1]), steps, dtype=torch.float64))
    return _to_clean(schedule, schedule.time_of(s))


def _once(schedule: Unnoised, steps: int) -> Grid:
    return _to_clean(schedule, torch.zeros(steps, dtype=torch.int64))


_SPACINGS: dict[type, dict[str, Callable[..., Grid]]] = {
    DiscreteVP: {"trailing": _trailing, "leading": _leading, "linspace": _linspace, "karras": _karras},
    RectifiedFlow: {"trailing": _flow_trailing, "linspace": _flow_linspace, "sd3": _flow_sd3},
    VarianceExploding: {"karras": _ve_karras, "geometric": _ve_geometric},
    Unnoised: {"once": _once},
}


def names(schedule: AnySchedule) -> tuple[str, ...]:
    """The spacings of a schedule; the first is the default."""
    return tuple(_SPACINGS[type(schedule)])


def grid(schedule: AnySchedule, steps: int, spacing: str | None = None) -> Grid:
    """The noise levels of `steps` intervals. Raises ConfigError for an unknown spacing or steps out of range."""
    known = _SPACINGS[type(schedule)]
    spacing = spacing or names(schedule)[0]
    if spacing not in known:
        raise ConfigError(
            f"Spacing {spacing!r} does not apply here.", where="spacing", mend=f"Use one of {', '.join(known)}."
        )
    if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= schedule.timesteps:
        raise ConfigError(f"{steps} steps are out of range.", where="steps", mend=f"Choose 1 to {schedule.timesteps}.")
    return known[spacing](schedule, steps)
