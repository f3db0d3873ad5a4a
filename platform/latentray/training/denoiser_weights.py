"""What a denoiser begins with where a run goes on from another's model: `denoiser_from`.

An image model begins a video model too: the layers over time are then fresh, and with denoiser.train_only_temporal the
others stay as they came, bit for bit.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from latentray import build
from latentray.checkpoint import manifest, store, weights
from latentray.config.denoiser import DenoiserConfig
from latentray.config.train import Train
from latentray.errors import ArtifactError, ConfigError, FingerprintMismatch
from latentray.models.video import is_temporal

ROLE = "denoiser"
"""What lineage calls the model that a run goes on from."""
_KINDS = ("model", "release")
_OWN = frozenset(
    ("family", "checkpoint_activations", "train_only_temporal", "temporal_convolution", "temporal_attention")
)
"""Settings that change nothing about what the shared weights compute."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class InitialDenoiser:
    """A trained denoiser, verified but not read yet."""

    uri: str
    digest: str
    """Of its manifest."""
    config: DenoiserConfig
    path: Path
    """A local, verified copy of the weights."""

    def fill(self, net: nn.Module) -> None:
        """Take the weights over; layers over time that they lack stay fresh."""
        state = weights.read(self.path)
        fresh = {name: value for name, value in net.state_dict().items() if _is_fresh(name, state)}
        weights.load_into(net, fresh | state, where=self.uri)

    def beside(self, trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What was trained, and whatever was not, as it came: the whole state dict."""
        return {**weights.read(self.path), **trained}


def find(config: Train) -> InitialDenoiser | None:
    """What `denoiser_from` names, None where it names nothing.

    Raises InputMissing or DigestMismatch for a folder that cannot be read, ArtifactError where it is no model or the shapes
    of its weights differ, ConfigError where they are the same and mean something else.
    """
    if config.denoiser_from is None:
        return None
    found = _opened(config.denoiser_from)
    _require_shapes(config.denoiser, weights.shapes(found.path), found.uri)
    _require_alike(config.denoiser, found.config)
    return found


def lineage(found: InitialDenoiser | None) -> dict[str, str]:
    """What it adds to the digests of a run's inputs."""
    return {} if found is None else {ROLE: found.digest}


def whole(trained: dict[str, Tensor], config: Mapping[str, Any], inputs: Mapping[str, str]) -> dict[str, Tensor]:
    """The whole state dict of a denoiser, from what a run of this configuration trained of it.

    Raises as `find`, and FingerprintMismatch where another model is there now than the run began from.
    """
    if not (config["denoiser"].get("train_only_temporal") and config.get("denoiser_from")):
        return trained
    found = _opened(config["denoiser_from"])
    if found.digest != inputs.get(ROLE):
        raise FingerprintMismatch(
            "The weights that were not trained came from another model.",
            where=found.uri,
            mend="Bring back the model that the run began from.",
        )
    return found.beside(trained)


def origin(config: Train) -> dict[str, Any]:
    """Repository and commit of the hub's weights that a run goes on from, itself or through another; empty for none."""
    if config.denoiser_from is None:
        return {}
    meta = manifest.read(store.absolute(config.denoiser_from)).meta
    return {key: meta[key] for key in ("base_model", "base_commit") if key in meta}


def zero_when_dropped(config: Train) -> bool:
    """Whether zeros stand for a dropped caption: as the stage says, else as the model that the run goes on from has it.

    Raises as `find` does for a folder that cannot be read.
    """
    said = config.stage.zero_when_dropped
    if said is not None or config.denoiser_from is None:
        return bool(said)
    return bool(_described(config.denoiser_from)[2].get("zero_when_empty", False))


def _opened(place: str) -> InitialDenoiser:
    uri, found, described = _described(place)
    return InitialDenoiser(
        uri=uri,
        digest=found.digest,
        config=DenoiserConfig(**described["denoiser"]),
        path=manifest.fetch_file(uri, "denoiser.safetensors", found),
    )


def _described(place: str) -> tuple[str, manifest.Manifest, dict[str, Any]]:
    uri = store.absolute(place)
    found = manifest.read(uri)
    if found.kind not in _KINDS:
        raise ArtifactError(
            f"A model is wanted here, and this is a {found.kind}.",
            where=uri,
            mend="Give denoiser_from=<a run's model folder>, or a release.",
        )
    return uri, found, json.loads(manifest.fetch_file(uri, "config.json", found).read_text())


def _require_shapes(config: DenoiserConfig, given: Mapping[str, tuple[int, ...]], uri: str) -> None:
    with torch.device("meta"):
        own = {name: tuple(value.shape) for name, value in build.denoiser(config).state_dict().items()}
    weights.require_shapes({name: shape for name, shape in own.items() if not _is_fresh(name, given)}, given, where=uri)


def _require_alike(config: DenoiserConfig, other: DenoiserConfig) -> None:
    """Raise ConfigError where weights of the same shapes mean something else: heads, groups, how text is combined."""
    ours, theirs = _meaning(config), _meaning(other)
    for field in [name for name in ours if name in theirs]:
        if ours[field] != theirs[field]:
            raise ConfigError(
                f"{field} is {ours[field]}, and was {theirs[field]} in the model that the weights come from.",
                where=f"denoiser.{field}",
                mend=f"Set denoiser.{field} as it was, or train without denoiser_from.",
            )


def _meaning(config: DenoiserConfig) -> dict[str, Any]:
    values = {name: value for name, value in vars(config).items() if name not in _OWN}
    over_time = values.pop("temporal_heads")
    if config.family in ("unet", "video"):
        heads = [config.heads_at(level) for level in range(len(config.channels))]
        values |= {"level_heads": heads, "heads": None, "head_dim": None}
        if config.family == "video":
            values["temporal_heads"] = [over_time or one for one in heads]
    return values


def _is_fresh(name: str, given: Mapping[str, object]) -> bool:
    return is_temporal(name) and name not in given
