"""Samplers: orders of convergence on a Gaussian whose score is known, diffusers' trajectories, and mixed batches."""

import math

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
)

from latentray.diffusion import parameterization, samplers, schedules
from latentray.diffusion.schedules import RectifiedFlow
from latentray.diffusion.solvers import Options
from latentray.diffusion.spacing import Grid
from latentray.errors import ConfigError

VP = schedules.scaled_linear(1000)
FLOW = RectifiedFlow()
SD = dict(num_train_timesteps=1000, beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
MEAN, STD = 0.7, 0.3
STEPS = 10  # a divisor of 1000: diffusers takes T // steps for the next timestep


def exact_network(prediction, alpha_sigma):
    """The exact network for data from N(MEAN, STD^2)."""

    def network(x, t, rows):
        alpha, sigma = (v.to(x.dtype).view(-1, 1) for v in alpha_sigma(t.double()))
        variance = (alpha * STD).square() + sigma.square()
        x0 = MEAN + alpha * STD**2 / variance * (x - alpha * MEAN)
        noise = sigma / variance * (x - alpha * MEAN)
        return parameterization.target(prediction, x0, noise, alpha, sigma)

    return network


def error(name, prediction, steps):
    """Distance to the exact solution of the probability-flow ODE, from much noise to little.

    The grid stops short of clean data: there, every solver ends by one step of first order.
    """
    angle = torch.linspace(1.4, 0.4, steps + 1, dtype=torch.float64)
    flow = prediction == "flow"

    def alpha_sigma(angle):
        return (1 - angle.sin(), angle.sin()) if flow else (angle.cos(), angle.sin())

    alpha, sigma = alpha_sigma(angle)
    grid = Grid(alpha=alpha, sigma=sigma, t=angle)  # Heun asks for the last angle too
    table = samplers.on_grid(name, grid, prediction, Options(lower_order_final=False))
    spread = ((alpha * STD).square() + sigma.square()).sqrt()
    x = torch.linspace(-2, 2, 9, dtype=torch.float64).view(1, 9)
    got = samplers.execute([table], x, exact_network(prediction, alpha_sigma), no_noise)
    exact = alpha[-1] * MEAN + spread[-1] / spread[0] * (x - alpha[0] * MEAN)
    return float((got - exact).abs().max())


def no_noise(rows, row):
    raise AssertionError("a deterministic sampler asked for noise")


@pytest.mark.parametrize(
    ("name", "prediction", "order"),
    [
        ("ddim", "epsilon", 1), ("euler", "v", 1), ("heun", "epsilon", 2), ("heun", "v", 2), ("dpmpp_2m", "epsilon", 2),
        ("dpmpp_2m", "x0", 2), ("flow_euler", "flow", 1), ("flow_heun", "flow", 2), ("dpmpp_2m", "flow", 2),
    ],
)  # fmt: skip
def test_the_order_of_convergence(name, prediction, order):
    coarse, fine = (error(name, prediction, steps) for steps in (16, 64))
    assert math.log(coarse / fine, 4) == pytest.approx(order, abs=0.3)


@pytest.mark.parametrize("name", samplers.names(VP))
def test_many_steps_end_at_the_data(name):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 20_000, generator=generator, dtype=torch.float64)
    table = samplers.table(name, VP, "epsilon", 100)

    def fresh(rows, row):
        return torch.randn(1, 20_000, generator=generator, dtype=torch.float64)

    out = samplers.execute([table], x, exact_network("epsilon", VP.alpha_sigma), fresh)
    assert float(out.mean()) == pytest.approx(MEAN, abs=0.03)
    assert float(out.std()) == pytest.approx(STD, abs=0.04)


def model(x, t):
    """Any smooth nonlinear network, in double precision."""
    return torch.sin(1.3 * x + 0.002 * float(t)) + 0.1 * x


def ours(name, schedule, prediction, x, steps=STEPS, fresh=no_noise):
    table = samplers.table(name, schedule, prediction, steps)

    def network(x, t, rows):
        return model(x, t[0])

    return samplers.execute([table], x, network, fresh), table


def follow(scheduler, x, **kwargs):
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(model(scaled, t), t, x, **kwargs).prev_sample
    return x


def start() -> torch.Tensor:
    return torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def close(got, expected) -> None:
    assert float((got - expected).abs().max()) <= 1e-4 * float(expected.abs().max())


@pytest.mark.parametrize(("prediction", "theirs"), [("epsilon", "epsilon"), ("v", "v_prediction"), ("x0", "sample")])
def test_ddim_equals_diffusers(prediction, theirs):
    scheduler = DDIMScheduler(
        **SD, prediction_type=theirs, timestep_spacing="trailing", clip_sample=False, set_alpha_to_one=True
    )
    scheduler.set_timesteps(STEPS)
    got, table = ours("ddim", VP, prediction, start())
    assert table.t.tolist() == scheduler.timesteps.tolist()
    close(got, follow(scheduler, start()))


def test_ddpm_equals_diffusers(monkeypatch):
    scheduler = DDPMScheduler(**SD, timestep_spacing="trailing", clip_sample=False, variance_type="fixed_small")
    scheduler.set_timesteps(STEPS)
    generator = torch.Generator().manual_seed(1)
    noises = [torch.randn(1, 3, 4, 4, generator=generator, dtype=torch.float64) for _ in range(STEPS)]
    got, table = ours("ddpm", VP, "epsilon", start(), fresh=lambda rows, row: noises[row])
    assert table.t.tolist() == scheduler.timesteps.tolist()
    left = iter(noises)
    monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *a, **k: next(left))
    close(got, follow(scheduler, start()))


@pytest.mark.parametrize(("prediction", "theirs"), [("epsilon", "epsilon"), ("v", "v_prediction")])
def test_dpmpp_2m_equals_diffusers(prediction, theirs):
    scheduler = DPMSolverMultistepScheduler(
        **SD, prediction_type=theirs, timestep_spacing="trailing", solver_order=2, algorithm_type="dpmsolver++",
        lower_order_final=True, final_sigmas_type="zero",
    )  # fmt: skip
    scheduler.set_timesteps(STEPS)
    got, table = ours("dpmpp_2m", VP, prediction, start())
    assert table.t.tolist() == scheduler.timesteps.tolist()
    close(got, follow(scheduler, start()))


def test_heun_equals_diffusers():
    scheduler = HeunDiscreteScheduler(**SD, timestep_spacing="trailing")
    scheduler.set_timesteps(STEPS)
    got, table = ours("heun", VP, "epsilon", start())
    assert table.t.tolist() == scheduler.timesteps.tolist()
    assert len(table) == 2 * STEPS - 1
    alpha, _ = VP.alpha_sigma(torch.tensor([999]))
    close(got, follow(scheduler, start() / alpha))  # theirs walks x/alpha


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_euler_equals_diffusers(shift):
    flow = RectifiedFlow(shift=shift)
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=shift)
    sigmas = torch.linspace(1, 0, STEPS + 1)[:-1].tolist()
    scheduler.set_timesteps(sigmas=sigmas)  # it shifts them itself
    got, table = ours("flow_euler", flow, "flow", start())
    torch.testing.assert_close(table.t.float(), scheduler.timesteps, rtol=1e-6, atol=1e-3)
    close(got, follow(scheduler, start()))


MIXED = [("ddim", 5), ("dpmpp_2m", 3), ("heun", 4), ("ddpm", 7), ("euler_ancestral", 1), ("dpmpp_2m", 9)]


def test_each_row_of_a_mixed_batch_is_what_it_is_alone():
    x = torch.randn(len(MIXED), 2, 3, generator=torch.Generator().manual_seed(0))
    tables = [samplers.table(name, VP, "v", steps) for name, steps in MIXED]

    def network(x, t, rows):
        wide = t.view(-1, 1, 1)
        return torch.sin(x + 0.001 * wide) + 0.1 * rows.view(-1, 1, 1)

    def fresh(rows, row):
        seeds = [torch.Generator().manual_seed(100 * i + row) for i in rows]
        return torch.stack([torch.randn(2, 3, generator=g) for g in seeds])

    together = samplers.execute(tables, x, network, fresh)
    for i, table in enumerate(tables):
        alone = samplers.execute(
            [table],
            x[i : i + 1],
            lambda x, t, rows, i=i: network(x, t, rows + i),
            lambda rows, row, i=i: fresh([i], row),
        )
        assert torch.equal(alone[0], together[i])


def test_the_input_noise_is_left_alone():
    x = start()
    ours("ddim", VP, "epsilon", x)
    assert torch.equal(x, start())


def test_a_clamp_bounds_x0():
    table = samplers.table("ddim", VP, "x0", 3, bound="clamp")
    wild = samplers.execute([table], start(), lambda x, t, rows: torch.full_like(x, 9.0), no_noise)
    torch.testing.assert_close(wild, torch.ones_like(wild))  # the last row is x_0 itself
    free = samplers.table("ddim", VP, "x0", 3)
    both = samplers.execute(
        [table, free], torch.cat([start(), start()]), lambda x, t, rows: torch.full_like(x, 9.0), no_noise
    )
    torch.testing.assert_close(both[1:], torch.full_like(wild, 9.0))
    torch.testing.assert_close(both[:1], wild)


@pytest.mark.parametrize("schedule", [VP, FLOW], ids=["discrete", "flow"])
def test_every_sampler_takes_any_number_of_steps(schedule):
    prediction = "flow" if schedule is FLOW else "v"
    for name in samplers.names(schedule):
        for steps in (1, 2, 3, 50):
            table = samplers.table(name, schedule, prediction, steps)
            assert torch.isfinite(table.coefficients).all(), (name, steps)
            assert len(table) == (2 * steps - 1 if "heun" in name else steps)


@pytest.mark.parametrize(
    ("name", "steps", "where", "mend"),
    [("flow_euler", 10, "sampler", "ddim"), ("ddim", 0, "steps", "1 to 1000"), ("ddim", 1001, "steps", "1 to 1000")],
)
def test_what_does_not_apply_is_refused_by_its_field(name, steps, where, mend):
    with pytest.raises(ConfigError) as caught:
        samplers.table(name, VP, "epsilon", steps)
    assert caught.value.where == where
    assert mend in caught.value.mend


def test_a_discrete_sampler_is_refused_for_flow():
    with pytest.raises(ConfigError, match="'ddim' does not apply"):
        samplers.table("ddim", FLOW, "flow", 10)
