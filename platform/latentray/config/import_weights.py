"""Settings of `python -m jobs.import_weights`."""

from __future__ import annotations

import dataclasses

from latentray.config.bounds import check_guidance
from latentray.errors import ConfigError

PREDICTIONS = ("epsilon", "v")


@dataclasses.dataclass(kw_only=True)
class ImportWeights:
    """A model folder from weights that others made: SD 1, SD 2, SDXL, SD 3."""

    weights: str | None = None
    """A folder in diffusers' layout or a single file of CompVis' (.safetensors, or a .ckpt that holds tensors alone): local, at a
    URI, or on the Hugging Face hub as `owner/name`, `owner/name/file.safetensors`, with `@revision` behind it."""
    out: str | None = None
    """Where the model folder is written."""
    parts: str | None = None
    """Below this folder or URI, autoencoder and text encoders are written as artifacts of their own: what precompute_latents and
    train ask for, to train on."""
    variant: str | None = None
    """diffusers' folders: which of several sets of weights, such as fp16; null for the plain one."""
    yaml: str | None = None
    """Single files: the model's YAML; null takes the one beside the file, or reads the shapes alone."""
    prediction: str | None = None
    """Single files: epsilon or v, where nothing in them says it (SD 2)."""
    ema: bool = True
    """Single files: take the averages of the weights where the file has both."""
    tokenizer: str = "openai/clip-vit-large-patch14"
    """Single files: a folder or hub id of CLIP's tokenizer, which no such file holds."""
    size: int | None = None
    """Native height and width in pixels; null for what the weights' configuration says."""
    sampler: str | None = None
    """The model's default sampler; null for its scheduler's, as for steps and guidance_scale those that are usual for it."""
    steps: int | None = None
    guidance_scale: float | None = None

    def __post_init__(self) -> None:
        for key in ("weights", "out"):
            if not getattr(self, key):
                raise ConfigError("This setting is needed.", where=key, mend=f"Add {key}=<path, URI or hub id>.")
        if self.prediction is not None and self.prediction not in PREDICTIONS:
            raise ConfigError(
                f"There is no prediction {self.prediction!r}.",
                where="prediction",
                mend=f"Known: {', '.join(PREDICTIONS)}.",
            )
        for key in ("size", "steps"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ConfigError(f"{key} is {value}.", where=key, mend="Choose 1 or more.")
        if self.guidance_scale is not None:
            check_guidance(self.guidance_scale)
