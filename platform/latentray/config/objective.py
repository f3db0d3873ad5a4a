"""Group `objective`: schedule x prediction x weighting x timestep draw."""

from __future__ import annotations

import dataclasses

from latentray.errors import ConfigError

SCHEDULES = ("linear", "scaled_linear", "cosine", "flow")
PREDICTIONS = ("epsilon", "v", "x0", "flow")
WEIGHTINGS = ("none", "min_snr")
TIMESTEP_DRAWS = ("uniform", "logit_normal")


@dataclasses.dataclass(kw_only=True)
class ObjectiveConfig:
    """What the denoiser learns."""

    schedule: str = "scaled_linear"
    """linear, scaled_linear or cosine (discrete, variance-preserving), or flow (rectified flow)."""
    prediction: str = "epsilon"
    """What the network's output is: epsilon, v or x0 for the discrete schedules; flow for rectified flow."""
    timesteps: int = 1000
    """T of the discrete schedules; the range of t for flow."""
    weighting: str = "none"
    """none, or min_snr (Hang et al. 2023) for the discrete schedules."""
    min_snr_gamma: float = 5.0
    """gamma of min_snr."""
    timestep_draw: str = "uniform"
    """uniform, or logit_normal (Esser et al. 2024) for flow."""
    shift: float = 1.0
    """Timestep shift of rectified flow for resolution (Esser et al. 2024, equation 23); 1 for none."""

    def __post_init__(self) -> None:
        for field, known in (
            ("schedule", SCHEDULES),
            ("prediction", PREDICTIONS),
            ("weighting", WEIGHTINGS),
            ("timestep_draw", TIMESTEP_DRAWS),
        ):
            if getattr(self, field) not in known:
                raise ConfigError(
                    f"There is no {field} {getattr(self, field)!r}.",
                    where=f"objective.{field}",
                    mend=f"Known: {', '.join(known)}.",
                )
        if (self.schedule == "flow") != (self.prediction == "flow"):
            raise ConfigError(
                f"Prediction {self.prediction!r} does not fit schedule {self.schedule!r}.",
                where="objective.prediction",
                mend="The flow schedule goes with prediction=flow; the discrete ones with epsilon, v or x0.",
            )
        if self.schedule == "flow" and self.weighting != "none":
            raise ConfigError(
                "min_snr weighting is not defined for rectified flow.",
                where="objective.weighting",
                mend="Set weighting=none.",
            )
        if self.schedule != "flow" and self.timestep_draw != "uniform":
            raise ConfigError(
                "logit_normal draws are for rectified flow.",
                where="objective.timestep_draw",
                mend="Set timestep_draw=uniform.",
            )
        if self.timesteps < 2 or self.shift <= 0 or self.min_snr_gamma <= 0:
            raise ConfigError(
                "timesteps >= 2, shift > 0 and min_snr_gamma > 0 are wanted.", where="objective", mend="Raise it."
            )
