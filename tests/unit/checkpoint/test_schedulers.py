"""Scheduler configurations both ways: what was published, what diffusers builds of ours, and what is refused by name."""

import math

import pytest
import torch

from latentray.checkpoint import schedulers
from latentray.config.objective import ObjectiveConfig
from latentray.diffusion import samplers, schedules
from latentray.errors import ConfigError
from latentray.models import torchvision_ops

torchvision_ops.ensure_importable()
import diffusers  # noqa: E402  (it imports torchvision)

SCALED = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
SD15 = SCALED | {
    "_class_name": "PNDMScheduler", "_diffusers_version": "0.6.0", "set_alpha_to_one": False, "skip_prk_steps": True,
    "steps_offset": 1, "trained_betas": None, "clip_sample": False,
}  # fmt: skip
SD21 = SCALED | {
    "_class_name": "DDIMScheduler", "_diffusers_version": "0.8.0", "clip_sample": False, "set_alpha_to_one": False,
    "prediction_type": "v_prediction", "skip_prk_steps": True, "steps_offset": 1, "trained_betas": None,
}  # fmt: skip
SDXL = SCALED | {
    "_class_name": "EulerDiscreteScheduler", "_diffusers_version": "0.19.0.dev0", "clip_sample": False,
    "interpolation_type": "linear", "prediction_type": "epsilon", "sample_max_value": 1.0, "set_alpha_to_one": False,
    "skip_prk_steps": True, "steps_offset": 1, "timestep_spacing": "leading", "trained_betas": None,
    "use_karras_sigmas": False,
}  # fmt: skip
SD3 = {
    "_class_name": "FlowMatchEulerDiscreteScheduler", "_diffusers_version": "0.29.0.dev0", "num_train_timesteps": 1000,
    "shift": 3.0,
}  # fmt: skip
OBJECTIVES = {
    "epsilon": ObjectiveConfig(),
    "v": ObjectiveConfig(prediction="v"),
    "x0": ObjectiveConfig(prediction="x0", schedule="linear"),
    "cosine": ObjectiveConfig(prediction="v", schedule="cosine"),
    "zero_snr": ObjectiveConfig(prediction="v", zero_terminal_snr=True),
    "short": ObjectiveConfig(timesteps=250, schedule="linear"),
    "flow": ObjectiveConfig(schedule="flow", prediction="flow", shift=3.0, timestep_draw="logit_normal"),
}
DISCRETE = ("ddpm", "ddim", "euler", "euler_ancestral", "heun", "dpmpp_2m", "dpmpp_2m_sde", "unipc")
PAIRS = [
    (name, one) for name in OBJECTIVES if name != "flow" for one in DISCRETE if (name, one) != ("zero_snr", "heun")
]
PAIRS += [("flow", one) for one in ("flow_euler", "flow_heun", "dpmpp_2m", "unipc")]


@pytest.mark.parametrize(
    ("described", "objective", "sampler", "stands_in_for"),
    [
        (SD15, ObjectiveConfig(), "dpmpp_2m", "PNDMScheduler"),
        (SD21, ObjectiveConfig(prediction="v"), "ddim", ""),
        (SDXL, ObjectiveConfig(), "euler", ""),
        (SD3, OBJECTIVES["flow"], "flow_euler", ""),
    ],
    ids=["sd15", "sd21", "sdxl", "sd3"],
)
def test_published_schedulers_are_understood(described, objective, sampler, stands_in_for):
    found, solver = schedulers.from_diffusers(described)
    assert found == objective
    assert (solver.sampler, solver.stands_in_for, solver.bound) == (sampler, stands_in_for, "identity")
    assert solver.sampler in samplers.names(schedules.build(found))


@pytest.mark.parametrize(("name", "sampler"), PAIRS)
def test_both_ways_say_the_same(name, sampler):
    described = schedulers.to_diffusers(OBJECTIVES[name], sampler)
    objective, solver = schedulers.from_diffusers(described)
    assert objective == OBJECTIVES[name]
    assert solver.sampler == sampler
    assert not solver.stands_in_for
    theirs = getattr(diffusers, described["_class_name"]).from_config(described)
    assert set(described) - {"_class_name"} <= set(theirs.config)  # diffusers drops what it does not know
    if name != "flow":
        wanted = schedules.build(OBJECTIVES[name]).alphas_cumprod
        found = theirs.alphas_cumprod.double()
        assert torch.allclose(found[:-1], wanted[:-1], rtol=2e-4)
        assert float(found[-1]) == pytest.approx(float(wanted[-1]), rel=2e-4, abs=1e-6)


def network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return torch.sin(1.3 * x + 0.002 * t.view(-1, 1, 1, 1)) + 0.1 * x


ILL_CONDITIONED = [("cosine", "euler"), ("cosine", "heun")]
"""A sigma of 2e4 leaves float32 nothing to agree on: tests/numerics compares these in float64."""
DETERMINISTIC = [
    pair
    for pair in PAIRS
    if pair[0] != "flow" and pair[1] in ("ddim", "euler", "heun", "dpmpp_2m", "unipc") and pair not in ILL_CONDITIONED
]


@pytest.mark.parametrize(("name", "sampler"), DETERMINISTIC)
def test_the_scheduler_walks_as_our_sampler_does(name, sampler):
    objective, steps = OBJECTIVES[name], 20
    described = schedulers.to_diffusers(objective, sampler)
    scheduler = getattr(diffusers, described["_class_name"]).from_config(described)
    scheduler.set_timesteps(steps)
    noise = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(3))
    start = float(scheduler.init_noise_sigma)
    x = noise * (1.0 if start == 1 else math.hypot(start, 1))  # of variance 1 + sigma^2, not sigma^2
    for t in scheduler.timesteps:
        seen = scheduler.scale_model_input(x, t)
        x = scheduler.step(network(seen, t.view(1).float()), t, x).prev_sample
    ours = samplers.sample(network, noise, schedules.build(objective), sampler, steps, prediction=objective.prediction)
    assert float((x - ours).abs().max() / ours.abs().max()) < 2e-3


@pytest.mark.parametrize(
    ("described", "changes", "where"),
    [
        (SD15, {"_class_name": "LCMScheduler"}, "_class_name"),
        (SD15, {"_class_name": "EDMEulerScheduler"}, "_class_name"),
        (SD15, {"_class_name": None}, "_class_name"),
        (SD15, {"beta_end": 0.02}, "beta_end"),
        (SD15, {"beta_schedule": "sigmoid"}, "beta_schedule"),
        (SD15, {"trained_betas": [0.1, 0.2]}, "trained_betas"),
        (SD15, {"prediction_type": "score"}, "prediction_type"),
        (SDXL, {"rescale_betas_zero_snr": True}, "objective.zero_terminal_snr"),
        (SDXL, {"timestep_type": "continuous"}, "timestep_type"),
        (SDXL, {"_class_name": "DDPMScheduler", "variance_type": "learned_range"}, "variance_type"),
        (SDXL, {"warped": True}, "warped"),
        (SD3, {"use_dynamic_shifting": True}, "use_dynamic_shifting"),
        (SD3, {"invert_sigmas": True}, "invert_sigmas"),
    ],
)
def test_what_a_network_here_cannot_have_learnt_is_refused_by_its_setting(described, changes, where):
    with pytest.raises(ConfigError) as caught:
        schedulers.from_diffusers(described | changes)
    assert caught.value.where == where
    assert caught.value.mend


def test_a_switch_that_is_off_is_no_reason_to_refuse():
    found, _ = schedulers.from_diffusers(SDXL | {"of_tomorrow": False, "another": None})
    assert found == ObjectiveConfig()


def test_karras_levels_thresholds_and_clamps_are_said_as_a_request_says_them():
    multistep = SCALED | {"_class_name": "DPMSolverMultistepScheduler", "use_karras_sigmas": True, "thresholding": True}
    _, solver = schedulers.from_diffusers(multistep)
    assert (solver.sampler, solver.spacing, solver.bound) == ("dpmpp_2m", "karras", "threshold")
    _, solver = schedulers.from_diffusers(SCALED | {"_class_name": "DDIMScheduler", "clip_sample": True})
    assert solver.bound == "clamp"


@pytest.mark.parametrize(
    ("objective", "sampler", "where"),
    [
        (ObjectiveConfig(schedule="ve", prediction="edm"), "euler", "objective.schedule"),
        (ObjectiveConfig(schedule="unnoised", prediction="x0"), "ddim", "objective.schedule"),
        (ObjectiveConfig(learned_variance=True), "ddpm", "objective.learned_variance"),
        (ObjectiveConfig(), "dpmpp_3m", "sampler"),
        (ObjectiveConfig(), "flow_euler", "sampler"),
        (OBJECTIVES["zero_snr"], "heun", "sampler"),
        (OBJECTIVES["flow"], "euler", "sampler"),
        (OBJECTIVES["flow"], "dpmpp_2m_sde", "sampler"),
    ],
)
def test_what_diffusers_has_no_scheduler_for_is_refused(objective, sampler, where):
    with pytest.raises(ConfigError) as caught:
        schedulers.to_diffusers(objective, sampler)
    assert caught.value.where == where
