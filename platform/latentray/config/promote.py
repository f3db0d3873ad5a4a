"""Settings of the jobs `promote`, `rollback` and `releases`."""

from __future__ import annotations

import dataclasses
import math
import re

from latentray.errors import ConfigError

_ALIAS = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
_RELEASE = re.compile(r"r-[0-9a-f]{12}")


@dataclasses.dataclass(kw_only=True)
class RelativeToLive:
    """A bound relative to the release the alias points to."""

    max_regression: float = 0.05
    """How much worse than the live release a metric may be, as a fraction of the live figure."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.max_regression) and self.max_regression >= 0):
            raise ConfigError(
                f"max_regression is {self.max_regression}.",
                where="gates.relative_to_live.max_regression",
                mend="Give a fraction of 0 or more, such as 0.05.",
            )


@dataclasses.dataclass(kw_only=True)
class Gate:
    """What one metric of the report must reach. With no bound at all it must be there and be a finite number."""

    metric: str
    """Its name in the report, such as `fid` or `samples.color_accuracy`."""
    min: float | None = None
    max: float | None = None
    relative_to_live: RelativeToLive | None = None

    def __post_init__(self) -> None:
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ConfigError(
                f"The gate on {self.metric} wants at least {self.min} and at most {self.max}.",
                where=f"gates: {self.metric}",
                mend="Swap min and max.",
            )


@dataclasses.dataclass(kw_only=True)
class PromoteConfig:
    """`python -m jobs.promote`"""

    model: str
    """URI of the model's folder; or what was evaluated: a pipeline's folder in diffusers' layout, or its hub id."""
    report: str
    """URI of its evaluation report: the report's folder, or a report.json."""
    registry: str = "runs/registry"
    """URI of the registry."""
    alias: str = "production"
    """The alias that moves to the new release."""
    gates: list[Gate] = dataclasses.field(default_factory=list)
    """Set by the group: gates=default, gates=shapes, or a file of your own in conf/gates/."""
    allow_incomparable: bool = False
    """Skip the relative gates, rather than refuse, where the live release's report cannot be compared."""
    license: str = "other"
    """Licence identifier in the model card's front matter, such as apache-2.0 or openrail++."""

    def __post_init__(self) -> None:
        check_alias(self.alias)
        if not self.gates:
            raise ConfigError("There is no gate to pass.", where="gates", mend="Choose gates=default or gates=shapes.")


@dataclasses.dataclass(kw_only=True)
class RollbackConfig:
    """`python -m jobs.rollback`"""

    registry: str = "runs/registry"
    """URI of the registry."""
    alias: str = "production"
    """The alias that moves back to the release before."""

    def __post_init__(self) -> None:
        check_alias(self.alias)


@dataclasses.dataclass(kw_only=True)
class ReleasesConfig:
    """`python -m jobs.releases`"""

    registry: str = "runs/registry"
    """URI of the registry."""


def check_alias(alias: str) -> None:
    """Refuse an alias that is no plain file name, or that could be taken for a release's id (ConfigError)."""
    if not _ALIAS.fullmatch(alias) or _RELEASE.fullmatch(alias):
        raise ConfigError(
            f"{alias!r} cannot be an alias.",
            where="alias",
            mend="Use lower-case letters, digits, '.', '_' and '-', such as alias=production.",
        )
