"""Settings of `python -m jobs.doctor`."""

from __future__ import annotations

import dataclasses

from latentray.config.cluster import ClusterConfig
from latentray.config.tracking import TrackingConfig
from latentray.errors import ConfigError


@dataclasses.dataclass(kw_only=True)
class DoctorConfig:
    """Whether machines, cluster, storage and services are fit for a run."""

    cluster: ClusterConfig = dataclasses.field(default_factory=ClusterConfig)
    tracking: TrackingConfig = dataclasses.field(default_factory=TrackingConfig)
    storage: str = "runs"
    """Where runs will lie, a path or URI: every node writes, lists, reads and deletes there."""
    serve_port: int = 8000
    """Port the endpoint will listen on."""
    dashboard_port: int = 8265
    """Port of Ray's dashboard."""
    min_free_gb: float = 20.0
    """Disks with less are warned of."""
    hub: bool = True
    """Ask whether the model hub answers."""
    timeout_s: float = 12.0
    """How long a cluster may take to answer."""
    json: bool = False
    """Print JSON instead of a table."""

    def __post_init__(self) -> None:
        for key in ("serve_port", "dashboard_port"):
            if not 0 < getattr(self, key) < 65536:
                raise ConfigError(f"{getattr(self, key)} is no TCP port.", where=key, mend="Give 1 ... 65535.")
        for key in ("min_free_gb", "timeout_s"):
            if getattr(self, key) < 0:
                raise ConfigError("It must be 0 or more.", where=key, mend=f"Raise {key}.")
