"""Where in its range a timestep lies, and whether two schedules mean the same by it."""

import itertools

import pytest
import torch

from latentray.config.objective import ObjectiveConfig
from latentray.diffusion import schedules, timesteps

SCHEDULES = {
    "linear": {"schedule": "linear"},
    "cosine": {"schedule": "cosine"},
    "shorter": {"schedule": "linear", "timesteps": 500},
    "zero_snr": {"schedule": "linear", "prediction": "v", "zero_terminal_snr": True},
    "flow": {"schedule": "flow", "prediction": "flow"},
    "ve": {"schedule": "ve", "prediction": "edm"},
    "wider": {"schedule": "ve", "prediction": "edm", "sigma_max": 100.0},
    "other_data": {"schedule": "ve", "prediction": "edm", "sigma_data": 0.5},
}


def built(name: str, **more) -> schedules.AnySchedule:
    return schedules.build(ObjectiveConfig(**(SCHEDULES[name] | more)))


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_range_falls_into_three_equal_parts_from_the_least_noise_on(name):
    schedule = built(name)
    u = torch.arange(300) / 300 + 1 / 600
    config = ObjectiveConfig(**SCHEDULES[name])
    t = timesteps.from_uniform(config, schedule, u)
    assert timesteps.third(schedule, t).tolist() == [0] * 100 + [1] * 100 + [2] * 100
    alpha, sigma = schedule.alpha_sigma(t)
    assert float((sigma / alpha)[:100].max()) < float((sigma / alpha)[200:].min())
    assert timesteps.third(schedule, timesteps.fixed(schedule, 9)).tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_only_equal_schedules_mean_the_same():
    for one, other in itertools.product(SCHEDULES, repeat=2):
        assert timesteps.same_levels(built(one), built(other)) == (one == other)


def test_what_is_predicted_and_where_one_samples_changes_no_noise_level():
    assert timesteps.same_levels(built("linear"), built("linear", prediction="v", weighting="min_snr"))
    assert timesteps.same_levels(built("linear"), built("linear", learned_variance=True))
    assert timesteps.same_levels(built("flow"), built("flow", shift=3.0, timestep_draw="logit_normal"))
