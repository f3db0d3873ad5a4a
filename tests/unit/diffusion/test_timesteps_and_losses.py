"""The timestep draw covers its range; after weighting, losses of all predictions are the same loss."""

import math

import pytest
import torch

from latentray.config.objective import ObjectiveConfig
from latentray.diffusion import losses, parameterization, schedules, timesteps

U = torch.linspace(0, 1 - 2**-24, 10_001)


def of(**values) -> tuple[ObjectiveConfig, object]:
    config = ObjectiveConfig(**values)
    return config, schedules.build(config)


def test_discrete_draws_cover_every_timestep_equally():
    config, schedule = of(timesteps=10)
    t = timesteps.from_uniform(config, schedule, U)
    assert t.dtype == torch.int64
    assert t.bincount().tolist() == pytest.approx([1000] * 10, abs=1)
    assert timesteps.from_uniform(config, schedule, torch.tensor([1.0])).tolist() == [9]  # clamped


def test_flow_draws_stay_inside_the_open_range():
    for draw in ("uniform", "logit_normal"):
        config, schedule = of(schedule="flow", prediction="flow", timestep_draw=draw)
        t = timesteps.from_uniform(config, schedule, torch.cat([U, torch.tensor([1.0])]))
        assert float(t.min()) > 0 and float(t.max()) < 1000
        assert float(t.median()) == pytest.approx(500, abs=1)
        assert (t[:-1].diff() >= 0).all()


def test_logit_normal_draws_have_normal_logits():
    config, schedule = of(schedule="flow", prediction="flow", timestep_draw="logit_normal")
    s = timesteps.from_uniform(config, schedule, U[1:-1]) / 1000
    logit = torch.log(s / (1 - s))
    assert float(logit.mean()) == pytest.approx(0, abs=0.01)
    assert float(logit.std()) == pytest.approx(1, abs=0.01)


def test_a_shift_moves_draws_towards_noise():
    plain, shifted = (of(schedule="flow", prediction="flow", shift=shift) for shift in (1.0, 3.0))
    assert (timesteps.from_uniform(*shifted, U[100:-100]) > timesteps.from_uniform(*plain, U[100:-100])).all()


def test_fixed_timesteps_are_the_middles():
    assert timesteps.fixed(of()[1]).tolist() == [62, 187, 312, 437, 562, 687, 812, 937]
    assert timesteps.fixed(of(schedule="flow", prediction="flow")[1], 4).tolist() == [125.0, 375.0, 625.0, 875.0]


@pytest.mark.parametrize("prediction", ["epsilon", "v", "x0"])
def test_min_snr_makes_the_losses_of_all_predictions_equal(prediction):
    """Hang et al. 2023: min(SNR, gamma) |x0_hat - x0|^2, whatever the network says."""
    config, schedule = of(prediction=prediction, weighting="min_snr")
    t = torch.tensor([1, 50, 400, 999])
    x0, noise, x0_hat = (torch.randn(4, 2, 3, 3, dtype=torch.float64) for _ in range(3))
    batch = losses.noised(config, schedule, x0, noise, t)
    alpha, sigma = (v.view(-1, 1, 1, 1) for v in schedule.alpha_sigma(t))
    x = alpha * x0 + sigma * noise
    noise_hat = (x - alpha * x0_hat) / sigma  # the same guess, said in the prediction's own terms
    y = parameterization.target(prediction, x0_hat, noise_hat, alpha, sigma)
    snr = (alpha / sigma).square().flatten()
    expected = snr.clamp(max=5.0) * (x0_hat - x0).square().flatten(1).mean(1)
    torch.testing.assert_close(losses.mean_squared(y, batch).double(), expected, rtol=2e-3, atol=1e-6)


def test_without_weighting_every_sample_counts_the_same():
    config, schedule = of()
    batch = losses.noised(config, schedule, torch.zeros(2, 1, 2, 2), torch.ones(2, 1, 2, 2), torch.tensor([0, 999]))
    assert batch.weight_B.tolist() == [1.0, 1.0]
    assert losses.mean_squared(torch.zeros(2, 1, 2, 2), batch).tolist() == [1.0, 1.0]
    torch.testing.assert_close(
        batch.x_BChw[:, 0, 0, 0].double(), schedule.alpha_sigma(torch.tensor([0, 999]))[1], rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize(
    "values",
    [
        {"schedule": "flow"},
        {"prediction": "flow"},
        {"schedule": "flow", "prediction": "flow", "weighting": "min_snr"},
        {"timestep_draw": "logit_normal"},
        {"timesteps": 1},
    ],
)
def test_objectives_that_contradict_themselves_are_refused(values):
    from latentray.errors import ConfigError

    with pytest.raises(ConfigError) as caught:
        ObjectiveConfig(**values)
    assert caught.value.where.startswith("objective")


def test_the_frames_of_a_clip_share_noise_level_and_offset():
    """A clip is noised as its frames are, one by one, at its own level."""
    config = ObjectiveConfig(prediction="v")
    schedule = schedules.build(config)
    x0, noise, t = torch.randn(2, 3, 4, 5, 6), torch.randn(2, 3, 4, 5, 6), torch.tensor([10.0, 900.0])
    clip = losses.noised(config, schedule, x0, noise, t)
    frames = losses.noised(config, schedule, x0.flatten(0, 1), noise.flatten(0, 1), t.repeat_interleave(3))
    assert torch.equal(clip.x_BChw.flatten(0, 1), frames.x_BChw)
    assert torch.equal(clip.target_BChw.flatten(0, 1), frames.target_BChw)
    y = torch.randn_like(x0)
    each = losses.mean_squared(y.flatten(0, 1), frames).view(2, 3)
    torch.testing.assert_close(losses.mean_squared(y, clip), each.mean(1))
    offset = torch.randn(2, 4)
    shared = losses.offset_noise(noise, offset, 0.1)
    one_by_one = losses.offset_noise(noise.flatten(0, 1), offset.repeat_interleave(3, 0), 0.1)
    assert torch.equal(shared.flatten(0, 1), one_by_one)


def test_offset_noise_adds_a_constant_of_its_strength_to_each_channel():
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, 3, 4, 4, generator=generator)
    offset = torch.randn(2, 3, generator=generator)
    out = losses.offset_noise(noise, offset, 0.1)
    torch.testing.assert_close(out - noise, (0.1 * offset)[:, :, None, None].expand_as(noise), rtol=1e-4, atol=1e-6)
    assert torch.equal(losses.offset_noise(noise, offset, 0.0), noise)


def test_variance_exploding_draws_stay_between_its_ends():
    for draw in ("uniform", "log_normal"):
        config, schedule = of(schedule="ve", prediction="edm", timestep_draw=draw, draw_mean=-1.2, draw_std=1.2)
        t = timesteps.from_uniform(config, schedule, torch.cat([U, torch.tensor([1.0])]))
        s = torch.exp(t / schedules.TIME_PER_LOG_SIGMA)
        assert float(s.min()) >= 0.002 * (1 - 1e-9) and float(s.max()) <= 80 * (1 + 1e-9)
        assert float(s.median().log()) == pytest.approx(
            -1.2 if draw == "log_normal" else 0.5 * math.log(0.002 * 80), abs=0.02
        )


def test_mode_draws_at_scale_zero_are_uniform_and_prefer_the_middle_above():
    flat, peaked = (
        timesteps.from_uniform(
            *of(schedule="flow", prediction="flow", timestep_draw="mode", mode_scale=scale), U[1:-1].double()
        )
        for scale in (0.0, 1.29)
    )
    torch.testing.assert_close(flat, 1000 * (1 - U[1:-1].double()), rtol=0, atol=1e-6 * 1000 + 0.02)
    middle = [float(((t > 400) & (t < 600)).double().mean()) for t in (flat, peaked)]
    assert middle[0] == pytest.approx(0.2, abs=1e-3)
    assert middle[1] > 0.3


@pytest.mark.parametrize("weighting", ["min_snr", "soft_min_snr"])
def test_weights_are_refused_where_they_are_not_defined(weighting):
    from latentray.errors import ConfigError

    for schedule, prediction in (("flow", "flow"), ("ve", "edm")):
        with pytest.raises(ConfigError) as caught:
            ObjectiveConfig(schedule=schedule, prediction=prediction, weighting=weighting)
        assert caught.value.where == "objective.weighting"
