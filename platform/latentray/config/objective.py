"""Group `objective`: schedule x prediction x weighting x timestep draw."""

from __future__ import annotations

import dataclasses
import math

from latentray.errors import ConfigError

SCHEDULES = ("linear", "scaled_linear", "cosine", "flow", "ve", "unnoised")
PREDICTIONS = ("epsilon", "v", "x0", "flow", "edm")
WEIGHTINGS = ("none", "min_snr", "soft_min_snr")
TIMESTEP_DRAWS = ("uniform", "logit_normal", "mode", "log_normal")
TIMESTEP_SPREADS = ("none", "stratified", "sobol")
_DISCRETE = ("linear", "scaled_linear", "cosine")
_PREDICTIONS_OF = {"flow": ("flow",), "ve": ("edm", "epsilon", "x0"), "unnoised": ("x0",)}
_DRAWS_OF = {"flow": ("uniform", "logit_normal", "mode"), "ve": ("uniform", "log_normal")}


@dataclasses.dataclass(kw_only=True)
class ObjectiveConfig:
    """What the denoiser learns."""

    schedule: str = "scaled_linear"
    """linear, scaled_linear or cosine (discrete, variance-preserving), flow (rectified flow), ve (variance-exploding), or
    unnoised: regression, as a baseline; the network sees zeros and the conditions alone."""
    zero_terminal_snr: bool = False
    """Rescale a discrete schedule to end in pure noise (Lin et al. 2024); goes with prediction v or x0."""
    prediction: str = "epsilon"
    """What the network's output is: epsilon, v or x0 for the discrete schedules; flow for flow; edm, epsilon or x0 for ve; x0
    for unnoised."""
    timesteps: int = 1000
    """T of the discrete schedules; the range of t for flow."""
    weighting: str = "none"
    """none; min_snr (Hang et al. 2023) or soft_min_snr (Crowson et al. 2024) for the discrete schedules."""
    min_snr_gamma: float = 5.0
    """gamma of min_snr and soft_min_snr."""
    timestep_draw: str = "uniform"
    """uniform; logit_normal or mode (Esser et al. 2024) for flow; log_normal (Karras et al. 2022) for ve."""
    draw_mean: float = 0.0
    """Mean of the normal under logit_normal and log_normal (EDM: -1.2)."""
    draw_std: float = 1.0
    """Its standard deviation (EDM: 1.2)."""
    mode_scale: float = 1.29
    """s of the mode draw (Esser et al. 2024, equation 20), in [-1, 2/(pi - 2)]."""
    timestep_spread: str = "none"
    """none: each sample draws alone; stratified or sobol: the draws of a global batch are spread evenly over [0, 1)."""
    shift: float = 1.0
    """Timestep shift of rectified flow for resolution (Esser et al. 2024, equation 23); 1 for none."""
    sigma_min: float = 0.002
    """Smallest noise of ve."""
    sigma_max: float = 80.0
    """Largest noise of ve."""
    sigma_data: float = 1.0
    """Standard deviation of the data for ve: 1 for normalised latents."""
    offset_noise: float = 0.0
    """Standard deviation of a constant added to each channel's noise (Guttenberg 2023); 0 for none."""
    learned_variance: bool = False
    """The network says how wide each step's noise is besides, in as many channels again (Nichol & Dhariwal 2021); sampler ddpm
    uses it."""
    variance_weight: float = 0.001
    """Weight of the variational bound that learns it."""

    def __post_init__(self) -> None:
        for field, known in (
            ("schedule", SCHEDULES),
            ("prediction", PREDICTIONS),
            ("weighting", WEIGHTINGS),
            ("timestep_draw", TIMESTEP_DRAWS),
            ("timestep_spread", TIMESTEP_SPREADS),
        ):
            if getattr(self, field) not in known:
                raise ConfigError(
                    f"There is no {field} {getattr(self, field)!r}.",
                    where=f"objective.{field}",
                    mend=f"Known: {', '.join(known)}.",
                )
        discrete = self.schedule in _DISCRETE
        fitting = _PREDICTIONS_OF.get(self.schedule, ("epsilon", "v", "x0"))
        if self.prediction not in fitting:
            raise ConfigError(
                f"Prediction {self.prediction!r} does not fit schedule {self.schedule!r}.",
                where="objective.prediction",
                mend=f"With it goes prediction={' or '.join(fitting)}.",
            )
        draws = _DRAWS_OF.get(self.schedule, ("uniform",))
        if self.timestep_draw not in draws:
            raise ConfigError(
                f"{self.timestep_draw} draws are not for schedule {self.schedule!r}.",
                where="objective.timestep_draw",
                mend=f"Set timestep_draw={' or '.join(draws)}.",
            )
        if self.weighting != "none" and not discrete:
            raise ConfigError(
                f"{self.weighting} weighting is not defined for "
                + {"flow": "rectified flow.", "ve": "the variance-exploding schedule."}.get(
                    self.schedule, "regression."
                ),
                where="objective.weighting",
                mend="Set weighting=none.",
            )
        if self.zero_terminal_snr and (not discrete or self.prediction == "epsilon"):
            raise ConfigError(
                "Zero terminal SNR is for discrete schedules without noise prediction: pure noise says nothing of x_0.",
                where="objective.zero_terminal_snr",
                mend="Set prediction=v or x0, or zero_terminal_snr=false.",
            )
        if self.learned_variance and (not discrete or self.zero_terminal_snr or self.variance_weight <= 0):
            raise ConfigError(
                "A variance is learned on discrete schedules that do not end in pure noise, with a weight above 0.",
                where="objective.learned_variance",
                mend="Set it to false, or schedule=linear, say.",
            )
        if not -1 <= self.mode_scale <= 2 / (math.pi - 2):
            raise ConfigError(
                f"mode_scale is {self.mode_scale}.", where="objective.mode_scale", mend="Choose -1 to 1.75."
            )
        if not 0 < self.sigma_min < self.sigma_max or self.sigma_data <= 0:
            raise ConfigError(
                "0 < sigma_min < sigma_max and sigma_data > 0 are wanted.", where="objective.sigma_min", mend="Mend it."
            )
        if (
            self.timesteps < 2
            or self.shift <= 0
            or self.min_snr_gamma <= 0
            or self.draw_std <= 0
            or self.offset_noise < 0
        ):
            raise ConfigError(
                "timesteps >= 2, shift, min_snr_gamma and draw_std > 0, offset_noise >= 0 are wanted.",
                where="objective",
                mend="Raise it.",
            )
