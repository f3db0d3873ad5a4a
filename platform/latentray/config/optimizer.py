"""Group `optimizer`: which optimizer, and its learning-rate schedule, in samples."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

from latentray.errors import ConfigError

OPTIMIZERS = ("adamw", "adafactor", "muon")
ALLOWED_STAGES = {"adamw": (0, 1, 2, 3), "adafactor": (0,), "muon": (0, 1, 2)}
"""ZeRO stages that keep an optimizer's meaning. Adafactor's factors are of whole matrices, and ZeRO cuts flat ones."""

FALLING: dict[str, Callable[[float], float]] = {
    "constant": lambda into: 1.0,
    "linear": lambda into: 1.0 - into,
    "cosine": lambda into: 0.5 + 0.5 * math.cos(math.pi * into),
    "sqrt": lambda into: 1.0 - math.sqrt(into),
}
"""Decay -> share of what lies between the peak and the end that is left, after a share `into` of the decay."""
DECAYS = tuple(FALLING)


@dataclasses.dataclass(kw_only=True)
class OptimizerConfig:
    """An optimizer with warm-up and decay on the clock of samples.

    Warm-up, stable, decay (Hu et al. 2024, MiniCPM) is `warmup_samples`, then `decay` linear or sqrt over the last
    `decay_samples` of the run (or from `decay_from` of it on): the learning rate stays at its peak between the two, so a
    longer run can begin from any checkpoint of that stretch.
    """

    name: str = "adamw"
    """adamw, adafactor (factored moments: little memory; ZeRO stage 0) or muon (hidden matrices by orthogonalised momentum,
    the rest by AdamW; ZeRO stages 0 to 2)."""
    lr: float = 1e-4
    """Peak learning rate; with muon that of what AdamW trains."""
    betas: list[float] = dataclasses.field(default_factory=lambda: [0.9, 0.999])
    """AdamW: decay of the first and the second moment."""
    eps: float = 1e-8
    weight_decay: float = 0.01
    muon_lr: float = 0.02
    """Muon: peak learning rate of the hidden matrices, in units of the spectral norm; it follows the same schedule."""
    muon_momentum: float = 0.95
    clip: float = 1.0
    """Gradients are clipped to this norm; 0 turns it off, as muon needs it."""
    warmup_samples: int = 0
    """The learning rate rises linearly from 0 over so many samples."""
    decay: str = "constant"
    """constant, linear, cosine or sqrt (1 - sqrt, Hägele et al. 2024); the decays reach `final_fraction` at the run's end."""
    decay_from: float = 0.0
    """Share of the run after which the decay begins."""
    decay_samples: int | None = None
    """The decay takes the last so many samples of the run, in place of `decay_from`."""
    final_fraction: float = 0.0
    """Share of the peak learning rate at the end."""

    def __post_init__(self) -> None:
        if self.name not in OPTIMIZERS:
            raise ConfigError(
                f"There is no optimizer {self.name!r}.", where="optimizer.name", mend=f"Known: {', '.join(OPTIMIZERS)}."
            )
        if min(self.lr, self.muon_lr) <= 0 or min(self.clip, self.warmup_samples, self.weight_decay) < 0:
            raise ConfigError(
                "lr, muon_lr > 0 and clip, warmup_samples, weight_decay >= 0 are wanted.",
                where="optimizer",
                mend="Raise it.",
            )
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(
                f"The decays {self.betas} are not below 1.", where="optimizer.betas", mend="Choose from 0 to below 1."
            )
        if self.eps < 0:
            raise ConfigError("It is negative.", where="optimizer.eps", mend="Choose 0 or more.")
        if self.decay not in DECAYS:
            raise ConfigError(
                f"There is no decay {self.decay!r}.", where="optimizer.decay", mend=f"Known: {', '.join(DECAYS)}."
            )
        if len(self.betas) != 2 or not 0 <= self.decay_from <= 1 or not 0 <= self.muon_momentum < 1:
            raise ConfigError(
                "betas are two numbers, decay_from lies in 0 ... 1, muon_momentum below 1.",
                where="optimizer",
                mend="Correct it.",
            )
        if self.decay_samples is not None and (self.decay_samples < 1 or self.decay_from):
            raise ConfigError(
                "The decay begins at decay_from, or takes the last decay_samples (at least 1) of the run.",
                where="optimizer.decay_samples",
                mend="Give one of the two.",
            )
        if self.name == "muon" and self.clip:
            raise ConfigError(
                "DeepSpeed clips what Muon has made of the gradients, whose norm is that of its matrices' ranks.",
                where="optimizer.clip",
                mend="Set optimizer.clip=0 with muon.",
            )

    def require_stage(self, stage: int, *, offloaded: bool = False) -> None:
        """Raise ConfigError where the optimizer does not mean the same at this ZeRO stage."""
        allowed = ALLOWED_STAGES[self.name]
        if stage not in allowed:
            raise ConfigError(
                f"{self.name} works on whole matrices; ZeRO stage {stage} has none of them for it.",
                where="deepspeed.zero_stage",
                mend=f"Use stage {' or '.join(map(str, allowed))} with optimizer.name={self.name}, or "
                "optimizer.name=adamw.",
            )
        if offloaded and self.name != "adamw":
            raise ConfigError(
                f"{self.name} is not offloaded.",
                where="deepspeed.offload_optimizer",
                mend="Set deepspeed.offload_optimizer=none, or optimizer.name=adamw.",
            )

    def lr_at(self, samples: int, total: int) -> float:
        """Learning rate after `samples` of `total`: a pure function, so a resumed run continues it exactly."""
        warm = min(1.0, samples / self.warmup_samples) if self.warmup_samples else 1.0
        done, begin = samples / max(total, 1), self.decay_from
        if self.decay_samples is not None:
            begin = max(1 - self.decay_samples / max(total, 1), 0.0)
        into = 0.0 if done <= begin else min((done - begin) / max(1 - begin, 1e-9), 1.0)
        return self.lr * warm * (self.final_fraction + (1 - self.final_fraction) * FALLING[self.decay](into))
