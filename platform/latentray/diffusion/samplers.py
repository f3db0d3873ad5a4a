"""Samplers by name: which apply to a schedule, their tables, and drawing with one of them.

>>> x = sample(network, noise, schedule, sampler="dpmpp_2m", steps=20, prediction="v")
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from latentray.config.bounds import CLAMP, IDENTITY, THRESHOLD
from latentray.config.objective import SCHEDULES
from latentray.diffusion import solvers, spacing
from latentray.diffusion.executor import Slots, Table, execute
from latentray.diffusion.schedules import AnySchedule, DiscreteVP, RectifiedFlow, Unnoised, VarianceExploding
from latentray.errors import ConfigError

_SOLVERS: dict[type, dict[str, solvers.Solver]] = {
    DiscreteVP: solvers.DISCRETE,
    RectifiedFlow: solvers.FLOW,
    VarianceExploding: solvers.EXPLODING,
    Unnoised: solvers.UNNOISED,
}
_PREDICTIONS: dict[type, tuple[str, ...]] = {
    DiscreteVP: ("epsilon", "v", "x0"),
    RectifiedFlow: ("flow",),
    VarianceExploding: ("edm", "epsilon", "x0"),
    Unnoised: ("x0",),
}
_BOUNDS = (IDENTITY, CLAMP, THRESHOLD)
_VARIANTS = ("bh1", "bh2")


def names(schedule: AnySchedule) -> tuple[str, ...]:
    """The samplers that apply to a schedule."""
    return tuple(_SOLVERS[type(schedule)])


def table(
    name: str,
    schedule: AnySchedule,
    prediction: str,
    steps: int,
    *,
    spacing_name: str | None = None,
    start: int = 0,
    stop: int | None = None,
    bound: str = IDENTITY,
    quantile: float = 0.995,
    **options: Any,
) -> Table:
    """The rows of one solver over `steps` intervals of a schedule.

    Args:
        spacing_name: which noise levels are visited (see `spacing`); None for the schedule's default.
        start: begin at this interval, with alpha x_0 + sigma noise of the table's own alpha and sigma: picture-to-picture.
        stop: end before this interval, still noisy: another model takes over from there with start=stop.
        bound: what is done to each estimate of x_0: identity, clamp, or threshold at a `quantile`.
        options: fields of `solvers.Options`.

    Raises ConfigError, which is a ValueError, and names the field: no schedule, a sampler that does not apply to it (naming
    those that do), steps out of range, a prediction that does not fit, eta outside [0, 1], noise prediction from pure noise.
    """
    if type(schedule) not in _SOLVERS:
        raise ConfigError(
            f"{schedule!r} is no schedule.",
            where="schedule",
            mend=f"Build one with schedules.build: {', '.join(SCHEDULES)}.",
        )
    compatible = isinstance(schedule, DiscreteVP | VarianceExploding)
    known = _SOLVERS[type(schedule)] | (solvers.FOR_PARITY if compatible else {})
    if name not in known:
        raise ConfigError(
            f"Sampler {name!r} does not apply here.", where="sampler", mend=f"Use one of {', '.join(names(schedule))}."
        )
    _check(schedule, prediction, bound, quantile)
    chosen = _options(options)
    if name == "langevin" and stop is not None:
        raise ConfigError(
            "Langevin ends in a denoising step, so nothing can take over before its end.",
            where="stop",
            mend="Use another sampler.",
        )
    grid = spacing.grid(schedule, steps, spacing_name)
    last = grid.steps if stop is None else stop
    if not 0 <= start < last <= grid.steps:
        raise ConfigError(
            f"The part from {start} to {last} of {grid.steps} steps is empty.", where="start", mend="Widen it."
        )
    built = on_grid(name, grid, prediction, chosen, start=start, stop=stop)
    return dataclasses.replace(built, f=bound, quantile=quantile)


def on_grid(
    name: str,
    grid: spacing.Grid,
    prediction: str,
    options: solvers.Options | None = None,
    *,
    start: int = 0,
    stop: int | None = None,
) -> Table:
    """The rows of a solver over given noise levels. A `stop` cuts the grid: the rows before it know nothing of what follows."""
    if prediction == "epsilon" and bool((grid.alpha[start : grid.steps] == 0).any()):
        raise ConfigError(
            "Noise prediction says nothing of x_0 where alpha is 0.",
            where="prediction",
            mend="Use a model that predicts v or x0, or a schedule without zero terminal SNR.",
        )
    if stop is not None and stop < grid.steps:
        grid = spacing.Grid(alpha=grid.alpha[: stop + 1], sigma=grid.sigma[: stop + 1], t=grid.t[: stop + 1])
    every = solvers.DISCRETE | solvers.EXPLODING | solvers.FLOW | solvers.UNNOISED | solvers.FOR_PARITY
    return every[name](grid, prediction, options or solvers.Options(), start)


def _check(schedule: AnySchedule, prediction: str, bound: str, quantile: float) -> None:
    fitting = _PREDICTIONS[type(schedule)]
    if prediction not in fitting:
        raise ConfigError(
            f"Prediction {prediction!r} does not fit this schedule.",
            where="prediction",
            mend=f"Use {' or '.join(fitting)}.",
        )
    if bound not in _BOUNDS:
        raise ConfigError(f"There is no bound {bound!r}.", where="bound", mend=f"Use one of {', '.join(_BOUNDS)}.")
    if not 0 < quantile <= 1:
        raise ConfigError(f"The quantile is {quantile}.", where="quantile", mend="Choose one in (0, 1].")


def _options(given: dict[str, Any]) -> solvers.Options:
    known = [field.name for field in dataclasses.fields(solvers.Options)]
    for key in given:
        if key not in known:
            raise ConfigError(f"There is no option {key!r}.", where=key, mend=f"Known: {', '.join(known)}.")
    chosen = solvers.Options(**given)
    for key, ok, wanted in (
        ("eta", 0 <= chosen.eta <= 1, "0 to 1"),
        ("order", chosen.order in (1, 2, 3), "1, 2 or 3"),
        ("variant", chosen.variant in _VARIANTS, "bh1 or bh2"),
        ("inner_steps", chosen.inner_steps >= 1, "1 or more"),
        ("step_size", 0 < chosen.step_size < 1, "between 0 and 1"),
        ("heun_ratio", chosen.heun_ratio > 1, "more than 1"),
    ):
        if not ok:
            raise ConfigError(f"{key} is {getattr(chosen, key)!r}.", where=key, mend=f"Choose {wanted}.")
    return chosen


def start_of(strength: float, steps: int) -> int:
    """The interval at which picture-to-picture starts: `strength` of the steps remain, at least one.

    Raises ConfigError outside (0, 1].
    """
    if not 0 < strength <= 1:
        raise ConfigError(f"strength is {strength}.", where="strength", mend="Choose more than 0, up to 1.")
    return steps - min(max(round(steps * strength), 1), steps)


def sample(
    denoise: Callable[[Tensor, Tensor], Tensor],
    noise: Tensor,
    schedule: AnySchedule,
    sampler: str = "dpmpp_2m",
    steps: int = 20,
    *,
    prediction: str = "epsilon",
    generator: torch.Generator | None = None,
    **settings: Any,
) -> Tensor:
    """Draw with one sampler: from N(0, I) latents (B, ...) to clean ones.

    Args:
        denoise: the guided network, (x (B, ...), t (B,)) -> y (B, ...); what y is, `prediction` says.
        generator: of the stochastic samplers' noise.
        settings: further arguments of `table`.

    Raises ConfigError as `table` does, before the first step; ConfigError too where `noise` is not finite.
    """
    if not noise.is_floating_point() or not math.isfinite(float(noise.abs().sum())):
        raise ConfigError("The starting noise is not finite.", where="noise", mend="Give finite numbers.")
    one = table(sampler, schedule, prediction, steps, **settings)

    def network(x: Tensor, t: Tensor, rows: Tensor) -> Tensor:
        return denoise(x, t)

    def fresh(rows: Sequence[int], row: int) -> Tensor:
        return torch.randn(noise[: len(rows)].shape, generator=generator, dtype=noise.dtype, device=noise.device)

    return execute([one] * len(noise), noise, network, fresh)


__all__ = ["Slots", "Table", "execute", "names", "on_grid", "sample", "start_of", "table"]
