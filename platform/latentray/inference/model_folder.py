"""The `model` artifact: everything needed to sample, in one folder of safetensors and JSON.

config.json              architecture, objective, latent scale, sampling defaults, native size
denoiser.safetensors     EMA weights
autoencoder.safetensors  EMA weights
text_encoder/            config.json, model.safetensors, tokenizer.json, tokenizer_config.json
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from latentray import build
from latentray.checkpoint import manifest, weights
from latentray.conditioning import text
from latentray.config.autoencoder import AutoencoderConfig
from latentray.config.denoiser import DenoiserConfig
from latentray.config.objective import ObjectiveConfig
from latentray.errors import ArtifactError
from latentray.models.autoencoder import KLAutoencoder, LatentScale

FORMAT = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingDefaults:
    """What a request gets where it says nothing."""

    sampler: str
    steps: int
    guidance_scale: float


@dataclasses.dataclass(kw_only=True)
class Model:
    """A model folder, loaded."""

    digest: str
    autoencoder: KLAutoencoder
    scale: LatentScale
    denoiser: build.Denoiser
    objective: ObjectiveConfig
    text_encoder: text.TextEncoder
    defaults: SamplingDefaults
    size: int


def write(
    folder: Path,
    *,
    autoencoder_config: AutoencoderConfig,
    autoencoder_weights: Path,
    scale: LatentScale,
    denoiser_config: DenoiserConfig,
    denoiser_state: Mapping[str, Tensor],
    objective: ObjectiveConfig,
    text_encoder: text.TextEncoder,
    defaults: SamplingDefaults,
    size: int,
) -> None:
    """Write a model folder's files locally, ready for `manifest.publish(kind="model")`."""
    (folder / "text_encoder").mkdir(parents=True)
    for name in text.FILES:
        source = text_encoder.folder / name
        if source.exists():
            shutil.copyfile(source, folder / "text_encoder" / name)
    shutil.copyfile(autoencoder_weights, folder / "autoencoder.safetensors")
    weights.save(folder / "denoiser.safetensors", denoiser_state)
    config: dict[str, Any] = {
        "format": FORMAT,
        "autoencoder": build.as_dict(autoencoder_config) | dataclasses.asdict(scale),
        "denoiser": build.as_dict(denoiser_config),
        "objective": build.as_dict(objective),
        "text_encoder": {"name": text_encoder.name, "fingerprint": text_encoder.fingerprint},
        "sampling": dataclasses.asdict(defaults),
        "size": size,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def load(uri: str) -> Model:
    """Load a model or release folder, every file verified against the manifest.

    Raises InputMissing without a manifest, DigestMismatch for a file that differs, ArtifactError for another format.
    """
    found, files = manifest.fetch_all(uri)
    if found.kind not in ("model", "release"):
        raise ArtifactError(
            f"A model is wanted here, and this is a {found.kind}.", where=uri, mend="Give another path."
        )
    config = json.loads(files["config.json"].read_text())
    if config.get("format") != FORMAT:
        raise ArtifactError(
            f"The model has format {config.get('format')!r}.", where=uri, mend=f"Format {FORMAT} is read here."
        )
    described = dict(config["autoencoder"])
    scale = LatentScale(shift=described.pop("shift"), scale=described.pop("scale"))
    with tempfile.TemporaryDirectory(prefix="latentray-text-") as folder:
        for name in text.FILES:
            if f"text_encoder/{name}" in files:
                shutil.copyfile(files[f"text_encoder/{name}"], Path(folder) / name)
        encoder = text.load(folder, name=config["text_encoder"]["name"])
    return Model(
        digest=found.digest,
        autoencoder=build.autoencoder(
            AutoencoderConfig(**described), weights.read(files["autoencoder.safetensors"]), where=uri
        ),
        scale=scale,
        denoiser=build.denoiser(
            DenoiserConfig(**config["denoiser"]), weights.read(files["denoiser.safetensors"]), where=uri
        ),
        objective=ObjectiveConfig(**config["objective"]),
        text_encoder=encoder,
        defaults=SamplingDefaults(**config["sampling"]),
        size=config["size"],
    )
