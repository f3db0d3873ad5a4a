"""Samplers as tables: every solver is a list of rows, one row per network call, and one executor applies them.

The state of a request is its latent x and three history slots h1, h2, h3. A row reads

    y   = network(x, t)                                   guidance already applied
    m   = f(px x + py y)                                  f: identity, or clamp to [-1, 1]
    x'  = ax x + am m + ay y + a1 h1 + a2 h2 + a3 h3 + az z       z ~ N(0, I)
    h1' = m;  h2' = h1;  h3' = h2

so one batch can hold requests with different solvers, step counts and guidance. All coefficients are built in float64 in
the variance-preserving gauge (the network sees x itself). `x_t = alpha x_0 + sigma noise` throughout.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from latentray.diffusion import parameterization
from latentray.diffusion.schedules import DiscreteVP, RectifiedFlow
from latentray.errors import ConfigError

COLUMNS = ("ax", "a1", "a2", "a3", "am", "ay", "az", "px", "py")
IDENTITY, CLAMP = 0, 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """One request's rows: coefficients (R, 9) float64 in the order of COLUMNS, timesteps (R,) float64, f's id."""

    coefficients: Tensor
    t: Tensor
    f: int = IDENTITY

    def __len__(self) -> int:
        return len(self.t)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grid:
    """The N + 1 noise levels a solver walks: alpha, sigma (N+1,), and the network's timestep at the first N."""

    alpha: Tensor
    sigma: Tensor
    t: Tensor

    @property
    def steps(self) -> int:
        return len(self.t)


def discrete_grid(schedule: DiscreteVP, steps: int) -> Grid:
    """Trailing spacing, T-1 downwards, ending at clean data (Lin et al. 2024, table 2)."""
    t = torch.linspace(schedule.timesteps, 0, steps + 1, dtype=torch.float64)[:-1].round().long() - 1
    alpha, sigma = schedule.alpha_sigma(t)
    one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    return Grid(alpha=torch.cat([alpha, one]), sigma=torch.cat([sigma, zero]), t=t.double())


def flow_grid(schedule: RectifiedFlow, steps: int) -> Grid:
    """s from 1 to 0 in equal parts, then shifted."""
    s = schedule.shifted(torch.linspace(1, 0, steps + 1, dtype=torch.float64))
    return Grid(alpha=1 - s, sigma=s, t=s[:-1] * schedule.timesteps)


class _Rows:
    """Collects rows, by column name."""

    def __init__(self) -> None:
        self.rows: list[list[float]] = []
        self.t: list[float] = []

    def add(self, t: Tensor | float, **columns: Tensor | float) -> None:
        self.rows.append([float(columns.get(name, 0.0)) for name in COLUMNS])
        self.t.append(float(t))

    def table(self) -> Table:
        return Table(
            coefficients=torch.tensor(self.rows, dtype=torch.float64), t=torch.tensor(self.t, dtype=torch.float64)
        )


def _x0_columns(prediction: str, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    c = parameterization.coefficients(prediction, alpha, sigma)
    return c.x0_x, c.x0_y, c.noise_x, c.noise_y


def _ddim(grid: Grid, prediction: str, eta: float) -> Table:
    """Song et al. 2021 (DDIM), equation 12: x' = alpha' x_0 + sqrt(sigma'^2 - s^2) noise + s z; eta = 1 is ancestral."""
    rows = _Rows()
    for i in range(grid.steps):
        a, s, a1, s1 = grid.alpha[i], grid.sigma[i], grid.alpha[i + 1], grid.sigma[i + 1]
        ratio = (s1 / s).square() * (1 - (a / a1).square())
        std = eta * ratio.clamp(min=0).sqrt()
        direction = (s1.square() - std.square()).clamp(min=0).sqrt()
        px, py, qx, qy = _x0_columns(prediction, a, s)
        # x_0 passes through m, so that a clamp acts on it; the noise estimate stays raw.
        rows.add(grid.t[i], ax=direction * qx, ay=direction * qy, am=a1, az=std, px=px, py=py)
    return rows.table()


_HEUN_RATIO = 10.0


def _heun(grid: Grid, prediction: str) -> Table:
    """Karras et al. 2022, algorithm 1 without churn, over s = sigma/alpha: two calls per step but the last.

    The slopes differ by (m1 - m2)/s', so the history keeps x_0. The corrector multiplies an error of the network by about
    s/(2 s'): where a step shrinks s more than tenfold, as the first ones of a cosine schedule do, it is left out.
    """
    rows = _Rows()
    for i in range(grid.steps):
        a, s, a1, s1 = grid.alpha[i], grid.sigma[i], grid.alpha[i + 1], grid.sigma[i + 1]
        px, py, qx, qy = _x0_columns(prediction, a, s)
        rows.add(grid.t[i], ax=s1 * qx, ay=s1 * qy, am=a1, px=px, py=py)  # predictor: Euler
        if s1 > 0 and (s / a) / (s1 / a1) <= _HEUN_RATIO:
            half = a1 * (1 - (s / a) / (s1 / a1)) / 2
            px1, py1, _, _ = _x0_columns(prediction, a1, s1)
            rows.add(grid.t[i + 1], ax=1.0, am=-half, a1=half, px=px1, py=py1)
    return rows.table()


def _heun_flow(grid: Grid, prediction: str) -> Table:
    """Heun's method for dx/ds = y: x' = x + ds (y1 + y2) / 2."""
    rows = _Rows()
    for i in range(grid.steps):
        ds = grid.sigma[i + 1] - grid.sigma[i]
        rows.add(grid.t[i], ax=1.0, ay=ds, py=1.0)
        if grid.sigma[i + 1] > 0:
            rows.add(grid.t[i + 1], ax=1.0, ay=ds / 2, a1=-ds / 2, py=1.0)
    return rows.table()


def _dpmpp_2m(grid: Grid, prediction: str) -> Table:
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2), x_0 form; first order at the first and at the last step."""
    rows = _Rows()
    lam = torch.log(grid.alpha) - torch.log(grid.sigma)
    for i in range(grid.steps):
        a, s, a1, s1 = grid.alpha[i], grid.sigma[i], grid.alpha[i + 1], grid.sigma[i + 1]
        px, py, _, _ = _x0_columns(prediction, a, s)
        if s1 == 0:
            rows.add(grid.t[i], am=1.0, px=px, py=py)  # the limit h -> inf is x_0 itself
            continue
        if s == 0 or a == 0:  # flow starts at alpha = 0, where lambda is -inf: one first-order (DDIM) step
            _, _, qx, qy = _x0_columns(prediction, a, s)
            rows.add(grid.t[i], ax=s1 * qx, ay=s1 * qy, am=a1, px=px, py=py)
            continue
        h = lam[i + 1] - lam[i]
        gain = -a1 * torch.expm1(-h)
        first = i == 0 or not torch.isfinite(lam[i - 1])
        r = torch.tensor(1.0) if first else (lam[i] - lam[i - 1]) / h
        extra = 0.0 if first else 1 / (2 * r)
        rows.add(grid.t[i], ax=s1 / s, am=gain * (1 + extra), a1=-gain * extra, px=px, py=py)
    return rows.table()


_Builder = Callable[[Grid, str], Table]
_DISCRETE: dict[str, _Builder] = {
    "ddpm": lambda grid, p: _ddim(grid, p, eta=1.0),
    "ddim": lambda grid, p: _ddim(grid, p, eta=0.0),
    "euler": lambda grid, p: _ddim(grid, p, eta=0.0),  # Euler over sigma/alpha is DDIM, to rounding
    "euler_ancestral": lambda grid, p: _ddim(grid, p, eta=1.0),
    "heun": _heun,
    "dpmpp_2m": _dpmpp_2m,
}
_FLOW: dict[str, _Builder] = {
    "flow_euler": lambda grid, p: _ddim(grid, p, eta=0.0),
    "flow_heun": _heun_flow,
    "dpmpp_2m": _dpmpp_2m,
}


def names(schedule: DiscreteVP | RectifiedFlow) -> tuple[str, ...]:
    """The samplers that apply to a schedule."""
    return tuple(_DISCRETE if isinstance(schedule, DiscreteVP) else _FLOW)


def table(name: str, schedule: DiscreteVP | RectifiedFlow, prediction: str, steps: int, *, clip: bool = False) -> Table:
    """The rows of one solver over `steps` intervals of a schedule.

    Raises ConfigError for a sampler that does not apply to the schedule (naming those that do) or steps out of range.
    """
    known = _DISCRETE if isinstance(schedule, DiscreteVP) else _FLOW
    if name not in known:
        raise ConfigError(
            f"Sampler {name!r} does not apply here.", where="sampler", mend=f"Use one of {', '.join(known)}."
        )
    if not 1 <= steps <= schedule.timesteps:
        raise ConfigError(f"{steps} steps are out of range.", where="steps", mend=f"Choose 1 to {schedule.timesteps}.")
    grid = discrete_grid(schedule, steps) if isinstance(schedule, DiscreteVP) else flow_grid(schedule, steps)
    built = known[name](grid, prediction)
    return dataclasses.replace(built, f=CLAMP) if clip else built


Network = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x (B,...), t (B,), rows (B,) int64: which requests these are) -> y (B,...)."""
NoiseSource = Callable[[Sequence[int], int], Tensor]
"""(requests, table row) -> fresh N(0, I) of shape (len(requests), ...)."""


def execute(tables: Sequence[Table], noise_B: Tensor, network: Network, fresh_noise: NoiseSource) -> Tensor:
    """Run every request's table to its end, in one batch, and return the final latents (B, ...).

    Args:
        tables: one per request; their lengths may differ.
        noise_B: the initial N(0, I) latents, (B, ...), float32 or float64; the state keeps this dtype.
    """
    x, history = noise_B.clone(), [torch.zeros_like(noise_B) for _ in range(3)]
    wide = (-1, *([1] * (noise_B.ndim - 1)))
    for row in range(max(len(t) for t in tables)):
        active = [i for i, one in enumerate(tables) if row < len(one)]
        index = torch.tensor(active, device=x.device)
        columns = torch.stack([tables[i].coefficients[row] for i in active]).to(x.device, x.dtype)
        ax, a1, a2, a3, am, ay, az, px, py = (c.view(wide) for c in columns.unbind(1))
        t = torch.stack([tables[i].t[row] for i in active]).to(x.device, torch.float32)
        now, (h1, h2, h3) = x[index], (h[index] for h in history)
        y = network(now, t, index).to(x.dtype)
        m = px * now + py * y
        clamp = torch.tensor([tables[i].f == CLAMP for i in active], device=x.device).view(wide)
        m = torch.where(clamp, m.clamp(-1, 1), m)
        after = ax * now + am * m + ay * y + a1 * h1 + a2 * h2 + a3 * h3
        if bool((columns[:, COLUMNS.index("az")] != 0).any()):
            after = after + az * fresh_noise(active, row).to(x.device, x.dtype)
        x[index] = after
        for slot, value in zip(history, (m, h1, h2), strict=True):
            slot[index] = value
    return x
