"""diffusers' scheduler_config.json, and what it says here: an objective, and a sampler to begin with.

A scheduler mixes two things. What the network was trained on (betas, prediction, rectified flow's shift) must be said here
exactly, or is refused. How the noise is walked back is a choice at sampling: a solver that is none of ours gets a stand-in
for the same differential equation.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from latentray.config.bounds import CLAMP, IDENTITY, THRESHOLD
from latentray.config.objective import ObjectiveConfig
from latentray.errors import ConfigError

Described = dict[str, Any]
"""What stands in scheduler_config.json."""

_PREDICTIONS = {"epsilon": "epsilon", "v": "v_prediction", "x0": "sample", "flow": "flow_prediction"}
_BETAS = {"linear": (1e-4, 0.02), "scaled_linear": (0.00085, 0.012)}
"""First and last beta at T = 1000; they grow as T shrinks."""
_SCHEDULES = {"linear": "linear", "scaled_linear": "scaled_linear", "cosine": "squaredcos_cap_v2"}

_SAMPLERS = {
    "DDPMScheduler": "ddpm", "DDIMScheduler": "ddim", "EulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler_ancestral", "HeunDiscreteScheduler": "heun",
    "DPMSolverMultistepScheduler": "dpmpp_2m", "UniPCMultistepScheduler": "unipc",
    "FlowMatchEulerDiscreteScheduler": "flow_euler", "FlowMatchHeunDiscreteScheduler": "flow_heun",
}  # fmt: skip
_STAND_INS = {
    "PNDMScheduler": "dpmpp_2m", "LMSDiscreteScheduler": "dpmpp_2m", "DEISMultistepScheduler": "dpmpp_2m",
    "DPMSolverSinglestepScheduler": "dpmpp_2m", "KDPM2DiscreteScheduler": "dpmpp_2m",
    "KDPM2AncestralDiscreteScheduler": "euler_ancestral",
}  # fmt: skip
"""Solvers that are none of ours -> the one that takes their place."""
_FLOW_ONLY = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")

_MULTISTEP, _UNIPC = "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"
_TO_CLEAN = {"final_sigmas_type": "zero", "lower_order_final": True}
_EXPORTED: dict[str, tuple[str, Described]] = {
    "ddpm": ("DDPMScheduler", {"clip_sample": False, "variance_type": "fixed_small"}),
    # Not DDIMScheduler: that steps to t - T // N, which is another level than the next where N does not divide T.
    "ddim": (_MULTISTEP, {"solver_order": 1, "algorithm_type": "dpmsolver++", **_TO_CLEAN}),
    "euler": ("EulerDiscreteScheduler", {"interpolation_type": "linear", "final_sigmas_type": "zero"}),
    "euler_ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "dpmpp_2m": (
        _MULTISTEP, {"solver_order": 2, "algorithm_type": "dpmsolver++", "solver_type": "midpoint", **_TO_CLEAN}
    ),
    "dpmpp_2m_sde": (
        _MULTISTEP, {"solver_order": 2, "algorithm_type": "sde-dpmsolver++", "solver_type": "midpoint", **_TO_CLEAN}
    ),
    "unipc": (_UNIPC, {"solver_order": 2, "solver_type": "bh2", "predict_x0": True, **_TO_CLEAN}),
    "flow_euler": ("FlowMatchEulerDiscreteScheduler", {}),
    "flow_heun": ("FlowMatchHeunDiscreteScheduler", {}),
}  # fmt: skip

_STEPPING = (
    "algorithm_type", "base_image_seq_len", "base_shift", "clip_sample", "clip_sample_range", "disable_corrector",
    "dynamic_thresholding_ratio", "euler_at_final", "final_sigmas_type", "interpolation_type", "lambda_min_clipped",
    "lower_order_final", "max_image_seq_len", "max_shift", "predict_x0", "sample_max_value", "set_alpha_to_one",
    "shift_terminal", "sigma_max", "sigma_min", "skip_prk_steps", "solver_order", "solver_p", "solver_type",
    "steps_offset", "stochastic_sampling", "thresholding", "time_shift_type", "timestep_spacing",
    "use_beta_sigmas", "use_exponential_sigmas", "use_karras_sigmas", "use_lu_lambdas",
)  # fmt: skip
"""Settings that choose how to walk, not what the network learnt."""
_LEARNT = (
    "beta_end", "beta_schedule", "beta_start", "flow_shift", "num_train_timesteps", "prediction_type",
    "rescale_betas_zero_snr", "shift", "use_flow_sigmas",
)  # fmt: skip
_FIXED: dict[str, tuple[Any, ...]] = {
    "trained_betas": (None,),
    "variance_type": (None, "fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"),
    "use_dynamic_shifting": (False, None),
    "invert_sigmas": (False, None),
    "timestep_type": ("discrete", None),
}
"""Settings with the values that go with networks built here."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Solver:
    """How a scheduler walks, in the words of a sampling request."""

    sampler: str
    spacing: str | None = None
    """None for the schedule's default."""
    order: int = 2
    bound: str = IDENTITY
    stands_in_for: str = ""
    """The class of the scheduler that is none of ours."""


def from_diffusers(described: Mapping[str, Any]) -> tuple[ObjectiveConfig, Solver]:
    """Read a scheduler_config.json.

    Raises ConfigError, naming the setting, for a scheduler of another kind (consistency, EDM), betas that no schedule here
    has, learnt variances, timestep shifts that depend on the picture's size, and settings that are not known.
    """
    name = str(described.get("_class_name", "")).removeprefix("Flax")
    if name not in _SAMPLERS and name not in _STAND_INS:
        raise ConfigError(
            f"{name or 'A scheduler without _class_name'} cannot be said here.",
            where="_class_name",
            mend=f"Replace it with one of {', '.join(sorted((*_SAMPLERS, *_STAND_INS)))}, if the network fits it.",
        )
    given = {key: value for key, value in described.items() if not key.startswith("_")}
    for field, value in given.items():
        if field in _FIXED and value not in _FIXED[field]:
            raise _unsayable(field, value, f"it is {' or '.join(map(str, _FIXED[field]))} here")
        if field not in (*_STEPPING, *_LEARNT, *_FIXED) and value:
            raise _unsayable(field, value, "the setting is not known here")
    if name in _FLOW_ONLY or given.get("use_flow_sigmas"):
        shift = float(given.get("shift" if name in _FLOW_ONLY else "flow_shift", 1.0))
        objective = ObjectiveConfig(
            schedule="flow",
            prediction="flow",
            timesteps=given.get("num_train_timesteps", 1000),
            shift=shift,
            timestep_draw="logit_normal",
        )
    else:
        objective = _discrete(given, heun=name == "HeunDiscreteScheduler" or name.startswith("KDPM2"))
    return objective, _solver(name, given, flow=objective.schedule == "flow")


def to_diffusers(objective: ObjectiveConfig, sampler: str) -> Described:
    """A scheduler_config.json that walks as `sampler` does over its default noise levels.

    Where diffusers' own way of naming levels leaves a difference: its Euler schedulers start at sigma_max times the noise,
    a unit of variance 1 + sigma_max^2 and not 1; its FlowMatch ones end at 1/T, shifted, as spacing=sd3 does here.
    Raises ConfigError for an objective or a sampler that diffusers has no scheduler for.
    """
    if objective.schedule not in (*_SCHEDULES, "flow"):
        raise ConfigError(
            f"diffusers has no scheduler for schedule {objective.schedule!r} as it is trained here.",
            where="objective.schedule",
            mend=f"It has them for {', '.join((*_SCHEDULES, 'flow'))}.",
        )
    if objective.learned_variance:
        raise ConfigError(
            "diffusers' pipelines draw with no learned variance.",
            where="objective.learned_variance",
            mend="Only a model without it can be handed out.",
        )
    if sampler not in _EXPORTED:
        raise ConfigError(
            f"diffusers has no scheduler that walks as {sampler!r} does.",
            where="sampler",
            mend=f"Choose one of {', '.join(_EXPORTED)}.",
        )
    name, settings = _EXPORTED[sampler]
    found: Described = {"_class_name": name, "num_train_timesteps": objective.timesteps}
    if objective.schedule == "flow":
        return found | _of_flow(name, settings, objective)
    if name in _FLOW_ONLY:
        raise ConfigError(
            f"{sampler!r} is for rectified flow.", where="sampler", mend="Choose dpmpp_2m, say, for this schedule."
        )
    if objective.zero_terminal_snr and name == "HeunDiscreteScheduler":
        raise ConfigError(
            "diffusers' Heun scheduler cannot end in zero SNR.", where="sampler", mend="Choose dpmpp_2m, say."
        )
    found |= {"beta_schedule": _SCHEDULES[objective.schedule], "trained_betas": None}
    if objective.schedule in _BETAS:
        first, last = _betas(objective.schedule, objective.timesteps)
        found |= {"beta_start": first, "beta_end": last}
    if objective.zero_terminal_snr:
        found["rescale_betas_zero_snr"] = True
    found |= {"prediction_type": _PREDICTIONS[objective.prediction], "timestep_spacing": "trailing"}
    return (
        found | {"steps_offset": 1} | settings
    )  # diffusers' pipelines complain of another offset, whatever the spacing


def _of_flow(name: str, settings: Mapping[str, Any], objective: ObjectiveConfig) -> Described:
    if name in _FLOW_ONLY:
        return {"shift": objective.shift, **settings}
    if name not in (_MULTISTEP, _UNIPC) or str(settings.get("algorithm_type", "")).startswith("sde"):
        raise ConfigError(
            f"{name} is not for rectified flow.", where="sampler", mend="Choose flow_euler, flow_heun or dpmpp_2m."
        )
    prediction = _PREDICTIONS[objective.prediction]
    return {"use_flow_sigmas": True, "flow_shift": objective.shift, "prediction_type": prediction, **settings}


def _discrete(given: Mapping[str, Any], *, heun: bool) -> ObjectiveConfig:
    predictions = {theirs: ours for ours, theirs in _PREDICTIONS.items() if ours != "flow"}
    told = given.get("prediction_type") or "epsilon"
    if told not in predictions:
        raise _unsayable("prediction_type", told, f"known here are {', '.join(predictions)}")
    schedules = {theirs: ours for ours, theirs in _SCHEDULES.items()}
    kind, steps = given.get("beta_schedule", "linear"), given.get("num_train_timesteps", 1000)
    if kind not in schedules:
        raise _unsayable("beta_schedule", kind, f"known here are {', '.join(schedules)}")
    schedule = schedules[kind]
    if schedule in _BETAS:
        defaults = _BETAS["scaled_linear"] if heun else _BETAS["linear"]
        for field, default, wanted in zip(("beta_start", "beta_end"), defaults, _betas(schedule, steps), strict=True):
            if not math.isclose(given.get(field, default), wanted, rel_tol=1e-6):
                raise _unsayable(field, given.get(field, default), f"schedule {schedule!r} has {wanted:g}")
    return ObjectiveConfig(
        schedule=schedule,
        prediction=predictions[told],
        timesteps=steps,
        zero_terminal_snr=bool(given.get("rescale_betas_zero_snr", False)),
    )


def _solver(name: str, given: Mapping[str, Any], *, flow: bool) -> Solver:
    sampler, order = _SAMPLERS.get(name) or _STAND_INS[name], 2
    if name == _MULTISTEP:
        sampler = _multistep(given, flow=flow)
    if name == _UNIPC:
        order = given.get("solver_order", 2)
    spacing = "karras" if given.get("use_karras_sigmas") else given.get("timestep_spacing")
    bound = THRESHOLD if given.get("thresholding") else CLAMP if given.get("clip_sample") else IDENTITY
    return Solver(
        sampler=sampler,
        spacing="sd3" if flow and name in _FLOW_ONLY else None if flow or spacing == "trailing" else spacing,
        order=order if order in (1, 2, 3) else 2,
        bound=bound,
        stands_in_for=name if name in _STAND_INS else "",
    )


def _multistep(given: Mapping[str, Any], *, flow: bool) -> str:
    if str(given.get("algorithm_type", "dpmsolver++")).startswith("sde") and not flow:
        return "dpmpp_2m_sde"
    order = given.get("solver_order", 2)
    if order == 1:
        return "flow_euler" if flow else "ddim"
    return "dpmpp_3m" if order == 3 and not flow else "dpmpp_2m"


def _betas(schedule: str, timesteps: int) -> tuple[float, float]:
    first, last = _BETAS[schedule]
    return 1000 / timesteps * first, 1000 / timesteps * last


def _unsayable(field: str, value: Any, why: str) -> ConfigError:
    return ConfigError(
        f"The scheduler's {field} is {value!r}: {why}.",
        where=field,
        mend="Change it in scheduler_config.json if the network was not trained on it, or train on with another model.",
    )
