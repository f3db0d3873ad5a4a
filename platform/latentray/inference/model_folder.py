"""The `model` artifact: everything needed to sample, in one folder of safetensors and JSON.

config.json              architecture, objective, latent scale, sampling defaults, native size
denoiser.safetensors     EMA weights
autoencoder.safetensors  EMA weights
text_encoders/<name>/    config.json, model.safetensors, tokenizer.json, tokenizer_config.json; none without text; of a vision
                         encoder preprocessor_config.json instead of a tokenizer's files, of a tokenizer alone only those
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from latentray import build
from latentray.checkpoint import manifest, weights
from latentray.conditioning import encoders
from latentray.conditioning.encoders import Encoder, Reading
from latentray.config.autoencoder import AutoencoderConfig
from latentray.config.beside import BesideConfig
from latentray.config.denoiser import DenoiserConfig
from latentray.config.objective import ObjectiveConfig
from latentray.errors import ArtifactError
from latentray.models.autoencoder import KLAutoencoder, LatentScale

FORMAT = 2
"""1 had one text encoder, in text_encoder/; it is read too."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingDefaults:
    """What a request gets where it says nothing."""

    sampler: str
    steps: int
    guidance_scale: float
    spacing: str | None = None
    """Which noise levels are visited; None for the schedule's default."""


@dataclasses.dataclass(kw_only=True)
class Model:
    """A model folder, loaded."""

    digest: str
    autoencoder: KLAutoencoder
    scale: LatentScale
    denoiser: build.Denoiser
    objective: ObjectiveConfig
    text_encoders: tuple[Encoder, ...]
    """In the order that the denoiser combines them in."""
    defaults: SamplingDefaults
    size: int
    beside: BesideConfig = dataclasses.field(default_factory=BesideConfig)
    """What the denoiser sees beside its latent."""
    frames: int = 0
    """Of the clips it learnt from; 0 for a model of pictures."""
    fps: float = 0.0
    classes: tuple[str, ...] = ()
    """Names of the class labels, in their order; none where they have no names."""
    zero_when_empty: bool = False
    """Where no negative prompt is given, its embeddings are zeros (SDXL's base), not those of the empty caption."""
    latents: str = ""
    """Fingerprint of the latents that its autoencoder encodes: what a classifier must belong to, too."""


def write(
    folder: Path,
    *,
    autoencoder_config: AutoencoderConfig,
    autoencoder_weights: Path,
    scale: LatentScale,
    denoiser_config: DenoiserConfig,
    denoiser_state: Mapping[str, Tensor],
    objective: ObjectiveConfig,
    text_encoders: Sequence[Encoder],
    defaults: SamplingDefaults,
    size: int,
    beside: BesideConfig | None = None,
    frames: int = 0,
    fps: float = 0.0,
    classes: Sequence[str] = (),
    zero_when_empty: bool = False,
    latents: str | None = None,
) -> None:
    """Write a model folder's files locally, ready for `manifest.publish(kind="model")`.

    Args:
        latents: the fingerprint of what the autoencoder encodes, where it is known and need not be worked out.
    """
    for encoder in text_encoders:
        into = folder / "text_encoders" / encoder.name
        into.mkdir(parents=True)
        for name in encoder.files():
            shutil.copyfile(encoder.folder / name, into / name)
    shutil.copyfile(autoencoder_weights, folder / "autoencoder.safetensors")
    weights.save(folder / "denoiser.safetensors", denoiser_state)
    config: dict[str, Any] = {
        "format": FORMAT,
        "autoencoder": build.as_dict(autoencoder_config) | dataclasses.asdict(scale),
        "denoiser": build.as_dict(denoiser_config),
        "objective": build.as_dict(objective),
        "text_encoders": [
            {"name": one.name, "fingerprint": one.fingerprint} | dataclasses.asdict(one.reading)
            for one in text_encoders
        ],
        "sampling": dataclasses.asdict(defaults),
        "size": size,
        "beside": dataclasses.asdict(beside or BesideConfig()),
        "zero_when_empty": zero_when_empty,
        "latents": latents or build.fingerprint_of(autoencoder_config, weights.read(autoencoder_weights), scale),
    } | ({"frames": frames, "fps": fps} if frames else {})
    if denoiser_config.classes is not None and classes:
        config["classes"] = list(classes)
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
    if config.get("format") not in (1, FORMAT):
        raise ArtifactError(
            f"The model has format {config.get('format')!r}.", where=uri, mend=f"Formats 1 and {FORMAT} are read here."
        )
    if config["denoiser"].get("family") == "video" and not config.get("frames"):
        raise ArtifactError(
            "The model draws clips, and does not say of how many frames.", where=uri, mend="Export it again."
        )
    if "policy" in config:
        raise ArtifactError(
            "The model gives actions and draws nothing.",
            where=uri,
            mend="Ask it for actions: jobs.evaluate suite=policy, or POST /v1/actions.",
        )
    described = dict(config["autoencoder"])
    scale = LatentScale(shift=described.pop("shift"), scale=described.pop("scale"))
    of_autoencoder, state = AutoencoderConfig(**described), weights.read(files["autoencoder.safetensors"])
    listed = config["text_encoders"] if config["format"] == FORMAT else [config["text_encoder"]]
    return Model(
        digest=found.digest,
        autoencoder=build.autoencoder(of_autoencoder, state, where=uri),
        scale=scale,
        denoiser=build.denoiser(
            DenoiserConfig(**config["denoiser"]), weights.read(files["denoiser.safetensors"]), where=uri
        ),
        objective=ObjectiveConfig(**config["objective"]),
        text_encoders=tuple(_text_encoder(one, files) for one in listed),
        defaults=SamplingDefaults(**config["sampling"]),
        size=config["size"],
        beside=BesideConfig(**config.get("beside", {})),
        frames=config.get("frames", 0),
        fps=config.get("fps", 0.0),
        classes=tuple(config.get("classes", ())),
        zero_when_empty=config.get("zero_when_empty", False),
        latents=config.get("latents") or build.fingerprint_of(of_autoencoder, state, scale),
    )


def _text_encoder(described: Mapping[str, Any], files: Mapping[str, Path]) -> Encoder:
    """transformers reads one folder, and cached files of a remote artifact lie in one each."""
    inside = {f"text_encoders/{described['name']}", "text_encoder"}
    with tempfile.TemporaryDirectory(prefix="latentray-text-") as folder:
        for name, path in files.items():
            if name.rpartition("/")[0] in inside:
                shutil.copyfile(path, Path(folder) / Path(name).name)
        reading = {
            field.name: described[field.name] for field in dataclasses.fields(Reading) if field.name in described
        }
        return encoders.load(folder, name=described["name"], reading=Reading(**reading))
