"""Settings of `python -m jobs.quickstart`."""

from __future__ import annotations

import dataclasses

from latentray.errors import ConfigError


@dataclasses.dataclass(kw_only=True)
class ScaleConfig:
    """How much of everything the quickstart does."""

    name: str = "full"
    pictures: int = 10_200
    validation_pictures: int = 432
    autoencoder_samples: int = 40_000
    diffusion_samples: int = 56_000
    evaluate_per_kind: int = 1
    """Pictures per combination in the evaluation before promotion."""
    per_caption: int = 4
    """Pictures of each of the 54 captions drawn through the endpoint."""
    per_unseen_caption: int = 16
    """Pictures of each unseen combination drawn through the endpoint."""
    steps: int = 20
    """Sampling steps."""
    gates: str = "shapes"
    """Group `gates` of the promotion."""


@dataclasses.dataclass(kw_only=True)
class QuickstartServe:
    """Where the quickstart's endpoint listens."""

    host: str = "127.0.0.1"
    port: int = 8000

    def __post_init__(self) -> None:
        if not 0 < self.port < 65536:
            raise ConfigError(f"{self.port} is no port.", where="serve.port", mend="Choose 1024 to 65535.")


@dataclasses.dataclass(kw_only=True)
class Quickstart:
    """From drawn pictures to a served model and a report, on this machine."""

    scale: ScaleConfig = dataclasses.field(default_factory=ScaleConfig)
    out: str = "runs/quickstart"
    keep_serving: bool = False
    seed: int = 0
    workers: int = 2
    """Training workers."""
    serve: QuickstartServe = dataclasses.field(default_factory=QuickstartServe)
