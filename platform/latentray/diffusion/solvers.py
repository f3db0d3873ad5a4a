"""The solvers: a grid of noise levels -> the rows of a table (see `executor`), one row per network call.

All work on x_t = alpha x_0 + sigma noise with lambda = ln(alpha/sigma), whatever the schedule; none asks that
alpha^2 + sigma^2 = 1. A last level sigma = 0 and a first level alpha = 0 (zero terminal SNR, rectified flow) are met by their
limits: an infinite step in lambda is one first-order step, and the history does not reach across it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor

from latentray.diffusion import parameterization
from latentray.diffusion.executor import COLUMNS, Table
from latentray.diffusion.spacing import Grid


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What some solvers may be told; the others do not look at it."""

    eta: float = 0.0
    """ddim: share of the ancestral noise, 0 to 1."""
    order: int = 2
    """unipc: 1 to 3."""
    corrector: bool = True
    """unipc: correct each point once its network output is known (UniC)."""
    variant: str = "bh2"
    """unipc: B(h) = h (bh1) or e^h - 1 (bh2)."""
    lower_order_final: bool = True
    """Multistep solvers: end in lower order, as few steps want it."""
    heun_ratio: float = 10.0
    """heun: no correction where a step shrinks sigma/alpha by more: there it would multiply the network's error."""
    inner_steps: int = 30
    """langevin: steps at each level."""
    step_size: float = 0.2
    """langevin: each step's variance is twice this, in units of the level's sigma^2."""


class _Rows:
    """Collects rows, by column name. The timestep of a row is that of the level it asks the network about."""

    def __init__(self, grid: Grid, prediction: str) -> None:
        self.grid = grid
        self.rows: list[list[float]] = []
        self.levels: list[int] = []
        self.of = [parameterization.coefficients(prediction, a, s) for a, s in zip(grid.alpha, grid.sigma, strict=True)]

    def add(self, level: int, **columns: Tensor | float) -> None:
        """A row at a grid level whose m is the estimate of x_0 there."""
        c = self.of[level]
        self.add_raw(level, px=c.x0_x, py=c.x0_y, **columns)

    def add_raw(self, level: int, **columns: Tensor | float) -> None:
        self.rows.append([float(columns.get(name, 0.0)) for name in COLUMNS])
        self.levels.append(level)

    def first_order(self, level: int, *, std: Tensor | float = 0.0) -> None:
        """DDIM from this level to the next: x' = alpha' x_0 + sqrt(sigma'^2 - std^2) noise + std z."""
        a1, s1, c = self.grid.alpha[level + 1], self.grid.sigma[level + 1], self.of[level]
        along = (s1.square() - torch.as_tensor(std).square()).clamp(min=0).sqrt()
        # x_0 passes through m, so that a clamp acts on it; the noise estimate stays raw.
        self.add(level, ax=along * c.noise_x, ay=along * c.noise_y, am=a1, az=std)

    def table(self, start: int) -> Table:
        return Table(
            coefficients=torch.tensor(self.rows, dtype=torch.float64).reshape(-1, len(COLUMNS)),
            t=self.grid.t[self.levels],
            alpha=float(self.grid.alpha[start]),
            sigma=float(self.grid.sigma[start]),
        )


def _ancestral_std(grid: Grid, i: int) -> Tensor:
    """Standard deviation of q(x' | x, x_0): sigma'/sigma sqrt(sigma^2 - (alpha sigma'/alpha')^2) (Ho et al. 2020, eq. 7)."""
    a, s, a1, s1 = grid.alpha[i], grid.sigma[i], grid.alpha[i + 1], grid.sigma[i + 1]
    return s1 / s * (s.square() - (a * s1 / a1).square()).clamp(min=0).sqrt()


def ddim(grid: Grid, prediction: str, options: Options, start: int) -> Table:
    """Song et al. 2021 (DDIM), equation 12. On sigma/alpha this is Euler's method; in rectified flow, Euler along t."""
    rows = _Rows(grid, prediction)
    for i in range(start, grid.steps):
        rows.first_order(i, std=options.eta * _ancestral_std(grid, i))
    return rows.table(start)


def euler(grid: Grid, prediction: str, options: Options, start: int) -> Table:
    """Euler's method for the probability-flow ODE over sigma/alpha (Karras et al. 2022): DDIM, to rounding."""
    return ddim(grid, prediction, dataclasses.replace(options, eta=0.0), start)


def ancestral(grid: Grid, prediction: str, options: Options, start: int) -> Table:
    """Ancestral sampling with the smaller variance (Ho et al. 2020, equation 7): DDIM with eta = 1."""
    return ddim(grid, prediction, dataclasses.replace(options, eta=1.0), start)


def heun(grid: Grid, prediction: str, options: Options, start: int) -> Table:
    """Karras et al. 2022, algorithm 1 without churn, over s = sigma/alpha: two calls per step but the last.

    The slopes differ by (m1 - m2)/s', so the history keeps x_0. The corrector multiplies an error of the network by about
    s/(2 s'): where a step shrinks s more than `heun_ratio`, as the first ones of a cosine schedule do, it is left out.
    """
    rows = _Rows(grid, prediction)
    s_over_a = grid.sigma / grid.alpha
    for i in range(start, grid.steps):
        rows.first_order(i)  # predictor: Euler
        ratio = s_over_a[i] / s_over_a[i + 1]
        if grid.sigma[i + 1] > 0 and ratio <= options.heun_ratio:
            half = grid.alpha[i + 1] * (1 - ratio) / 2
            rows.add(i + 1, ax=1.0, am=-half, a1=half)
    return rows.table(start)


def flow_heun(grid: Grid, prediction: str, options: Options, start: int) -> Table:
    """Heun's method for dx/ds = y: x' = x + ds (y1 + y2) / 2."""
    rows = _Rows(grid, prediction)
    for i in range(start, grid.steps):
        ds = grid.sigma[i + 1] - grid.sigma[i]
        rows.add_raw(i, ax=1.0, ay=ds, py=1.0)
        if grid.sigma[i + 1] > 0:
            rows.add_raw(i + 1, ax=1.0, ay=ds / 2, a1=-ds / 2, py=1.0)
    return rows.table(start)


class _Lambda:
    """lambda over a grid, and how many x_0 estimates a step may look back on."""

    def __init__(self, grid: Grid, start: int) -> None:
        self.grid, self.start = grid, start
        self.values = torch.log(grid.alpha) - torch.log(grid.sigma)

    def finite(self, i: int) -> bool:
        """Whether the step from level i to i + 1 is finite in lambda."""
        return bool(torch.isfinite(self.values[i]) and torch.isfinite(self.values[i + 1]))

    def h(self, i: int) -> Tensor:
        return self.values[i + 1] - self.values[i]

    def order(self, i: int, most: int, *, lower_final: bool) -> int:
        """The order of the step from level i: what history there is, and what remains where the end is to be lower."""
        known = 1
        while known < most and i - known >= self.start and torch.isfinite(self.values[i - known]):
            known += 1
        return min(known, self.grid.steps - i) if lower_final else known


def _multistep(grid: Grid, prediction: str, start: int, order: int, d2: float, options: Options) -> Table:
    """DPM-Solver++ in x_0 form (Lu et al. 2022, algorithm 2 and appendix B.3) with divided differences of x_0.

    Args:
        d2: factor of the second divided difference: 2 makes it the second derivative.
    """
    rows, lam = _Rows(grid, prediction), _Lambda(grid, start)
    # Few steps leave long ones near the data, where the higher orders overshoot (Lu et al. 2022, section 5).
    lower = options.lower_order_final and grid.steps < 15
    for i in range(start, grid.steps):
        if not lam.finite(i):
            rows.first_order(i)
            continue
        h, a1 = lam.h(i), grid.alpha[i + 1]
        phi1 = -torch.expm1(-h)  # the weight of x_0, of its slope, of its curvature
        now = lam.order(i, order, lower_final=lower)
        m0, m1, m2 = phi1, torch.zeros_like(h), torch.zeros_like(h)
        if now >= 2:
            r0 = lam.h(i - 1) / h
            slope = phi1 / 2 if now == 2 else 1 - phi1 / h
            m0, m1 = m0 + slope / r0, m1 - slope / r0
        if now == 3:
            r0, r1 = lam.h(i - 1) / h, lam.h(i - 2) / h
            # D1 = d0 + r0/(r0+r1) (d0 - d1), D2 = (d0 - d1)/(r0+r1) with d0 = (m0-m1)/r0, d1 = (m1-m2)/r1
            curve = (slope * r0 + d2 * (phi1 - h + h.square() / 2) / h.square()) / (r0 + r1)
            m0, m1, m2 = m0 + curve / r0, m1 - curve / r0 - curve / r1, m2 + curve / r1
        rows.add(i, ax=grid.sigma[i + 1] / grid.sigma[i], am=a1 * m0, a1=a1 * m1, a2=a1 * m2)
    return rows.table(start)


def dpmpp_2m(grid: Grid, prediction: str, options: Options, start: int) -> Table:
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2)."""
    return _multistep(grid, prediction, start, 2, 0.0, options)


def dpmpp_3m(grid: Grid, prediction: str, options: Options, start: int) -> Table:
    """DPM-Solver++(3M), of third order: the curvature enters as the Taylor coefficient asks."""
    return _multistep(grid, prediction, start, 3, 2.0, options)


def dpmpp_3m_compat(grid: Grid, prediction: str, options: Options, start: int) -> Table:
    """As published implementations have it, with half the curvature: of second order. For parity and export."""
    return _multistep(grid, prediction, start, 3, 1.0, options)


def dpmpp_2m_sde(grid: Grid, prediction: str, options: Options, start: int) -> Table:
    """SDE-DPM-Solver++(2M) (Lu et al. 2022, equation 18), midpoint form; weak order 2."""
    rows, lam = _Rows(grid, prediction), _Lambda(grid, start)
    lower = options.lower_order_final and grid.steps < 15
    for i in range(start, grid.steps):
        if not lam.finite(i):
            rows.first_order(i, std=_ancestral_std(grid, i))
            continue
        h, a1, s1 = lam.h(i), grid.alpha[i + 1], grid.sigma[i + 1]
        gain = -a1 * torch.expm1(-2 * h)
        extra = torch.zeros_like(h)
        if lam.order(i, 2, lower_final=lower) == 2:
            extra = h / (2 * lam.h(i - 1))
        std = s1 * (-torch.expm1(-2 * h)).sqrt()
        decay = s1 / grid.sigma[i] * torch.exp(-h)
        rows.add(i, ax=decay, am=gain * (1 + extra), a1=-gain * extra, az=std)
    return rows.table(start)


def unipc(grid: Grid, prediction: str, options: Options, start: int) -> Table:
    """UniPC of order 1 to 3 in x_0 form (Zhao et al. 2023, algorithms 5 and 6); with its corrector one order more.

    Predictor and corrector of an interval both are (sigma'/sigma) x + a combination of x_0 estimates. So the corrected point
    is the predicted one plus the difference of the two combinations, and correcting a point and predicting the next is one
    row: no anchor point needs to be kept.
    """
    rows, lam = _Rows(grid, prediction), _Lambda(grid, start)
    predicted: Tensor | None = None  # of the interval that ends here: weights of x_0 at this level's predecessors
    order = 0
    for i in range(start, grid.steps):
        if not lam.finite(i):
            rows.first_order(i)  # into clean data that is x_0 itself; out of pure noise there is nothing to correct
            predicted = None
            continue
        shift = torch.zeros(4, dtype=torch.float64)  # corrected minus predicted point, by h0 (this call), h1, h2, h3
        if predicted is not None and options.corrector:
            shift = _unipc_weights(lam, grid, i - 1, order, options.variant, correct=True)
            shift[1:] -= predicted[:3]
        order = lam.order(i, options.order, lower_final=options.lower_order_final)
        weights = _unipc_weights(lam, grid, i, order, options.variant, correct=False)
        predicted = weights
        decay = grid.sigma[i + 1] / grid.sigma[i]
        am, a1, a2, a3 = decay * shift + weights
        rows.add(i, ax=decay, am=am, a1=a1, a2=a2, a3=a3)
    return rows.table(start)


def _unipc_weights(lam: _Lambda, grid: Grid, i: int, order: int, variant: str, *, correct: bool) -> Tensor:
    """Weights of x_0 in the step from level i to i + 1, newest first, padded to 4.

    Predictor: of x_0 at i, i-1, i-2. Corrector: of x_0 at i+1, i, i-1, i-2.
    """
    h = lam.h(i)
    hh = -h
    phi = torch.expm1(hh)
    b_h = hh if variant == "bh1" else phi
    ratios = [(lam.values[i - k] - lam.values[i]) / h for k in range(1, order)]
    points = torch.stack([*ratios, torch.ones_like(h)])
    rhs, term, factorial = [], phi / hh - 1, 1.0
    for k in range(1, order + 1):
        rhs.append(term * factorial / b_h)
        factorial *= k + 1
        term = term / hh - 1 / factorial
    system = torch.stack([points**k for k in range(order)])
    if correct:
        rho = torch.linalg.solve(system, torch.stack(rhs)) if order > 1 else torch.full((1,), 0.5, dtype=torch.float64)
    elif order == 1:
        rho = torch.zeros(0, dtype=torch.float64)
    elif order == 2:
        rho = torch.full((1,), 0.5, dtype=torch.float64)  # the paper's choice at order 2, for which R is not needed
    else:
        rho = torch.linalg.solve(system[:-1, :-1], torch.stack(rhs[:-1]))
    scale = grid.alpha[i + 1]
    of_start = -scale * phi
    differences = -scale * b_h * rho  # of (x_0 at a point - x_0 at i), each over its ratio
    out = torch.zeros(4, dtype=torch.float64)
    offset = 1 if correct else 0
    out[offset] = of_start
    for k, ratio in enumerate(ratios):
        out[offset + 1 + k] += differences[k] / ratio
        out[offset] -= differences[k] / ratio
    if correct:
        out[0] += differences[-1]
        out[1] -= differences[-1]
    return out


def langevin(grid: Grid, prediction: str, options: Options, start: int) -> Table:
    """Annealed Langevin dynamics (Song & Ermon 2019, algorithm 1), with the denoising step at the end (2020, section 3.4).

    At a level s, `inner_steps` times: x + c s^2 score + sqrt(2 c) s z, where score = (x_0 - x)/s^2 and c = `step_size`.
    """
    rows = _Rows(grid, prediction)
    c, noise = options.step_size, math.sqrt(2 * options.step_size)
    for i in range(start, grid.steps):
        a, s = grid.alpha[i], grid.sigma[i]
        for inner in range(options.inner_steps):
            last = inner == options.inner_steps - 1
            to = grid.alpha[i + 1] if last and i < grid.steps - 1 else a  # x is kept as alpha times the data's scale
            rows.add(i, ax=to / a * (1 - c), am=to * c, az=noise * s * to / a)
    rows.add(grid.steps - 1, am=grid.alpha[-1])
    return rows.table(start)


def direct(grid: Grid, prediction: str, options: Options, start: int) -> Table:
    """The network's estimate of x_0 itself: x' = y."""
    rows = _Rows(grid, prediction)
    rows.add_raw(start, am=1.0, py=1.0)
    return rows.table(start)


Solver = Callable[[Grid, str, Options, int], Table]
DISCRETE: dict[str, Solver] = {
    "ddpm": ancestral,
    "ddim": ddim,
    "euler": euler,
    "euler_ancestral": ancestral,
    "heun": heun,
    "dpmpp_2m": dpmpp_2m,
    "dpmpp_3m": dpmpp_3m,
    "dpmpp_2m_sde": dpmpp_2m_sde,
    "unipc": unipc,
}
EXPLODING: dict[str, Solver] = {
    "euler": euler,
    "euler_ancestral": ancestral,
    "heun": heun,
    "dpmpp_2m": dpmpp_2m,
    "dpmpp_3m": dpmpp_3m,
    "unipc": unipc,
    "langevin": langevin,
}
FLOW: dict[str, Solver] = {"flow_euler": euler, "flow_heun": flow_heun, "dpmpp_2m": dpmpp_2m, "unipc": unipc}
UNNOISED: dict[str, Solver] = {"direct": direct}
FOR_PARITY: dict[str, Solver] = {"dpmpp_3m_compat": dpmpp_3m_compat}
