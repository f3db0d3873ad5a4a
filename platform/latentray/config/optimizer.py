"""Group `optimizer`: AdamW and its learning-rate schedule, in samples."""

from __future__ import annotations

import dataclasses
import math

from latentray.errors import ConfigError

DECAYS = ("constant", "cosine", "linear")


@dataclasses.dataclass(kw_only=True)
class OptimizerConfig:
    """AdamW (Loshchilov & Hutter 2019) with warm-up and decay on the clock of samples."""

    lr: float = 1e-4
    """Peak learning rate."""
    betas: list[float] = dataclasses.field(default_factory=lambda: [0.9, 0.999])
    eps: float = 1e-8
    weight_decay: float = 0.01
    clip: float = 1.0
    """Gradients are clipped to this norm; 0 turns it off."""
    warmup_samples: int = 0
    """The learning rate rises linearly from 0 over so many samples."""
    decay: str = "constant"
    """constant, cosine or linear; the decays reach `final_fraction` at the run's end."""
    decay_from: float = 0.0
    """Share of the run after which the decay begins."""
    final_fraction: float = 0.0
    """Share of the peak learning rate at the end."""

    def __post_init__(self) -> None:
        if self.lr <= 0 or self.clip < 0 or self.warmup_samples < 0 or self.weight_decay < 0:
            raise ConfigError(
                "lr > 0 and clip, warmup_samples, weight_decay >= 0 are wanted.", where="optimizer", mend="Raise it."
            )
        if self.decay not in DECAYS:
            raise ConfigError(
                f"There is no decay {self.decay!r}.", where="optimizer.decay", mend=f"Known: {', '.join(DECAYS)}."
            )
        if len(self.betas) != 2 or not 0 <= self.decay_from <= 1:
            raise ConfigError(
                "betas are two numbers, decay_from lies in 0 ... 1.", where="optimizer", mend="Correct it."
            )

    def lr_at(self, samples: int, total: int) -> float:
        """Learning rate after `samples` of `total`: a pure function, so a resumed run continues it exactly."""
        warm = min(1.0, samples / self.warmup_samples) if self.warmup_samples else 1.0
        done = samples / max(total, 1)
        into = 0.0 if done <= self.decay_from else min((done - self.decay_from) / max(1 - self.decay_from, 1e-9), 1.0)
        falling = {"constant": 1.0, "cosine": 0.5 + 0.5 * math.cos(math.pi * into), "linear": 1 - into}[self.decay]
        return self.lr * warm * (self.final_fraction + (1 - self.final_fraction) * falling)
