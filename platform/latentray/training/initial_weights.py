"""What stage 1 begins with: the weights of an autoencoder that is there already, or none."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from latentray import build
from latentray.checkpoint import store
from latentray.config.train import Train
from latentray.errors import ConfigError, FingerprintMismatch
from latentray.training.partitions import CODEBOOK, Pieces


def autoencoder(config: Train) -> build.AutoencoderArtifact | None:
    """The autoencoder that stage 1 starts from; None where it starts afresh.

    Raises ConfigError where there is nothing to train, where a decoder is to be trained of no autoencoder, or where the
    one named has another architecture than `autoencoder` says; InputMissing and ArtifactError as the artifact's reader.
    """
    if config.autoencoder.kind == "identity":
        raise ConfigError(
            "The identity has nothing to train.",
            where="autoencoder.kind",
            mend="Go on with stage 2 and autoencoder_from=identity.",
        )
    if config.autoencoder_from is None:
        if config.stage.train_only != "all":
            raise ConfigError(
                f"There is no autoencoder whose {config.stage.train_only} could be trained on.",
                where="autoencoder_from",
                mend="Name its artifact, or set stage.train_only=all.",
            )
        return None
    artifact = build.autoencoder_artifact(store.absolute(config.autoencoder_from))
    for field in dataclasses.fields(config.autoencoder):
        wanted, got = getattr(config.autoencoder, field.name), getattr(artifact.config, field.name)
        if wanted != got:
            raise ConfigError(
                f"The autoencoder to start from has {field.name}={got}, not {wanted}.",
                where=f"autoencoder.{field.name}",
                mend="Give the configuration it was made with (autoencoder=...).",
            )
    return artifact


def whole(
    trained: dict[str, Tensor], pieces: Pieces, config: Mapping[str, Any], inputs: Mapping[str, str], *, averaged: bool
) -> dict[str, Tensor]:
    """The whole state dict of an autoencoder, from a checkpoint's pieces of what a run of this configuration trained of it.

    Raises as the artifact's reader, and FingerprintMismatch where another autoencoder is there now than the run began from.
    """
    book = pieces.whole(CODEBOOK, "average" if averaged else "vectors")
    state = trained if book is None else trained | {"quantizer.codebook_KD": book}
    if config["stage"].get("train_only", "all") == "all":
        return state
    artifact = build.autoencoder_artifact(store.absolute(config["autoencoder_from"]))
    if artifact.digest != inputs.get("autoencoder"):
        raise FingerprintMismatch(
            "The weights that were not trained came from another autoencoder.",
            where=artifact.uri,
            mend="Bring back the one that the run began from.",
        )
    return artifact.state() | state
