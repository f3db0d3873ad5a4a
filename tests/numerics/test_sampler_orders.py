"""Orders of convergence against exact solutions of the probability-flow ODE, and the identities between solvers.

Data: a Gaussian with diagonal covariance (the ODE scales each coordinate), and a one-dimensional mixture of two (the ODE
keeps each point's quantile, so the solution is a quantile function of a quantile). Grids are uniform in lambda between finite
ends, unevenly placed about 0: symmetric ones superconverge. Multistep solvers start from exact history, since their warm-up is
of lower order, and the lower-order end rules are off.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from latentray.diffusion import parameterization, samplers, schedules
from latentray.diffusion.executor import COLUMNS, Slots, Table
from latentray.diffusion.solvers import Options
from latentray.diffusion.spacing import Grid

FROM, TO = -4.6, 3.7
DOUBLINGS = (40, 80, 160, 320)


def levels(lam: Tensor, *, flow: bool = False) -> tuple[Tensor, Tensor]:
    """alpha and sigma at ln(alpha/sigma) = lam."""
    squared = torch.sigmoid(2 * lam), torch.sigmoid(-2 * lam)
    return (torch.sigmoid(lam), torch.sigmoid(-lam)) if flow else (squared[0].sqrt(), squared[1].sqrt())


class Gaussian:
    """N(mean, diag(variance)): x - alpha mean is scaled by the ratio of standard deviations."""

    mean, variance = torch.tensor([0.7, -0.4]).double(), torch.tensor([0.3, 0.05]).double()
    start = torch.cartesian_prod(torch.linspace(-2, 2, 5), torch.linspace(-2, 2, 5)).double()

    def x0(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        gain = alpha * self.variance / (alpha.square() * self.variance + sigma.square())
        return self.mean + gain * (x - alpha * self.mean)

    def solution(self, here: tuple[Tensor, Tensor], there: tuple[Tensor, Tensor]) -> Tensor:
        wide, narrow = ((a.square() * self.variance + s.square()).sqrt() for a, s in (here, there))
        return there[0] * self.mean + narrow / wide * (self.start - here[0] * self.mean)


class Mixture:
    """0.35 N(-1, 0.3) + 0.65 N(0.8, 0.2): on a line the ODE's map is monotone, so F_t(x_t) stays what it was."""

    weight, mean, variance = (torch.tensor(v).double() for v in ([0.35, 0.65], [-1.0, 0.8], [0.3, 0.2]))
    start = torch.linspace(-1.8, 1.8, 25).double().view(-1, 1)

    def _parts(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        variance = alpha.square() * self.variance + sigma.square()
        return x - alpha * self.mean, variance

    def x0(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        away, variance = self._parts(x, alpha, sigma)
        share = torch.softmax(self.weight.log() - variance.log() / 2 - away.square() / (2 * variance), dim=-1)
        return (share * (self.mean + alpha * self.variance / variance * away)).sum(-1, keepdim=True)

    def _cdf(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        away, variance = self._parts(x, alpha, sigma)
        return (self.weight * torch.special.ndtr(away / variance.sqrt())).sum(-1, keepdim=True)

    def _density(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        away, variance = self._parts(x, alpha, sigma)
        bells = torch.exp(-away.square() / (2 * variance)) / (2 * math.pi * variance).sqrt()
        return (self.weight * bells).sum(-1, keepdim=True)

    def solution(self, here: tuple[Tensor, Tensor], there: tuple[Tensor, Tensor]) -> Tensor:
        wanted = self._cdf(self.start, *here)
        low, high = torch.full_like(wanted, -9.0), torch.full_like(wanted, 9.0)
        for _ in range(40):  # bisection to be safe, then Newton to the last digit
            middle = (low + high) / 2
            below = self._cdf(middle, *there) < wanted
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        x = (low + high) / 2
        for _ in range(3):
            x = x - (self._cdf(x, *there) - wanted) / self._density(x, *there)
        return x


DATA = {"gaussian": Gaussian(), "mixture": Mixture()}


def error(name: str, data: Gaussian | Mixture, prediction: str, steps: int, history: int, options: Options) -> float:
    """Largest distance to the exact end. The first `history` intervals are not walked: their values are the exact ones."""
    lam = torch.linspace(FROM, TO, steps + 1, dtype=torch.float64)
    alpha, sigma = levels(lam, flow=prediction == "flow")
    grid = Grid(alpha=alpha, sigma=sigma, t=torch.arange(steps + 1).double())  # t: which level; exact in any precision
    table = samplers.on_grid(name, grid, prediction, options)
    rows = table.coefficients[history:]
    if name == "unipc" and options.corrector and history:  # the exact point is not to be corrected
        plain = samplers.on_grid(name, grid, prediction, _without_corrector(options))
        rows = torch.cat([plain.coefficients[history : history + 1], rows[1:]])
    table = Table(coefficients=rows, t=table.t[history:])

    def at(level: int) -> Tensor:
        return data.solution((alpha[0], sigma[0]), (alpha[level], sigma[level]))

    x = at(history)
    slots = Slots(1, x.shape, dtype=torch.float64, device="cpu")
    slots.admit(0, table, x)
    for back in range(history):
        level = history - 1 - back
        slots.history[back, 0] = data.x0(at(level), alpha[level], sigma[level])

    def network(x: Tensor, t: Tensor, rows: Tensor) -> Tensor:
        a, s = alpha[int(t)], sigma[int(t)]
        x0 = data.x0(x, a, s)
        return parameterization.target(prediction, x0, (x - a * x0) / s, a, s)

    while slots.unfinished():
        slots.advance([0], network, no_noise)
    return float((slots.x[0] - at(steps)).abs().max())


def _without_corrector(options: Options) -> Options:
    return Options(order=options.order, variant=options.variant, corrector=False, lower_order_final=False)


def no_noise(rows: object, row: int) -> Tensor:
    raise AssertionError("a deterministic solver asked for noise")


def slopes(errors: list[float]) -> list[float]:
    return [math.log2(coarse / fine) for coarse, fine in itertools.pairwise(errors)]


def unipc(order: int, corrector: bool, variant: str = "bh2") -> dict:
    return dict(order=order, corrector=corrector, variant=variant)


CASES = [
    ("ddim", "epsilon", 1, 0, {}),
    ("euler", "v", 1, 0, {}),
    ("heun", "epsilon", 2, 0, {}),
    ("heun", "v", 2, 0, {}),
    ("dpmpp_2m", "epsilon", 2, 1, {}),
    ("dpmpp_2m", "x0", 2, 1, {}),
    ("dpmpp_3m", "epsilon", 3, 2, {}),
    ("dpmpp_3m", "v", 3, 2, {}),
    *(
        ("unipc", "v", order + corrector, order - 1, unipc(order, corrector, variant))
        for order in (1, 2, 3)
        for corrector in (False, True)
        for variant in ("bh1", "bh2")
    ),
    ("flow_euler", "flow", 1, 0, {}),
    ("flow_heun", "flow", 2, 0, {}),
    ("dpmpp_2m", "flow", 2, 1, {}),
    ("unipc", "flow", 3, 1, unipc(2, True)),
]


def name_of(case: tuple) -> str:
    return "-".join([case[0], case[1], *(str(value) for value in case[4].values())])


def errors_of(data: str, case: tuple) -> list[float]:
    name, prediction, _, history, chosen = case
    options = Options(lower_order_final=False, heun_ratio=1e9, **chosen)
    return [error(name, DATA[data], prediction, steps, history, options) for steps in DOUBLINGS]


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_the_order_over_the_last_two_doublings(case: tuple, data: str) -> None:
    found = slopes(errors_of(data, case)[1:])
    assert min(found) >= case[2] - 0.2, found


def test_unipc_3_is_of_fourth_order_over_all_doublings_of_the_mixture() -> None:
    errors = errors_of("mixture", ("unipc", "epsilon", 4, 2, unipc(3, True)))
    x, y = torch.tensor(DOUBLINGS).double().log2(), torch.tensor(errors).double().log2()
    fitted = -float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())
    assert fitted >= 3.3


@pytest.mark.parametrize("data", DATA)
def test_the_published_3m_is_of_second_order(data: str) -> None:
    found = slopes(errors_of(data, ("dpmpp_3m_compat", "epsilon", 2, 2, {}))[1:])
    assert min(found) >= 1.8
    assert max(found) < 2.5


@pytest.mark.parametrize("data", DATA)
def test_the_exact_solutions_are_those_of_the_ode(data: str) -> None:
    """dx/d lambda of x/alpha is -sigma/alpha times the noise: integrated in small steps, no solver of ours."""
    one = DATA[data]
    here, there = (levels(torch.tensor(end, dtype=torch.float64)) for end in (FROM, TO))

    def slope(lam: float, z: object) -> object:
        a, s = levels(torch.tensor(lam, dtype=torch.float64))
        x = a * torch.tensor(z).view_as(one.start)
        return (-(x - a * one.x0(x, a, s)) / a).flatten().numpy()

    begin = (one.start / here[0]).flatten().numpy()
    end = solve_ivp(slope, (FROM, TO), begin, method="DOP853", rtol=1e-12, atol=1e-12).y[:, -1]
    torch.testing.assert_close(
        there[0] * torch.tensor(end).view_as(one.start), one.solution(here, there), rtol=0, atol=1e-9
    )


# -- identities ----------------------------------------------------------------------------------------------------------


def uneven(steps: int = 12, *, flow: bool = False) -> Grid:
    """Levels with steps in lambda between 0.2 and 1.2, as an uneven schedule has."""
    generator = torch.Generator().manual_seed(steps)
    widths = 0.2 + torch.rand(steps, generator=generator, dtype=torch.float64)
    alpha, sigma = levels(torch.cat([torch.zeros(1).double(), widths.cumsum(0)]) - 4, flow=flow)
    return Grid(alpha=alpha, sigma=sigma, t=torch.arange(steps + 1).double())


def acting(table: Table) -> Tensor:
    """What each row does to (x, y, h1, h2, h3, z): equal tables may share the work between m and y differently."""
    c = dict(zip(COLUMNS, table.coefficients.unbind(1), strict=True))
    x, y = c["ax"] + c["am"] * c["px"], c["ay"] + c["am"] * c["py"]
    return torch.stack([x, y, c["a1"], c["a2"], c["a3"], c["az"]], dim=1)


def built(name: str, grid: Grid, prediction: str = "v", **options: object) -> Tensor:
    return acting(samplers.on_grid(name, grid, prediction, Options(lower_order_final=False, **options)))


def differ(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


@pytest.mark.parametrize("prediction", ["epsilon", "v", "x0"])
def test_solvers_that_are_one_another(prediction: str) -> None:
    grid = uneven()
    size = float(built("ddim", grid, prediction).abs().max())  # 1/alpha where the noise is predicted

    def same(one: Tensor, other: Tensor) -> bool:
        return differ(one, other) <= 4e-15 * size

    two = built("unipc", grid, prediction, order=2, corrector=False)
    assert same(two, built("dpmpp_2m", grid, prediction))  # UniP-2 with B(h) = e^h - 1 is 2M
    three = built("unipc", grid, prediction, order=3, corrector=False)
    assert same(three, built("dpmpp_3m", grid, prediction))  # UniP-3 is the corrected 3M ...
    assert differ(three, built("dpmpp_3m_compat", grid, prediction)) > 1e-2  # ... and not the published one
    one = built("unipc", grid, prediction, order=1, corrector=False)
    assert same(one, built("ddim", grid, prediction))  # DPM-Solver++ of order 1 is DDIM
    assert same(one[:1], built("dpmpp_2m", grid, prediction)[:1])
    assert same(built("euler", grid, prediction), built("ddim", grid, prediction))


def test_both_variants_of_unipc_agree_at_full_order_three() -> None:
    grid = uneven()
    one, other = (built("unipc", grid, order=3, variant=variant) for variant in ("bh1", "bh2"))
    assert differ(one[3:], other[3:]) <= 1e-14  # B(h) cancels where no weight is fixed at 1/2
    assert differ(one[:3], other[:3]) > 1e-3


@pytest.mark.parametrize("steps", [1000, 20])
def test_ddim_with_eta_one_is_ddpm(steps: int) -> None:
    """Equation 7 of Ho et al. 2020, written with beta; a coarse walk has the beta of its own steps."""
    schedule = schedules.scaled_linear(1000)
    table = samplers.table("ddim", schedule, "x0", steps, eta=1.0)
    abar = schedule.alphas_cumprod[table.t.long()]
    after = torch.cat([abar[1:], torch.ones(1).double()])
    beta = 1 - abar / after
    of_x = (1 - beta).sqrt() * (1 - after) / (1 - abar)
    of_x0 = after.sqrt() * beta / (1 - abar)
    std = ((1 - after) / (1 - abar) * beta).sqrt()
    nothing = torch.zeros_like(beta)
    expected = torch.stack([of_x, of_x0, nothing, nothing, nothing, std], dim=1)
    torch.testing.assert_close(acting(table), expected, rtol=0, atol=2e-12)
    assert torch.equal(table.coefficients, samplers.table("ddpm", schedule, "x0", steps).coefficients)


def test_euler_walks_the_straight_lines_of_sigma_over_alpha() -> None:
    """x'/alpha' = x/alpha + (s' - s) noise with s = sigma/alpha (Karras et al. 2022, algorithm 1 at order 1)."""
    grid = uneven()
    s = grid.sigma / grid.alpha
    of_x, of_noise = grid.alpha[1:] / grid.alpha[:-1], grid.alpha[1:] * s.diff()
    got = built("euler", grid, "epsilon")
    torch.testing.assert_close(got[:, 0], of_x, rtol=1e-13, atol=0)
    torch.testing.assert_close(got[:, 1], of_noise, rtol=1e-12, atol=0)


def test_flow_euler_and_flow_heun_step_along_the_velocity() -> None:
    grid = uneven(flow=True)
    ds = grid.sigma.diff()
    euler = built("flow_euler", grid, "flow")
    torch.testing.assert_close(euler[:, 0], torch.ones_like(ds), rtol=0, atol=1e-14)
    torch.testing.assert_close(euler[:, 1], ds, rtol=0, atol=1e-14)
    heun = built("flow_heun", grid, "flow")
    assert differ(heun[0::2], euler) <= 1e-14
    torch.testing.assert_close(heun[1::2, 1], ds / 2, rtol=1e-14, atol=0)
    torch.testing.assert_close(heun[1::2, 2], -ds / 2, rtol=1e-14, atol=0)
