"""Settings of `python -m jobs.submit`: which job, which cluster, and what travels with it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from latentray.errors import ConfigError


@dataclass(kw_only=True)
class SubmitConfig:
    """One job sent to a running Ray cluster through its Jobs API."""

    job: str
    """The job to run there: a module of jobs/, such as `train`."""

    overrides: list[str] = field(default_factory=list)
    """The job's own settings, as it takes them itself; those after `--` on the command line are added to these."""

    address: str = "http://127.0.0.1:8265"
    """The cluster's dashboard (HTTP), behind which the Jobs API is; not the `ray://` client port."""

    wait: bool = True
    """Stream the job's output and end with its exit code; false returns as soon as the cluster took the job."""

    submission_id: str | None = None
    """A name of your choice makes the call repeatable: the same name again follows the job instead of starting another.
    Without one the cluster picks a name."""

    retries: int = 0
    """How often a job whose driver dies is sent again (not one that ends with a mistake of yours, or as it was asked to).
    A training run then has a name, so that it goes on where it was."""

    python: str = "python"
    """The interpreter on the cluster that has latentray's dependencies; in our images it is first on PATH."""

    env: dict[str, str] = field(default_factory=dict)
    """Environment variables of the job and its workers (`+env.NAME=value`). Whoever reaches the Jobs API can read
    them: keys belong into the cluster's secrets."""

    cpus: float = 0.0
    """CPUs reserved for the job's driver; the workers reserve their own."""

    gpus: float = 0.0
    """GPUs reserved for the job's driver."""

    connect_timeout_s: float = 5.0
    """How long to wait for the cluster to answer before giving up, in seconds."""

    def __post_init__(self) -> None:
        url = urlsplit(self.address)
        if url.scheme not in ("http", "https") or not url.hostname:
            raise ConfigError(
                f"The Jobs API is reached by HTTP, not at {self.address!r}.",
                where="address",
                mend="Give the dashboard's address, for example address=http://127.0.0.1:8265.",
            )
        if self.submission_id is not None and not re.fullmatch(r"[A-Za-z0-9_.-]{1,128}", self.submission_id):
            raise ConfigError(
                f"{self.submission_id!r} cannot name a submission.",
                where="submission_id",
                mend="Use letters, digits, '-', '_' and '.', at most 128 of them.",
            )
        if not self.python.strip():
            raise ConfigError("No interpreter is named.", where="python", mend="Leave it out, or give python=<path>.")
        if self.retries and not self.wait:
            raise ConfigError(
                "Who does not wait cannot try again.", where="retries", mend="Set wait=true, or retries=0."
            )
        for key in ("cpus", "gpus", "retries"):
            if getattr(self, key) < 0:
                raise ConfigError(f"{key} cannot be negative.", where=key, mend=f"Give {key}=0 or more.")
        if self.connect_timeout_s <= 0:
            raise ConfigError("The time-out must be positive.", where="connect_timeout_s", mend="Give seconds above 0.")
