"""diffusers' schedulers, followed step by step beside our tables, with their module-level float32 read as float64.

The algorithm that runs is diffusers' own: only the names `torch`, `np` and `randn_tensor` in its scheduler modules are
replaced, and only while a scheduler runs here. Every state is returned in our gauge, alpha^2 + sigma^2 = 1 (or rectified
flow's alpha + sigma = 1), in which relative errors are what they are in theirs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from latentray.diffusion import samplers
from latentray.diffusion.executor import Slots, Table
from latentray.diffusion.solvers import Options
from latentray.diffusion.spacing import Grid

PREDICTIONS = {"epsilon": "epsilon", "v": "v_prediction", "x0": "sample", "flow": "flow_prediction"}
SCHEDULES: dict[str, dict[str, Any]] = {
    "linear": dict(beta_schedule="linear", beta_start=1e-4, beta_end=0.02),
    "scaled_linear": dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012),
    "cosine": dict(beta_schedule="squaredcos_cap_v2"),
}
SCHEDULES |= {f"{name}_zsnr": one | dict(rescale_betas_zero_snr=True) for name, one in list(SCHEDULES.items())}
DISCRETE, EXPLODING, PRESERVING, FLOW = "discrete", "exploding", "preserving", "flow"


class _Wide:
    """A module that calls float64 `float32`."""

    def __init__(self, module: Any) -> None:
        self._module = module
        self.float32 = module.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pair:
    """One of diffusers' schedulers, and the sampler of ours that must walk the same path."""

    scheduler: type
    ours: str
    state: str
    """discrete: levels are alphas_cumprod at timesteps; exploding: x is x_t/alpha and levels are sigmas; preserving: x is
    x_t, levels are sigma/alpha; flow: levels are sigma."""
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    options: Options = dataclasses.field(default_factory=Options)
    step: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Arguments of every scheduler.step."""
    without_corrector: bool = False
    zero_snr: bool = True
    """Whether the scheduler can rescale to zero terminal SNR."""
    karras: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """One combination of schedule, prediction, spacing and number of steps."""

    schedule: str
    prediction: str
    spacing: str
    steps: int

    def __str__(self) -> str:
        return f"{self.schedule} {self.prediction} {self.spacing} {self.steps}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Walk:
    """What a scheduler did: the levels it walked and its state after each step, (calls, ...)."""

    grids: list[Grid]
    """One; or one per step where the scheduler steps to a level other than the one it asks about next (DDIM's T // N)."""
    states: Tensor
    """In our gauge; not finite, or none, where the scheduler fails."""

    @property
    def finished(self) -> bool:
        return len(self.states) > 0 and bool(torch.isfinite(self.states).all())


def network(x: Tensor, t: Tensor) -> Tensor:
    """Any smooth nonlinear network; t (B,). Slots hand out float32 timesteps, so both sides are given those."""
    wide = t.float().to(x.dtype).view(-1, *([1] * (x.ndim - 1)))
    return torch.sin(1.3 * x + 0.002 * wide) + 0.1 * x


@functools.cache
def draws(count: int) -> Tensor:
    """N(0, I): the first is the starting latent, then one per step. Of float32 precision, so that both precisions get them."""
    generator = torch.Generator().manual_seed(11)
    return torch.randn(count + 1, 1, 3, 2, 2, generator=generator).double()


@contextlib.contextmanager
def _patched(scheduler: type, wide: bool, noise: dict[str, Tensor]) -> Iterator[None]:
    module = sys.modules[scheduler.__module__]
    with pytest.MonkeyPatch.context() as patch:
        if wide:
            patch.setattr(module, "torch", _Wide(torch))
            patch.setattr(module, "np", _Wide(np))
        if hasattr(module, "randn_tensor"):
            patch.setattr(module, "randn_tensor", lambda *args, **kwargs: noise["now"])
        yield


def build(pair: Pair, cell: Cell) -> Any:
    """The scheduler of a cell, its timesteps set."""
    settings = dict(pair.settings)
    if cell.schedule.startswith("flow"):
        shift = float(cell.schedule.removeprefix("flow"))
        if pair.state == FLOW and "use_flow_sigmas" in settings:
            settings |= dict(flow_shift=shift, prediction_type=PREDICTIONS[cell.prediction])
        else:
            settings |= dict(shift=shift)
    else:
        settings |= SCHEDULES[cell.schedule] | dict(prediction_type=PREDICTIONS[cell.prediction])
        settings |= dict(timestep_spacing="linspace" if cell.spacing == "karras" else cell.spacing)
    if cell.spacing == "karras":
        settings |= dict(use_karras_sigmas=True)
    if pair.without_corrector:
        settings |= dict(disable_corrector=list(range(cell.steps)))
    scheduler = pair.scheduler(**settings)
    scheduler.set_timesteps(cell.steps)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)  # its look-up by value skips a level where two timesteps are equal
    return scheduler


def _grids(pair: Pair, scheduler: Any) -> tuple[list[Grid], list[int]]:
    """The levels, and the level that each step ends at."""
    t = scheduler.timesteps.double()
    if pair.state == DISCRETE:
        abar = scheduler.alphas_cumprod.double()
        at = scheduler.timesteps.tolist()
        back = [at[i + 1] if i + 1 < len(at) else -1 for i in range(len(at))]
        if hasattr(scheduler, "final_alpha_cumprod"):
            back = [one - 1000 // len(at) for one in at]
        chained = back[:-1] == at[1:]
        levels = [abar[one] if one >= 0 else abar.new_tensor(1.0) for one in back]
        chains = [[*abar[at], levels[-1]]] if chained else [[abar[a], b] for a, b in zip(at, levels, strict=True)]
        starts = [0] if chained else range(len(at))
        grids = []
        for start, chain in zip(starts, chains, strict=True):
            one = torch.stack(chain)
            grids.append(Grid(alpha=one.sqrt(), sigma=(1 - one).sqrt(), t=t[start : start + len(chain) - 1]))
        return grids, list(range(1, len(at) + 1))
    s = scheduler.sigmas.double()
    ends = list(range(1, len(s)))
    if scheduler.order == 2:  # each level but the first and the last stands twice
        ends = [1 + i // 2 for i in range(len(s) - 1)]
        s, t = torch.cat([s[:1], s[1:-1:2], s[-1:]]), torch.cat([t[:1], t[1::2]])
    if pair.state == FLOW:
        return [Grid(alpha=1 - s, sigma=s, t=t)], ends
    alpha = 1 / (1 + s.square()).sqrt()
    return [Grid(alpha=alpha, sigma=s * alpha, t=t)], ends


def levels(pair: Pair, cell: Cell) -> list[Grid]:
    """The levels a scheduler walks, and its timesteps, in float64."""
    with _patched(pair.scheduler, True, {}):
        return _grids(pair, build(pair, cell))[0]


def follow(pair: Pair, cell: Cell, *, wide: bool) -> Walk:
    """Run the scheduler to its end, or to where it fails; `wide` in float64, else as it is."""
    noise: dict[str, Tensor] = {}
    dtype = torch.float64 if wide else torch.float32
    with _patched(pair.scheduler, wide, noise):
        scheduler = build(pair, cell)
        grids, ends = _grids(pair, scheduler)
        fresh = draws(2 * cell.steps + 2)
        x, gauge = fresh[0], torch.ones(len(ends), dtype=torch.float64)
        if pair.state == EXPLODING:
            x, gauge = x / grids[0].alpha[0], grids[0].alpha[ends]
        x, states = x.to(dtype), []
        for i, t in enumerate(scheduler.timesteps):
            noise["now"] = fresh[i + 1].to(dtype)
            seen = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
            try:
                x = scheduler.step(network(seen, t.view(1)), t, x, **pair.step).prev_sample
            except NotImplementedError:
                break
            states.append(x)
    found = torch.cat(states).double() if states else torch.zeros(0, *fresh.shape[2:], dtype=torch.float64)
    return Walk(grids=grids, states=found * gauge[: len(found)].view(-1, 1, 1, 1))


def table(pair: Pair, cell: Cell, grids: list[Grid]) -> Table:
    """Our rows over the levels of a walk."""
    parts = [samplers.on_grid(pair.ours, grid, cell.prediction, pair.options) for grid in grids]
    rows = torch.cat([one.coefficients for one in parts])
    return dataclasses.replace(parts[0], coefficients=rows, t=torch.cat([one.t for one in parts]))


def ours(tables: list[Table]) -> list[Tensor]:
    """Our states after each row, float64: all tables in one batch, as a server would run them."""
    slots = Slots(len(tables), draws(0).shape[2:], dtype=torch.float64, device="cpu")
    noises = draws(2 * max(len(one) for one in tables) + 2)
    states: list[list[Tensor]] = [[] for _ in tables]
    for i, one in enumerate(tables):
        slots.admit(i, one, noises[0, 0])
    while active := slots.unfinished():
        slots.advance(
            active, lambda x, t, rows: network(x, t), lambda rows, row: noises[row + 1].expand(len(rows), -1, -1, -1)
        )
        for i in active:
            states[i].append(slots.x[i].clone())
    return [torch.stack(one) for one in states]


def distance(got: Tensor, expected: Tensor) -> float:
    """The largest difference of any step, relative to max|x| of that step."""
    assert got.shape == expected.shape
    scale = expected.flatten(1).abs().amax(1)
    return float(((got - expected).flatten(1).abs().amax(1) / scale).max())
