"""The one error tree of latentray.

Every error carries what happened, where, and how to mend it; a job prints these three and exits with code 2.
Errors travel between Ray processes, so the base class defines `__reduce__`.
"""

from __future__ import annotations


class LatentrayError(Exception):
    """Root of every error latentray raises on purpose.

    Args:
        what: the cause, in one sentence.
        where: the file, key, field or URI concerned; empty where there is none.
        mend: what the user can do about it, naming the setting that does it.
    """

    def __init__(self, what: str, *, where: str = "", mend: str = "") -> None:
        super().__init__(what)
        self.what, self.where, self.mend = what, where, mend

    def __str__(self) -> str:
        lines = [self.what]
        if self.where:
            lines.append(f"  where: {self.where}")
        if self.mend:
            lines.append(f"  mend:  {self.mend}")
        return "\n".join(lines)

    def __reduce__(self):
        return _rebuild, (type(self), self.what, self.where, self.mend, self.__dict__.copy())


def _rebuild(cls: type[LatentrayError], what: str, where: str, mend: str, state: dict) -> LatentrayError:
    error = cls.__new__(cls)
    LatentrayError.__init__(error, what, where=where, mend=mend)
    error.__dict__.update(state)
    return error


class ConfigError(LatentrayError, ValueError):
    """A setting is misspelt, of the wrong type, out of bounds, or contradicts another: `trian.steps=10`."""


class InputMissing(LatentrayError):
    """Something a job was told to read is not there, or is empty: `path=/data/pictrues`."""


class EnvironmentRefused(LatentrayError):
    """The machine cannot run the job as it stands: a port in use, a full disk, no W&B key for online tracking."""


class StorageFailed(LatentrayError):
    """A store answered with errors for longer than its budget of retries: an S3 endpoint that is down, a lost network."""


class ArtifactError(LatentrayError):
    """A folder with a manifest cannot be used: no manifest, the wrong kind, or an unknown format version."""


class DigestMismatch(ArtifactError):
    """A file differs from the sha256 its manifest or index recorded: a flipped bit, a cut upload."""


class FingerprintMismatch(ArtifactError):
    """Two artifacts do not belong together: latents that another autoencoder encoded."""


class WeightsMismatch(ArtifactError, ValueError):
    """Weights do not fit the network that they are given to: another shape, a name that is missing or unknown."""


class AlreadyExists(ArtifactError):
    """A committed artifact would be overwritten; artifacts are immutable."""


class DataError(LatentrayError):
    """A data set cannot be used: too many bad pictures, a shard that does not match its index."""


class SampleRejected(LatentrayError):
    """One picture of a data set cannot be used; carries the `reason` it is counted under.

    Raised inside a job that goes on with the rest and lists the sample in `rejected.jsonl`.
    """

    def __init__(self, reason: str, what: str, *, where: str = "") -> None:
        super().__init__(what, where=where)
        self.reason = reason


class UnsafeMember(DataError):
    """A shard holds a member whose decoding could run code (`.pyd`, `.pkl`, `.pth`), or a path that leaves the shard."""


class GateRefused(LatentrayError):
    """A promotion was refused: the report misses a threshold, or is worse than the live release."""


class RequestRefused(LatentrayError):
    """A request to the endpoint cannot be served as it stands; `param` names the offending field (HTTP 400)."""

    def __init__(self, what: str, *, param: str | None = None, code: str = "invalid_value", status: int = 400) -> None:
        super().__init__(what, where=param or "")
        self.param, self.code, self.status = param, code, status


class Stopped(LatentrayError):
    """A run was asked to stop (SIGTERM), saved a checkpoint and ended; the same run goes on from there later."""


class Interrupted(LatentrayError):
    """A run was ended at once (Ctrl-C), without a checkpoint; the same run goes on from its newest one later."""


class TrainingFailed(LatentrayError):
    """A training run ended without a usable result: a worker died more often than allowed, or the loss is not a number."""
