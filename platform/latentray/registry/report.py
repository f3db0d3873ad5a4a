"""The evaluation report: what evaluation writes, gates read and a release carries. Format 1.

A report states everything its figures depend on (data set, feature network, resize, sample count, seed, sampler), so
that two figures are compared only where they mean the same.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import re
from collections.abc import Mapping
from typing import Any, Literal

from latentray.checkpoint import manifest, store
from latentray.errors import ArtifactError, InputMissing

NAME = "report.json"
KIND = "report"
FORMAT = 1

Direction = Literal["lower", "higher"]

DIRECTIONS: dict[str, Direction] = {
    "heldout_loss": "lower",
    "fid": "lower",
    "kid": "lower",
    "kid_std": "lower",
    "samples.color_accuracy": "higher",
    "samples.shape_accuracy": "higher",
    "samples.background_accuracy": "higher",
    "samples.direction_accuracy": "higher",
    "samples.heldout_color_accuracy": "higher",
    "super_resolution.psnr": "higher",
    "policy.success": "higher",
    "policy.success_standard_error": "lower",
    "policy.reached": "higher",
    "policy.touched": "lower",
    "policy.steps": "lower",
    "policy.rarer_way_share": "higher",
    "policy.expert_success": "higher",
    "policy.baseline_success": "higher",
    "policy.baseline_success_standard_error": "lower",
    "policy.baseline_reached": "higher",
    "policy.ahead_of_baseline": "higher",
    "autoencoder.psnr": "higher",
    "autoencoder.ssim": "higher",
    "autoencoder.lpips": "lower",
    "autoencoder.rfid": "lower",
}
"""Which way each metric is better; besides, `heldout_loss.t<k>` is the held-out loss at timestep k (lower)."""

_LOSS_AT_TIMESTEP = re.compile(r"heldout_loss\.t-?\d+")


def direction(metric: str) -> Direction:
    """Whether lower or higher is better. Raises ValueError, naming the nearest, for a name that is not canonical."""
    if _LOSS_AT_TIMESTEP.fullmatch(metric):
        return "lower"
    if metric not in DIRECTIONS:
        near = difflib.get_close_matches(metric, DIRECTIONS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(DIRECTIONS)}, heldout_loss.t<k>"
        raise ValueError(f"there is no metric {metric!r}{hint}")
    return DIRECTIONS[metric]


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeatureNetworkId:
    """Which network FID, KID and rFID were measured with; figures of two networks are never compared."""

    name: str
    digest: str
    """sha256 of its weights."""
    resize: str
    """How pictures were brought to its input size."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplerSettings:
    """How the pictures behind the figures were drawn."""

    sampler: str
    steps: int
    guidance_scale: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationReport:
    """What `report.json` holds."""

    model: str
    """Digest of the model's manifest."""
    dataset: str
    """Digest of the manifest of the data set compared with."""
    feature_network: FeatureNetworkId
    samples: int
    """How many pictures were drawn."""
    seed: int
    sampler: SamplerSettings
    metrics: dict[str, float]
    """Flat, by canonical name (`DIRECTIONS`)."""
    format: int = FORMAT

    def __post_init__(self) -> None:
        for name in self.metrics:
            direction(name)

    @property
    def digest(self) -> str:
        """sha256 of the report's canonical JSON."""
        return store.digest_of(self.to_json())

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; a metric that is not a finite number becomes null, since JSON has no NaN."""
        values = dataclasses.asdict(self)
        values["metrics"] = {k: float(v) if math.isfinite(v) else None for k, v in sorted(self.metrics.items())}
        return values

    @classmethod
    def from_json(cls, values: Mapping[str, Any], *, where: str = "") -> EvaluationReport:
        """The inverse of `to_json` (null becomes NaN). Raises ArtifactError where format or content are wrong."""
        found = values.get("format") if isinstance(values, Mapping) else None
        if found != FORMAT:
            raise ArtifactError(
                f"The evaluation report has format {found!r}; this version reads format {FORMAT}.",
                where=where,
                mend="Evaluate the model again with this version: python -m jobs.evaluate",
            )
        try:
            raw = dict(values)
            return cls(
                feature_network=FeatureNetworkId(**raw.pop("feature_network")),
                sampler=SamplerSettings(**raw.pop("sampler")),
                metrics={k: math.nan if v is None else float(v) for k, v in raw.pop("metrics").items()},
                **raw,
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ArtifactError(
                f"The evaluation report is not complete: {error}", where=where, mend="Evaluate the model again."
            ) from None


def load(uri: str) -> EvaluationReport:
    """The report at a URI: an artifact of kind `report` (verified), or a bare `.json` file.

    Raises InputMissing, ArtifactError, DigestMismatch.
    """
    if not store.exists(uri):
        raise InputMissing(
            "The report is not there.", where=uri, mend="Make one with: python -m jobs.evaluate model=<uri>"
        )
    if uri.endswith(".json"):
        return _parse(store.read_bytes(uri), uri)
    found = manifest.read(uri, kind=KIND)
    return _parse(manifest.fetch_file(uri, NAME, found).read_bytes(), store.join(uri, NAME))


def _parse(data: bytes, where: str) -> EvaluationReport:
    try:
        return EvaluationReport.from_json(json.loads(data), where=where)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ArtifactError(f"The evaluation report is no JSON: {error}", where=where, mend="Evaluate again.") from None


def comparable(a: EvaluationReport, b: EvaluationReport) -> str | None:
    """Why the figures of two reports may not be compared; None where they may."""
    stated = {
        "data sets": (a.dataset, b.dataset),
        "feature networks": (_named(a.feature_network), _named(b.feature_network)),
        "resize": (a.feature_network.resize, b.feature_network.resize),
        "sample counts": (a.samples, b.samples),
    }
    for what, (one, other) in stated.items():
        if one != other:
            return f"different {what}: {one} and {other}"
    return None


def _named(network: FeatureNetworkId) -> str:
    return f"{network.name}@{network.digest}"
