"""What a policy reads of its episodes, and how it acts."""

from __future__ import annotations

import dataclasses

from latentray.errors import ConfigError


@dataclasses.dataclass(kw_only=True)
class PolicyConfig:
    """What belongs to denoisers of the family policy alone."""

    observations: list[str] = dataclasses.field(default_factory=list)
    """Names of the vectors that the policy is told, side by side in this order; empty for all, by name."""
    executed: int = 8
    """Actions that are executed before it is asked again; of denoiser.action_steps, those first predicted."""

    def __post_init__(self) -> None:
        if len(set(self.observations)) != len(self.observations):
            raise ConfigError(
                "A vector is named twice.", where="policy.observations", mend="Name each observation once."
            )
        if self.executed < 1:
            raise ConfigError(f"executed is {self.executed}.", where="policy.executed", mend="Choose 1 or more.")
