"""The `classifier` artifact: a classifier of noisy latents, in one folder of safetensors and JSON.

config.json             architecture, objective (whose noise schedule it knows), fingerprint of its latents, names of its classes
classifier.safetensors  EMA weights
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentray import build
from latentray.checkpoint import manifest, weights
from latentray.config.denoiser import DenoiserConfig
from latentray.config.objective import ObjectiveConfig
from latentray.diffusion import schedules, timesteps
from latentray.errors import ArtifactError, ConfigError, FingerprintMismatch
from latentray.inference.model_folder import Model
from latentray.models.noisy_classifier import NoisyClassifier

KIND = "classifier"
FORMAT = 1
_WEIGHTS = "classifier.safetensors"


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class LatentClassifier:
    """A classifier's folder, loaded: a `diffusion.guidance.Classifier`."""

    uri: str
    digest: str
    network: NoisyClassifier
    objective: ObjectiveConfig
    latents: str
    """Fingerprint of the latents that it knows."""
    class_names: tuple[str, ...]
    """In their order; none where they have no names."""

    @property
    def classes(self) -> int:
        """How many it tells apart."""
        assert self.network.config.classes is not None
        return self.network.config.classes

    def __call__(self, x_BChw: Tensor, t_B: Tensor, labels_B: Tensor) -> Tensor:
        """log p(class | x_t), (B,) float32, differentiable over x."""
        logits = self.network(x_BChw, t_B).float()
        return torch.log_softmax(logits, dim=1).gather(1, labels_B[:, None])[:, 0]

    def require_for(self, model: Model) -> None:
        """Raise FingerprintMismatch where it knows other latents or noise levels than a model's, ConfigError where the model
        draws clips, or other classes."""
        own = _Known(objective=self.objective, latents=self.latents, classes=self.classes, class_names=self.class_names)
        of_model = _Known(
            objective=model.objective,
            latents=model.latents,
            classes=model.denoiser.config.classes,
            class_names=model.classes,
            frames=model.frames,
        )
        _require_fit(own, of_model, where=self.uri)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Known:
    """What a classifier and a model have to agree on."""

    objective: ObjectiveConfig
    latents: str | None
    """Fingerprint; None where a model's description, of an earlier format, does not tell."""
    classes: int | None
    class_names: tuple[str, ...]
    frames: int = 0

    @classmethod
    def read(cls, described: Mapping[str, Any], network: str) -> _Known:
        """Of a folder's config.json, where the network's own part goes by that name."""
        return cls(
            objective=ObjectiveConfig(**described["objective"]),
            latents=described.get("latents"),
            classes=described[network].get("classes"),
            class_names=tuple(described.get("classes", ())),
            frames=described.get("frames", 0),
        )


def require_fit(uri: str, *, model: str) -> None:
    """Raise as `LatentClassifier.require_for`, by the two folders' descriptions alone; no weights are read.

    Raises InputMissing without a manifest, ArtifactError where the classifier is of another kind or format.
    """
    own = _Known.read(_description(uri, manifest.read(uri, kind=KIND)), "classifier")
    of_model = json.loads(manifest.fetch_file(model, "config.json", manifest.read(model)).read_text())
    _require_fit(own, _Known.read(of_model, "denoiser"), where=uri)


def _require_fit(own: _Known, model: _Known, *, where: str) -> None:
    if model.frames:
        raise ConfigError("Classifiers know pictures, and the model draws clips.", where=where, mend=_LEAVE_OUT)
    if model.latents is not None and own.latents != model.latents:
        raise FingerprintMismatch(
            f"The classifier knows latents of another autoencoder ({str(own.latents)[:12]}; the model's is "
            f"{model.latents[:12]}).",
            where=where,
            mend="Train one on the latents that the model was trained on.",
        )
    if not timesteps.same_levels(schedules.build(own.objective), schedules.build(model.objective)):
        raise FingerprintMismatch(
            f"The classifier knows the noise levels of {_schedule(own.objective)}, and the model those of "
            f"{_schedule(model.objective)}.",
            where=where,
            mend="Train one with objective=<the model's>.",
        )
    named = model.class_names and own.class_names and model.class_names != own.class_names
    if model.classes is not None and (named or model.classes != own.classes):
        what = "classes of other names" if named else f"{model.classes} classes"
        raise ConfigError(
            f"The classifier tells {own.classes} classes apart, and the model draws {what}.",
            where=where,
            mend="Train one on the data set that the model was trained on.",
        )


_LEAVE_OUT = "Leave out classifier=."


def _schedule(objective: ObjectiveConfig) -> str:
    return f"schedule={objective.schedule}, timesteps={objective.timesteps}"


def write(
    folder: Path,
    *,
    config: DenoiserConfig,
    state: Mapping[str, Tensor],
    objective: ObjectiveConfig,
    latents: str,
    class_names: Sequence[str],
) -> None:
    """Write a classifier's files locally, ready for `manifest.publish(kind="classifier")`."""
    weights.save(folder / _WEIGHTS, state)
    described: dict[str, Any] = {
        "format": FORMAT,
        "classifier": build.as_dict(config),
        "objective": build.as_dict(objective),
        "latents": latents,
        "classes": list(class_names),
    }
    (folder / "config.json").write_text(json.dumps(described, indent=2) + "\n")


def load(uri: str, *, device: torch.device | str = "cpu") -> LatentClassifier:
    """Load a classifier's folder, every file verified against the manifest; float32.

    Raises InputMissing without a manifest, DigestMismatch for a file that differs, ArtifactError for another kind or format.
    """
    found, files = manifest.fetch_all(uri, kind=KIND)
    described = _description(uri, found)
    net = build.denoiser(DenoiserConfig(**described["classifier"]), weights.read(files[_WEIGHTS]), where=uri)
    assert isinstance(net, NoisyClassifier)
    return LatentClassifier(
        uri=uri,
        digest=found.digest,
        network=net.to(device),
        objective=ObjectiveConfig(**described["objective"]),
        latents=described["latents"],
        class_names=tuple(described["classes"]),
    )


def _description(uri: str, found: manifest.Manifest) -> dict[str, Any]:
    described: dict[str, Any] = json.loads(manifest.fetch_file(uri, "config.json", found).read_text())
    if described.get("format") != FORMAT:
        raise ArtifactError(
            f"The classifier has format {described.get('format')!r}.", where=uri, mend=f"Format {FORMAT} is read here."
        )
    return described
