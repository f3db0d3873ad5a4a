"""Schedules: diffusers' numbers, fractional timesteps, and rectified flow in closed form."""

import math

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


def test_zero_terminal_snr_has_levels_at_whole_fractional_timesteps():
    """A sampler keeps timesteps as float64: 999.0 must be what 999 is, although ln(SNR) is infinite there."""
    schedule = schedules.zero_terminal_snr(schedules.scaled_linear(1000))
    whole = torch.tensor([0, 500, 998, 999])
    torch.testing.assert_close(schedule.alpha_sigma(whole.double()), schedule.alpha_sigma(whole), rtol=0, atol=0)
    assert [float(v) for v in schedule.alpha_sigma(torch.tensor(999.0))] == [0.0, 1.0]


def test_zero_terminal_snr_is_the_published_algorithm():
    """Lin et al. 2024, algorithm 1, step by step from beta."""
    plain = schedules.scaled_linear(1000)
    abar = plain.alphas_cumprod
    beta = 1 - abar / torch.cat([torch.ones(1, dtype=torch.float64), abar[:-1]])
    root = torch.cumprod(1 - beta, dim=0).sqrt()
    first, last = root[0].clone(), root[-1].clone()
    root = (root - last) * first / (first - last)
    torch.testing.assert_close(schedules.zero_terminal_snr(plain).alphas_cumprod, root.square(), rtol=1e-9, atol=1e-15)


def test_the_variance_exploding_schedule_keeps_the_networks_input_at_unit_variance():
    schedule = schedules.VarianceExploding(sigma_min=0.01, sigma_max=50.0, sigma_data=0.5)
    s = torch.logspace(-2, math.log10(50), 20, dtype=torch.float64)
    alpha, sigma = schedule.alpha_sigma(schedule.time_of(s))
    torch.testing.assert_close(sigma / alpha, s, rtol=1e-12, atol=0)
    torch.testing.assert_close((0.5 * alpha).square() + sigma.square(), torch.ones(20, dtype=torch.float64))


def test_the_resolution_shift_keeps_the_noise_of_a_constant_picture():
    """Esser et al. 2024, equation 23: with n values of one colour, its uncertainty is s / ((1 - s) sqrt(n))."""
    shift = schedules.shift_for(64 * 64, trained_at=32 * 32)
    assert shift == 2.0
    s = torch.linspace(0.05, 0.95, 10, dtype=torch.float64)
    shifted = schedules.RectifiedFlow(shift=shift).shifted(s)
    torch.testing.assert_close(shifted / (1 - shifted) / 64, s / (1 - s) / 32)
    assert schedules.shift_for(32 * 32, trained_at=32 * 32, shift=3.0) == 3.0
