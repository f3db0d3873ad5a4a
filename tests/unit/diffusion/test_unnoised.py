"""Regression as an objective: the network sees zeros and its conditions, and its output is the sample."""

import pytest
import torch

from latentray.config.objective import ObjectiveConfig
from latentray.diffusion import losses, samplers, schedules, timesteps
from latentray.errors import ConfigError

CONFIG = ObjectiveConfig(schedule="unnoised", prediction="x0")
SCHEDULE = schedules.build(CONFIG)


def test_the_network_sees_zeros_at_time_zero_and_learns_the_data():
    x0, noise = torch.randn(3, 4, 2), torch.randn(3, 4, 2)
    t = timesteps.from_uniform(CONFIG, SCHEDULE, torch.rand(3))
    batch = losses.noised(CONFIG, SCHEDULE, x0, noise, t)
    assert not batch.x_BChw.any() and not batch.t_B.any()
    assert torch.equal(batch.target_BChw, x0)
    error = losses.mean_squared(torch.zeros_like(x0), batch)
    torch.testing.assert_close(error, x0.square().mean((1, 2)))
    assert timesteps.fixed(SCHEDULE).tolist() == [0]


def test_a_sample_is_what_the_network_says_in_one_call():
    asked = []

    def network(x, t):
        asked.append((x, t))
        return torch.arange(6.0).reshape(3, 2)

    drawn = samplers.sample(network, torch.zeros(3, 2), SCHEDULE, "direct", 1, prediction="x0")
    assert torch.equal(drawn, torch.arange(6.0).reshape(3, 2))
    assert len(asked) == 1 and not asked[0][1].any()
    table = samplers.table("direct", SCHEDULE, "x0", 1)
    assert (table.alpha, table.sigma) == (0.0, 0.0), "it begins with no noise"
    bounded = samplers.sample(network, torch.zeros(3, 2), SCHEDULE, "direct", 1, prediction="x0", bound="clamp")
    assert torch.equal(bounded, drawn.clamp(-1, 1))


@pytest.mark.parametrize(("name", "steps", "where"), [("ddim", 1, "sampler"), ("direct", 2, "steps")])
def test_no_other_sampler_and_no_second_step(name, steps, where):
    with pytest.raises(ConfigError) as caught:
        samplers.table(name, SCHEDULE, "x0", steps)
    assert caught.value.where == where


@pytest.mark.parametrize("name", ["cosine", "flow"])
def test_it_is_no_sampler_of_a_noise_schedule(name):
    prediction = "flow" if name == "flow" else "x0"
    with pytest.raises(ConfigError):
        samplers.table("direct", schedules.build(ObjectiveConfig(schedule=name, prediction=prediction)), prediction, 1)


@pytest.mark.parametrize("changes", [{"prediction": "epsilon"}, {"weighting": "min_snr"}, {"timestep_draw": "mode"}])
def test_what_makes_no_sense_without_noise_is_refused(changes):
    with pytest.raises(ConfigError):
        ObjectiveConfig(**({"schedule": "unnoised", "prediction": "x0"} | changes))
