"""Schedules: diffusers' numbers, fractional timesteps, and rectified flow in closed form."""

import pytest
import torch
from diffusers import DDIMScheduler

from latentray.config.objective import ObjectiveConfig
from latentray.diffusion import schedules

THEIRS = {
    "linear": dict(beta_schedule="linear", beta_start=1e-4, beta_end=0.02),
    "scaled_linear": dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012),
    "cosine": dict(beta_schedule="squaredcos_cap_v2"),
}


@pytest.mark.parametrize("name", THEIRS)
def test_the_cumulative_products_equal_diffusers(name):
    ours = schedules.build(ObjectiveConfig(schedule=name, prediction="epsilon"))
    expected = DDIMScheduler(num_train_timesteps=1000, **THEIRS[name]).alphas_cumprod.double()
    torch.testing.assert_close(ours.alphas_cumprod, expected, rtol=3e-4, atol=1e-9)  # theirs is a float32 product
    torch.testing.assert_close(ours.alphas_cumprod[:500], expected[:500], rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", THEIRS)
@pytest.mark.parametrize("timesteps", [10, 100, 1000])
def test_signal_falls_and_power_is_preserved(name, timesteps):
    schedule = schedules.build(ObjectiveConfig(schedule=name, prediction="epsilon", timesteps=timesteps))
    alpha, sigma = schedule.alpha_sigma(torch.arange(timesteps))
    torch.testing.assert_close(alpha.square() + sigma.square(), torch.ones(timesteps, dtype=torch.float64))
    assert (alpha.diff() < 0).all()
    assert float(alpha[0]) > 0.85 and 0 < float(alpha[-1]) < 0.1


def test_fractional_timesteps_interpolate_the_log_snr():
    schedule = schedules.scaled_linear(1000)

    def log_snr(t):
        alpha, sigma = schedule.alpha_sigma(torch.tensor([t], dtype=torch.float64))
        return float(2 * (alpha.log() - sigma.log()))

    assert log_snr(10.25) == pytest.approx(0.75 * log_snr(10.0) + 0.25 * log_snr(11.0), rel=1e-9)
    whole = schedule.alpha_sigma(torch.tensor([0, 500, 999]))
    fraction = schedule.alpha_sigma(torch.tensor([0.0, 500.0, 999.0]))
    torch.testing.assert_close(whole, fraction)


def test_rectified_flow_is_a_straight_path():
    flow = schedules.RectifiedFlow(timesteps=1000, shift=3.0)
    alpha, sigma = flow.alpha_sigma(torch.tensor([0.0, 250.0, 1000.0]))
    assert alpha.tolist() == [1.0, 0.75, 0.0]
    assert sigma.tolist() == [0.0, 0.25, 1.0]
    s = torch.tensor([0.0, 0.5, 1.0])
    torch.testing.assert_close(flow.shifted(s), torch.tensor([0.0, 0.75, 1.0]))
    assert torch.equal(schedules.RectifiedFlow().shifted(s), s)
