"""What becomes of a sample that cannot be used: the run fails, or the sample keeps its place with weight 0.

Damage is what reading again would not mend: bytes that differ from the index, a shard that is missing or cut, a member that
cannot be decoded. It changes weights, never the order, and is counted exactly: no sample is lost in silence. A member that
could run code is no damage but an attack, and always an error.
"""

from __future__ import annotations

from typing import Any

from latentray.errors import DataError, DigestMismatch, LatentrayError, SampleRejected, UnsafeMember
from latentray.records import Damaged

DAMAGED = "__damaged__"
"""Entry of a sample that keeps its place only: its `Damaged`."""


def damaged(error: LatentrayError, sample: dict[str, Any]) -> dict[str, Any]:
    """What stands in for a sample: its place and its damage. Raises the error where it is no damage."""
    if isinstance(error, UnsafeMember) or not isinstance(error, DataError | DigestMismatch | SampleRejected):
        raise error
    reason = "digest" if isinstance(error, DigestMismatch) else getattr(error, "reason", "decode")
    found = Damaged(
        reason=reason, shard=str(sample.get("__url__", error.where)), key=sample.get("__key__", ""), what=error.what
    )
    place = {name: sample[name] for name in ("__id__", "__step__", "__bucket__", "__traffic__")}
    return place | {DAMAGED: found}


def require_few(damaged_samples: float, *, samples: int, allowed: float) -> None:
    """Raise DataError where more than `allowed` of a data set's samples were found damaged."""
    if damaged_samples > allowed * samples:
        raise DataError(
            f"{damaged_samples:.0f} of {samples} samples are damaged; damage.max_bad_fraction is {allowed:g}.",
            where="damage.max_bad_fraction",
            mend="Restore the shards that the log names, or raise it.",
        )
