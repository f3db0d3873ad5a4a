"""The `model` artifact of a policy: everything needed to act, in one folder of safetensors and JSON.

config.json              architecture, objective, sampling defaults; what it is told, and the ranges of that and of its actions
denoiser.safetensors     EMA weights
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from latentray import build
from latentray.checkpoint import manifest, weights
from latentray.conditioning.observations import ACTIONS, OBS, Range
from latentray.config.denoiser import DenoiserConfig
from latentray.config.objective import ObjectiveConfig
from latentray.errors import ArtifactError
from latentray.inference.model_folder import FORMAT, SamplingDefaults


@dataclasses.dataclass(kw_only=True)
class PolicyModel:
    """A policy's folder, loaded."""

    digest: str
    denoiser: nn.Module
    config: DenoiserConfig
    objective: ObjectiveConfig
    defaults: SamplingDefaults
    observations: tuple[str, ...]
    """Names of what it is told, in the order of its input."""
    ranges: Mapping[str, Range]
    """Of `actions` and of each `obs.<name>`: the training data's, mapped onto [-1, 1]."""
    executed: int
    """Actions that are executed before it is asked again, unless a caller wants it otherwise."""

    @property
    def widths(self) -> dict[str, int]:
        """Numbers of one observation by name."""
        return {name: len(self.ranges[f"{OBS}{name}"].low) for name in self.observations}

    @property
    def actions(self) -> Range:
        return self.ranges[ACTIONS]


def write(
    folder: Path,
    *,
    config: DenoiserConfig,
    state: Mapping[str, Tensor],
    objective: ObjectiveConfig,
    defaults: SamplingDefaults,
    observations: tuple[str, ...],
    ranges: Mapping[str, Range],
    executed: int,
) -> None:
    """Write a policy's files locally, ready for `manifest.publish(kind="model")`."""
    weights.save(folder / "denoiser.safetensors", state)
    described: dict[str, Any] = {
        "format": FORMAT,
        "denoiser": build.as_dict(config),
        "objective": build.as_dict(objective),
        "sampling": dataclasses.asdict(defaults),
        "policy": {
            "observations": list(observations),
            "ranges": {name: one.to_json() for name, one in ranges.items()},
            "executed": executed,
        },
    }
    (folder / "config.json").write_text(json.dumps(described, indent=2) + "\n")


def load(uri: str) -> PolicyModel:
    """Load a policy's folder, or its release, every file verified against the manifest.

    Raises InputMissing without a manifest, DigestMismatch for a file that differs, ArtifactError for what is no policy or has
    another format.
    """
    found, files = manifest.fetch_all(uri)
    described = json.loads(files["config.json"].read_text()) if "config.json" in files else {}
    if found.kind not in ("model", "release") or "policy" not in described:
        what = f"a {found.kind}" if found.kind not in ("model", "release") else "a model that draws pictures or clips"
        raise ArtifactError(f"A policy is wanted here, and this is {what}.", where=uri, mend="Give another path.")
    if described.get("format") != FORMAT:
        raise ArtifactError(
            f"The policy has format {described.get('format')!r}.", where=uri, mend=f"Format {FORMAT} is read here."
        )
    config, policy = DenoiserConfig(**described["denoiser"]), described["policy"]
    return PolicyModel(
        digest=found.digest,
        denoiser=build.denoiser(config, weights.read(files["denoiser.safetensors"]), where=uri),
        config=config,
        objective=ObjectiveConfig(**described["objective"]),
        defaults=SamplingDefaults(**described["sampling"]),
        observations=tuple(policy["observations"]),
        ranges={name: Range.from_json(one) for name, one in policy["ranges"].items()},
        executed=policy["executed"],
    )


def is_policy(uri: str) -> bool:
    """Whether the model or release at a URI gives actions. Raises InputMissing where there is none."""
    found = manifest.read(uri)
    if "config.json" not in found.files:
        return False
    return "policy" in json.loads(manifest.fetch_file(uri, "config.json", found).read_text())
