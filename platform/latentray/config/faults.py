"""Group `faults` of a training run: what is tolerated, and what is done then."""

from __future__ import annotations

import dataclasses

from latentray.errors import ConfigError


@dataclasses.dataclass(kw_only=True)
class FaultsConfig:
    """Steps that are no numbers or far off, ranks that hang, checkpoints that cannot be written."""

    spike_factor: float = 50.0
    """A step is dropped where its loss lies above the median of the last ones by so many times that median; 0 drops none."""
    spike_window: int = 128
    """Steps that the median is of; nothing is dropped as a spike before a quarter of them were seen."""
    drops_in_a_row: int = 16
    """Dropped steps (a loss or a gradient that is no number, or a spike) after which the run goes back to its last checkpoint."""
    max_rollbacks: int = 4
    """How often it goes back, before it ends."""
    silent_s: float = 15.0
    """A process that gave no sign of life for so long is stopped or lost: the workers start again."""
    step_timeout_s: float = 900.0
    """A step that takes longer hangs: stacks are saved, and the workers start again. The first step gets three times that."""
    checkpoint_wait_s: float | None = None
    """How long training waits for a checkpoint that is still being written when the next is due, which is left out then; null
    waits for a third of step_timeout_s."""
    failed_checkpoints: int = 3
    """Checkpoints in a row that may fail to be written or be left out (a full disk, a store that does not answer) before the run
    ends."""

    def __post_init__(self) -> None:
        for key in ("spike_window", "drops_in_a_row"):
            if getattr(self, key) < 1:
                raise ConfigError("It must be at least 1.", where=f"faults.{key}", mend=f"Raise faults.{key}.")
        for key in ("max_rollbacks", "failed_checkpoints"):
            if getattr(self, key) < 0:
                raise ConfigError("It must be 0 or more.", where=f"faults.{key}", mend=f"Raise faults.{key}.")
        if self.spike_factor != 0 and self.spike_factor < 1:
            raise ConfigError(
                "A factor below 1 would drop ordinary steps.",
                where="faults.spike_factor",
                mend="Set it to 50, say, or 0.",
            )
        if not 0 <= self.patience_s < self.step_timeout_s:
            raise ConfigError(
                "It is 0 or more, and less than step_timeout_s: whoever waits is in a step.",
                where="faults.checkpoint_wait_s",
                mend="Leave it out.",
            )
        if self.silent_s < 5 or self.step_timeout_s <= self.silent_s:
            raise ConfigError(
                "silent_s is 5 or more, and step_timeout_s longer.",
                where="faults.silent_s",
                mend="Set them to 15 and 900, say.",
            )

    @property
    def patience_s(self) -> float:
        """How long training waits for a checkpoint that is still being written."""
        return self.step_timeout_s / 3 if self.checkpoint_wait_s is None else self.checkpoint_wait_s
