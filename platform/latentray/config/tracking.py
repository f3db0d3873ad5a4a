"""Settings of the group `tracking`: where a run's metrics go besides its own `metrics.jsonl`."""

from __future__ import annotations

import dataclasses

from latentray.errors import ConfigError

MODES = ("auto", "online", "offline", "disabled")


@dataclasses.dataclass(kw_only=True)
class TrackingConfig:
    """Weights & Biases settings; `metrics.jsonl` beside the run is written whatever they say."""

    mode: str = "auto"
    """`online`, `offline`, `disabled`, or `auto`: as `$WANDB_MODE` says, else online where there is a key."""
    project: str = "latentray"
    """W&B project that the run belongs to."""
    entity: str | None = None
    """W&B user or team; None is the key's default."""
    group: str | None = None
    """Name under which W&B shows several runs together: both stages of one model, the trials of a sweep."""
    tags: list[str] = dataclasses.field(default_factory=list)
    """Tags shown beside the run."""
    start_seconds: float = 8.0
    """How long the W&B server may take to answer before the run is recorded offline. The run itself never waits."""
    finish_seconds: float = 30.0
    """How long the end of a run waits for uploads; what is left can be sent later by `wandb sync`."""

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ConfigError(
                f"There is no tracking mode {self.mode!r}.",
                where="tracking.mode",
                mend=f"Use one of: {', '.join(MODES)}.",
            )
        if not self.project.strip():
            raise ConfigError("The W&B project has no name.", where="tracking.project", mend="Give one: latentray.")
        for key, most in (("start_seconds", 60.0), ("finish_seconds", 3600.0)):
            if not 0 < getattr(self, key) <= most:
                raise ConfigError(
                    f"tracking.{key} is {getattr(self, key)}.",
                    where=f"tracking.{key}",
                    mend=f"Give seconds above 0 and at most {most:g}.",
                )
