"""Settings of `python -m jobs.export`."""

from __future__ import annotations

import dataclasses

from latentray.errors import ConfigError

STATES = ("ema", "weight")


@dataclasses.dataclass(kw_only=True)
class Export:
    """Whole weights from the parts of a checkpoint: no GPU, no cluster, whatever world wrote it."""

    run: str | None = None
    """A run's folder or URI: its newest valid checkpoint is taken. Or name one yourself:"""
    checkpoint: str | None = None
    """A checkpoint's folder or URI."""
    state: str = "ema"
    """ema (what is promoted) or weight (what was averaged)."""
    out: str | None = None
    """Where <network>.safetensors and a manifest are written."""
    pin: bool = True
    """Keep the checkpoint: retention does not remove it any more."""

    def __post_init__(self) -> None:
        if bool(self.run) == bool(self.checkpoint):
            raise ConfigError(
                "One of run and checkpoint is needed.", where="run", mend="Add run=<folder or URI of the run>."
            )
        if not self.out:
            raise ConfigError("This setting is needed.", where="out", mend="Add out=<path or URI>.")
        if self.state not in STATES:
            raise ConfigError(f"There is no state {self.state!r}.", where="state", mend=f"Known: {', '.join(STATES)}.")
