"""Group `cluster`: where workers run."""

from __future__ import annotations

import dataclasses

from latentray.errors import ConfigError

KINDS = ("ray", "none")


@dataclasses.dataclass(kw_only=True)
class ClusterConfig:
    """Ray Train workers, or (kind=none) this very process, alone or under torchrun."""

    kind: str = "ray"
    """ray, or none: no Ray is imported; start it with torchrun for several workers."""
    address: str | None = None
    """A running Ray cluster (`auto`, or host:port); null starts one on this machine."""
    workers: int = 1
    """Number of training workers (kind=ray)."""
    min_workers: int | None = None
    """The fewest that a run goes on with where nodes are missing; null waits for all. All numbers between must divide."""
    resize_every_s: float = 60.0
    """With min_workers: how often the cluster is asked for more nodes. To take them in, the workers start again."""
    cpus_per_worker: float = 1
    """CPUs that Ray reserves for each."""
    threads: int | None = None
    """torch threads per worker; null is the reserved CPUs."""
    device: str = "auto"
    """auto (GPUs where the cluster has them), cuda or cpu."""
    max_failures: int = 3
    """How often a dead worker group is started again, from the newest valid checkpoint."""
    collective_timeout_s: float = 300.0
    """A collective that takes longer ends the attempt; the default of torch is half an hour."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(
                f"There is no cluster kind {self.kind!r}.", where="cluster.kind", mend=f"Known: {', '.join(KINDS)}."
            )
        if self.workers < 1 or self.cpus_per_worker <= 0:
            raise ConfigError("At least one worker with some CPU is wanted.", where="cluster.workers", mend="Raise it.")
        if self.min_workers is not None and not 1 <= self.min_workers <= self.workers:
            raise ConfigError(
                f"min_workers is {self.min_workers}, and workers {self.workers}.",
                where="cluster.min_workers",
                mend="Set it between 1 and cluster.workers, or to null.",
            )
        for key in ("resize_every_s", "collective_timeout_s"):
            if getattr(self, key) <= 0:
                raise ConfigError("It must be above 0.", where=f"cluster.{key}", mend="Set it to 60, say.")
        if self.threads is not None and self.threads < 1:
            raise ConfigError(
                "A worker has one thread at least.", where="cluster.threads", mend="Raise it, or set it to null."
            )
        if self.device not in ("auto", "cuda", "cpu"):
            raise ConfigError(
                f"There is no device {self.device!r}.", where="cluster.device", mend="Use auto, cuda or cpu."
            )
