"""Pipelines to model folders and back: what imports and exports share."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from latentray import build
from latentray.checkpoint import manifest, store, weights
from latentray.checkpoint.manifest import Manifest
from latentray.checkpoint.schedulers import Solver
from latentray.config.autoencoder import AutoencoderConfig
from latentray.config.beside import BesideConfig
from latentray.config.denoiser import DenoiserConfig
from latentray.config.objective import ObjectiveConfig
from latentray.errors import ArtifactError
from latentray.inference import model_folder
from latentray.inference.model_folder import SamplingDefaults
from latentray.interchange import encoders, layouts
from latentray.interchange.layouts import Pipeline
from latentray.models.autoencoder import LatentScale

_CARRIED = "spiece.model"


def read(uri: str, scratch: Path) -> tuple[Manifest, Pipeline, SamplingDefaults]:
    """A model or release folder as a pipeline, every file verified; nothing is built.

    Args:
        scratch: an empty local folder, for files that must lie side by side.

    Raises ArtifactError for another kind of artifact or format, DigestMismatch for a damaged file, ConfigError for a model
    that is none of the pipelines that are exchanged.
    """
    found, files = manifest.fetch_all(uri)
    if found.kind not in ("model", "release"):
        raise ArtifactError(
            f"A model is wanted here, and this is a {found.kind}.",
            where=uri,
            mend="Give the path of a model or release.",
        )
    config = json.loads(files["config.json"].read_text())
    if config.get("format") not in (1, model_folder.FORMAT):
        raise ArtifactError(
            f"The model has format {config.get('format')!r}.",
            where=uri,
            mend=f"Formats 1 and {model_folder.FORMAT} are read here.",
        )
    entries = [config["text_encoder"]] if "text_encoder" in config else config.get("text_encoders", [])
    denoiser = DenoiserConfig(**config["denoiser"])
    layout = layouts.of_model(denoiser, [encoders.reading_of(entry) for entry in entries])
    described = dict(config["autoencoder"])
    scale = LatentScale(shift=described.pop("shift"), scale=described.pop("scale"))
    autoencoder, objective = AutoencoderConfig(**described), ObjectiveConfig(**config["objective"])
    zero = config.get("zero_when_empty", False)
    layouts.require_sayable(
        layout, denoiser=denoiser, autoencoder=autoencoder, objective=objective, zero_when_empty=zero
    )
    parts = []
    for entry in entries:
        (scratch / entry["name"]).mkdir(parents=True)
        parts.append(encoders.of_model(entry, files, scratch / entry["name"]))
    defaults = SamplingDefaults(**config["sampling"])
    pipeline = Pipeline(
        layout=layout,
        denoiser=denoiser,
        denoiser_state=weights.read(files["denoiser.safetensors"]),
        autoencoder=autoencoder,
        autoencoder_state=weights.read(files["autoencoder.safetensors"]),
        scale=scale,
        encoders=tuple(parts),
        objective=objective,
        solver=Solver(sampler=defaults.sampler),
        size=config["size"],
        zero_when_empty=zero,
    )
    return found, pipeline, defaults


def write(
    pipeline: Pipeline,
    out: str,
    *,
    defaults: SamplingDefaults,
    config: Mapping[str, Any],
    meta: Mapping[str, Any],
    parts: str | None = None,
) -> Manifest:
    """Commit a pipeline as an artifact of kind `model`.

    Args:
        parts: a URI below which autoencoder and text encoders are committed as artifacts of their own: what encoding a
            data set and training on it ask for.

    Raises AlreadyExists where one stands, before anything is written.
    """
    wanted = [] if parts is None else [store.join(parts, "autoencoder")]
    wanted += [] if parts is None else [store.join(parts, "text_encoders", one.name) for one in pipeline.encoders]
    for uri in (out, *wanted):
        manifest.refuse_existing(uri)
    store.require_space(out, 2 * pipeline.bytes)
    with store.staging() as scratch:
        prepared = [
            encoders.write_ours(one, scratch / "encoders" / one.name, where=f"tokenizer of {one.name}")
            for one in pipeline.encoders
        ]
        autoencoder = scratch / "autoencoder"
        autoencoder.mkdir()
        build.write_autoencoder(
            autoencoder, pipeline.autoencoder, pipeline.autoencoder_state, scale=pipeline.scale, size=pipeline.size
        )
        folder = scratch / "model"
        folder.mkdir()
        model_folder.write(
            folder,
            autoencoder_config=pipeline.autoencoder,
            autoencoder_weights=autoencoder / "autoencoder.safetensors",
            scale=pipeline.scale,
            denoiser_config=pipeline.denoiser,
            denoiser_state=pipeline.denoiser_state,
            objective=pipeline.objective,
            text_encoders=prepared,
            defaults=defaults,
            size=pipeline.size,
            beside=BesideConfig(kind="inpainting" if pipeline.paints else "none"),
            zero_when_empty=pipeline.zero_when_empty,
        )
        for one in prepared:
            if (one.folder / _CARRIED).is_file():
                shutil.copyfile(one.folder / _CARRIED, folder / "text_encoders" / one.name / _CARRIED)
        if parts is not None:
            manifest.publish(autoencoder, wanted[0], kind="autoencoder", config=config, meta=meta)
            for one, uri in zip(prepared, wanted[1:], strict=True):
                manifest.publish(one.folder, uri, kind="text_encoder", config=config, meta=meta)
        return manifest.publish(folder, out, kind="model", config=config, meta=meta)
