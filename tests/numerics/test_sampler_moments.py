"""Stochastic solvers by the moments of what they draw, without drawing: Gaussian data makes every step affine.

The mean and covariance of (x, h1, h2, h3) are carried through a table's rows exactly. Beside them stand the papers' own
updates, written here from alpha and sigma alone: an x is a vector of its coefficients on (1, x_T, z_1, z_2, ...), so its mean
is the first of them and its variance the sum of the squares of the others.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from latentray.diffusion import parameterization, samplers, schedules, spacing
from latentray.diffusion.executor import COLUMNS, Table
from latentray.diffusion.schedules import VarianceExploding
from latentray.diffusion.solvers import Options
from latentray.diffusion.spacing import Grid

double = functools.partial(torch.tensor, dtype=torch.float64)
MEAN, VARIANCE = 0.7, 0.3
SCHEDULES = {
    "linear": schedules.linear(1000),
    "scaled_linear": schedules.scaled_linear(1000),
    "cosine": schedules.cosine(1000),
    "zero_terminal": schedules.zero_terminal_snr(schedules.scaled_linear(1000)),
}


def exact_x0(alpha: float, sigma: float, mean: float = MEAN, variance: float = VARIANCE) -> tuple[float, float]:
    """(a, b) of E[x_0 | x_t] = a x_t + b for data from N(mean, variance)."""
    gain = alpha * variance / (alpha**2 * variance + sigma**2)
    return gain, mean - gain * alpha * mean


def through(
    table: Table,
    grid: Grid,
    prediction: str,
    mean: float,
    variance: float,
    data: tuple[float, float] = (MEAN, VARIANCE),
) -> list[tuple[float, float]]:
    """Mean and variance of x after every row, for x of the given mean and variance before the first."""
    mu, covariance = torch.zeros(4).double(), torch.zeros(4, 4).double()
    mu[0], covariance[0, 0] = mean, variance
    found = []
    for row, (alpha, sigma) in enumerate(zip(grid.alpha, grid.sigma, strict=True)):
        if row == len(table):
            break
        c = dict(zip(COLUMNS, table.coefficients[row].tolist(), strict=True))
        a, b = exact_x0(float(alpha), float(sigma), *data)
        # y of the exact network is affine in x; its target is affine in (x_0, noise), noise = (x - alpha x_0) / sigma.
        one, zero = double(1.0), double(0.0)

        def output(x: Tensor, x0: Tensor, alpha: Tensor = alpha, sigma: Tensor = sigma) -> Tensor:
            return parameterization.target(prediction, x0, (x - alpha * x0) / sigma, alpha, sigma)

        of_1 = float(output(zero, b * one))
        of_x = float(output(one, (a + b) * one)) - of_1
        m = double([c["px"] + c["py"] * of_x, 0, 0, 0])
        step = double([c["ax"] + c["ay"] * of_x, c["a1"], c["a2"], c["a3"]]) + c["am"] * m
        keep = torch.eye(4).double()
        matrix = torch.stack([step, m, keep[1], keep[2]])
        constant = double([c["ay"] * of_1 + c["am"] * c["py"] * of_1, c["py"] * of_1, 0, 0])
        mu = matrix @ mu + constant
        covariance = matrix @ covariance @ matrix.T
        covariance[0, 0] += c["az"] ** 2
        found.append((float(mu[0]), float(covariance[0, 0])))
    return found


# -- the papers' updates, on coefficient vectors -------------------------------------------------------------------------


class Walk:
    """x as coefficients on (1, x_T, z_1, ..., z_N)."""

    def __init__(self, grid: Grid, mean: float, variance: float) -> None:
        self.levels = list(zip(grid.alpha.tolist(), grid.sigma.tolist(), strict=True))
        self.x = torch.zeros(len(self.levels) + 1).double()
        self.x[0], self.x[1] = mean, math.sqrt(variance)
        self.moments: list[tuple[float, float]] = []

    def noise(self, i: int) -> Tensor:
        return torch.eye(len(self.x)).double()[2 + i]

    def x0(self, i: int, x: Tensor) -> Tensor:
        a, b = exact_x0(*self.levels[i])
        out = a * x
        out[0] += b
        return out

    def note(self, x: Tensor) -> None:
        self.x = x
        self.moments.append((float(x[0]), float(x[1:].square().sum())))


def ddpm(walk: Walk) -> None:
    """Ho et al. 2020, equations 6 and 7, with the beta of each step."""
    for i, ((a, _), (a1, _)) in enumerate(zip(walk.levels[:-1], walk.levels[1:], strict=True)):
        abar, before = a**2, a1**2
        beta = 1 - abar / before
        mean = (
            math.sqrt(before) * beta / (1 - abar) * walk.x0(i, walk.x)
            + math.sqrt(1 - beta) * (1 - before) / (1 - abar) * walk.x
        )
        walk.note(mean + math.sqrt((1 - before) / (1 - abar) * beta) * walk.noise(i))


def ddim_half(walk: Walk) -> None:
    """Song et al. 2021 (DDIM), equations 12 and 16, eta = 0.5."""
    for i, ((a, s), (a1, _)) in enumerate(zip(walk.levels[:-1], walk.levels[1:], strict=True)):
        abar, before = a**2, a1**2
        std = 0.5 * math.sqrt((1 - before) / (1 - abar)) * math.sqrt(1 - abar / before)
        x0 = walk.x0(i, walk.x)
        noise = (walk.x - a * x0) / s
        walk.note(math.sqrt(before) * x0 + math.sqrt(1 - before - std**2) * noise + std * walk.noise(i))


def euler_ancestral(walk: Walk) -> None:
    """On z = x/alpha and s = sigma/alpha: an Euler step down to s_down, then noise up to s' (Karras, k-diffusion)."""
    for i, ((a, sigma), (a1, sigma1)) in enumerate(zip(walk.levels[:-1], walk.levels[1:], strict=True)):
        z, s, s1 = walk.x / a, sigma / a, sigma1 / a1
        up = min(s1, math.sqrt(s1**2 * (s**2 - s1**2) / s**2))
        down = math.sqrt(s1**2 - up**2)
        slope = (z - walk.x0(i, walk.x)) / s
        walk.note(a1 * (z + slope * (down - s) + up * walk.noise(i)))


def sde_2m(walk: Walk) -> None:
    """Lu et al. 2022, SDE-DPM-Solver++(2M); the first step, and the one into clean data, are of first order."""
    old, last_h = None, 0.0
    for i, ((a, s), (a1, s1)) in enumerate(zip(walk.levels[:-1], walk.levels[1:], strict=True)):
        x0 = walk.x0(i, walk.x)
        if s1 == 0:
            walk.note(x0)
            continue
        h = math.log(a1 / s1) - math.log(a / s)
        d = x0 if old is None else x0 + h / last_h / 2 * (x0 - old)
        kept = -math.expm1(-2 * h)
        walk.note(s1 / s * math.exp(-h) * walk.x + a1 * kept * d + s1 * math.sqrt(kept) * walk.noise(i))
        old, last_h = x0, h


PAPERS: dict[str, tuple[Callable[[Walk], None], dict]] = {
    "ddpm": (ddpm, {}),
    "ddim": (ddim_half, {"eta": 0.5}),
    "euler_ancestral": (euler_ancestral, {}),
    "dpmpp_2m_sde": (sde_2m, {}),
}


def levels_of(schedule: schedules.AnySchedule, t: Tensor) -> Grid:
    """The levels a table visits, then clean data."""
    alpha, sigma = schedule.alpha_sigma(t.long() if isinstance(schedule, schedules.DiscreteVP) else t)
    end = double([1.0])
    return Grid(alpha=torch.cat([alpha, end]), sigma=torch.cat([sigma, 0 * end]), t=t)


CASES = [
    (schedule, solver, prediction)
    for schedule in SCHEDULES
    for solver in PAPERS
    for prediction in ("epsilon", "v", "x0")
    # from pure noise the noise says nothing of x_0, sigma/alpha is infinite, and so is the step in lambda
    if schedule != "zero_terminal" or (prediction != "epsilon" and solver in ("ddpm", "ddim"))
]


@pytest.mark.parametrize("case", CASES, ids="-".join)
@pytest.mark.parametrize("steps", [5, 20, 50])
def test_every_step_has_the_moments_of_the_papers_update(case: tuple[str, str, str], steps: int) -> None:
    name, solver, prediction = case
    paper, options = PAPERS[solver]
    table = samplers.table(solver, SCHEDULES[name], prediction, steps, **options)
    grid = levels_of(SCHEDULES[name], table.t)
    walk = Walk(grid, 0.0, 1.0)
    paper(walk)
    torch.testing.assert_close(
        double(through(table, grid, prediction, 0.0, 1.0)), double(walk.moments), rtol=0, atol=1e-10
    )


def uniform(steps: int) -> Grid:
    """Uniform in lambda between finite ends, unevenly placed about 0."""
    lam = torch.linspace(-4.6, 3.7, steps + 1, dtype=torch.float64)
    return Grid(
        alpha=torch.sigmoid(2 * lam).sqrt(), sigma=torch.sigmoid(-2 * lam).sqrt(), t=torch.arange(steps).double()
    )


def marginal(grid: Grid, level: int) -> tuple[float, float]:
    alpha, sigma = float(grid.alpha[level]), float(grid.sigma[level])
    return alpha * MEAN, alpha**2 * VARIANCE + sigma**2


@pytest.mark.parametrize(("solver", "order"), [("ddpm", 1), ("ddim", 1), ("euler_ancestral", 1), ("dpmpp_2m_sde", 2)])
def test_the_variance_converges_to_the_truth_with_the_weak_order(solver: str, order: int) -> None:
    errors = []
    for steps in (80, 160, 320):
        grid = uniform(steps)
        options = Options(lower_order_final=False, **PAPERS[solver][1])
        table = samplers.on_grid(solver, grid, "v", options)
        mean, variance = through(table, grid, "v", *marginal(grid, 0))[-1]
        wanted = marginal(grid, steps)
        errors.append(abs(variance - wanted[1]))
        if solver != "ddim":
            assert mean == pytest.approx(wanted[0], abs=1e-10)  # with eta < 1 the mean has an error too
    slopes = [math.log2(coarse / fine) for coarse, fine in itertools.pairwise(errors)]
    assert min(slopes) >= order - 0.2, slopes
    assert max(slopes) <= order + 0.2, slopes


@pytest.mark.parametrize("name", ["linear", "scaled_linear", "zero_terminal"])
def test_at_20_steps_ddpm_draws_a_third_too_little_variance(name: str) -> None:
    """No error of ours: the papers' update does. 2M-SDE errs less than half as much, and DDPM mends with more steps."""

    def share(solver: str, steps: int) -> float:
        table = samplers.table(solver, SCHEDULES[name], "v", steps)
        return through(table, levels_of(SCHEDULES[name], table.t), "v", 0.0, 1.0)[-1][1] / VARIANCE

    missing = 1 - share("ddpm", 20)
    assert missing == pytest.approx(1 / 3, abs=0.05)
    assert abs(1 - share("dpmpp_2m_sde", 20)) < missing / 2
    assert abs(1 - share("ddpm", 1000)) < 0.02


# -- annealed Langevin ---------------------------------------------------------------------------------------------------

EXPLODING = VarianceExploding(sigma_min=0.1, sigma_max=10.0)
WEIGHTS, CENTRES, WIDTH = double([0.2, 0.8]), double([-2.0, 2.0]), 0.5


def two_bells_x0(z: Tensor, s: Tensor) -> Tensor:
    """E[x_0 | z = x_0 + s noise] for two bells of standard deviation WIDTH."""
    away, variance = z.unsqueeze(-1) - CENTRES, WIDTH**2 + s.square()
    share = torch.softmax(WEIGHTS.log() - away.square() / (2 * variance), dim=-1)
    return (share * (CENTRES + WIDTH**2 / variance * away)).sum(-1)


def two_bells(x: Tensor, t: Tensor, rows: Tensor) -> Tensor:
    alpha, sigma = EXPLODING.alpha_sigma(t.double())
    return two_bells_x0(x / alpha, sigma / alpha)


def test_langevin_finds_the_weights_of_a_mixture() -> None:
    """20,000 chains: within 0.02 of the weights, where the levels are close and each is walked long enough."""
    generator = torch.Generator().manual_seed(0)

    def normal() -> Tensor:
        return torch.randn(1, 20_000, generator=generator, dtype=torch.float64)

    settings = dict(spacing_name="geometric", inner_steps=30, step_size=0.2)
    table = samplers.table("langevin", EXPLODING, "x0", 40, **settings)
    out = samplers.execute([table], normal(), two_bells, lambda rows, row: normal())
    left = out < 0
    assert float(left.double().mean()) == pytest.approx(0.2, abs=0.02)
    for part, centre in ((out[left], -2.0), (out[~left], 2.0)):
        assert float(part.mean()) == pytest.approx(centre, abs=0.03)
        assert float(part.std()) == pytest.approx(WIDTH, abs=0.03)


def test_langevin_is_the_published_loop() -> None:
    """Song & Ermon 2019, algorithm 1 over z = x/alpha, and the denoising step of 2020."""
    steps, inner, c = 6, 5, 0.05
    grid = spacing.grid(EXPLODING, steps, "geometric")
    grid = Grid(alpha=grid.alpha, sigma=grid.sigma, t=torch.arange(steps).double())  # t: which level, exact in float32
    levels = (grid.sigma / grid.alpha)[:steps]
    torch.testing.assert_close(levels, torch.logspace(1, -1, steps).double(), rtol=1e-6, atol=0)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, 50, generator=generator, dtype=torch.float64)
    noises = torch.randn(steps * inner, 1, 50, generator=generator, dtype=torch.float64)
    z = x * (1 + levels[0].square()).sqrt()
    for level, s in enumerate(levels):
        for k in range(inner):
            score = (two_bells_x0(z, s) - z) / s.square()
            z = z + c * s.square() * score + math.sqrt(2 * c) * s * noises[level * inner + k]
    z = two_bells_x0(z, levels[-1])

    def network(x: Tensor, t: Tensor, rows: Tensor) -> Tensor:
        return two_bells_x0(x / grid.alpha[int(t)], levels[int(t)])

    table = samplers.on_grid("langevin", grid, "x0", Options(inner_steps=inner, step_size=c))
    got = samplers.execute([table], x, network, lambda rows, row: noises[row])
    torch.testing.assert_close(got, z, rtol=0, atol=1e-12)
