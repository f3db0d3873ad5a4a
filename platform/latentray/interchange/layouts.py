"""The pipelines that are exchanged: which parts each has, which of our configurations it is, and diffusers' names for it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from latentray.checkpoint.foreign_layout import State
from latentray.checkpoint.schedulers import Solver
from latentray.conditioning.text import Reading
from latentray.config.autoencoder import AutoencoderConfig
from latentray.config.denoiser import DenoiserConfig
from latentray.config.objective import ObjectiveConfig
from latentray.errors import ConfigError
from latentray.interchange.encoders import Encoder
from latentray.models.autoencoder import LatentScale


@dataclasses.dataclass(frozen=True, kw_only=True)
class Slot:
    """One text encoder of a pipeline."""

    name: str
    """In a model folder."""
    model: str
    """In diffusers' folder, as the tokenizer's name."""
    tokenizer: str
    reading: Reading


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """A kind of pipeline."""

    name: str
    denoiser: str
    """Its folder in diffusers' layout: unet or transformer."""
    slots: tuple[Slot, ...]
    combine: str
    """How the denoiser combines its text encoders, as DenoiserConfig says it."""
    pipeline: str
    """diffusers' class that draws from text, and of the one that paints into a picture:"""
    inpainting: str
    steps: int
    """diffusers' defaults, which a model that came without its own gets."""
    guidance_scale: float


@dataclasses.dataclass(kw_only=True, eq=False)
class Pipeline:
    """A whole pipeline: typed configurations and state dicts, of which `build` makes the networks."""

    layout: Layout
    denoiser: DenoiserConfig
    denoiser_state: State
    autoencoder: AutoencoderConfig
    autoencoder_state: State
    scale: LatentScale
    encoders: tuple[Encoder, ...]
    objective: ObjectiveConfig
    solver: Solver
    size: int
    """Native height and width in pixels."""

    @property
    def paints(self) -> bool:
        """Whether the denoiser sees a mask and the masked picture beside its latent."""
        return self.denoiser.in_channels == 2 * self.autoencoder.latent_channels + 1

    @property
    def bytes(self) -> int:
        """Of all weights."""
        states = (self.denoiser_state, self.autoencoder_state, *(one.state for one in self.encoders))
        return sum(value.nbytes for state in states for value in state.values())


_INNER = Reading(kind="clip_projection", layer=2)
_SECOND = Slot(name="open_clip", model="text_encoder_2", tokenizer="tokenizer_2", reading=_INNER)


def _first(reading: Reading) -> Slot:
    return Slot(name="clip", model="text_encoder", tokenizer="tokenizer", reading=reading)


LAYOUTS = {
    "sd": Layout(
        name="sd", denoiser="unet", slots=(_first(Reading()),), combine="one", pipeline="StableDiffusionPipeline",
        inpainting="StableDiffusionInpaintPipeline", steps=50, guidance_scale=7.5,
    ),
    "sdxl": Layout(
        name="sdxl", denoiser="unet", slots=(_first(Reading(layer=2)), _SECOND), combine="sdxl",
        pipeline="StableDiffusionXLPipeline", inpainting="StableDiffusionXLInpaintPipeline", steps=50,
        guidance_scale=5.0,
    ),
    "sdxl_refiner": Layout(
        name="sdxl_refiner", denoiser="unet", slots=(_SECOND,), combine="one",
        pipeline="StableDiffusionXLImg2ImgPipeline", inpainting="", steps=50, guidance_scale=5.0,
    ),
    "sd3": Layout(
        name="sd3", denoiser="transformer",
        slots=(
            _first(_INNER), _SECOND,
            Slot(name="t5", model="text_encoder_3", tokenizer="tokenizer_3", reading=Reading(kind="t5")),
        ),
        combine="sd3", pipeline="StableDiffusion3Pipeline", inpainting="", steps=28, guidance_scale=7.0,
    ),
}  # fmt: skip
"""SD 1 and SD 2, SDXL and its refiner, SD 3 and SD 3.5."""

_BY_SIZE_NUMBERS = {0: "sd", 6: "sdxl", 5: "sdxl_refiner"}
_BY_CLASS = {
    "StableDiffusionPipeline": "sd", "StableDiffusionImg2ImgPipeline": "sd", "StableDiffusionInpaintPipeline": "sd",
    "StableDiffusionXLPipeline": "sdxl", "StableDiffusionXLImg2ImgPipeline": "sdxl",
    "StableDiffusionXLInpaintPipeline": "sdxl", "StableDiffusion3Pipeline": "sd3",
    "StableDiffusion3Img2ImgPipeline": "sd3", "StableDiffusion3InpaintPipeline": "sd3",
}  # fmt: skip


def of_index(index: Mapping[str, Any], *, where: str) -> Layout:
    """The layout of a model_index.json. Raises ConfigError for a pipeline that is not exchanged, or that lacks a part."""
    name = index.get("_class_name")
    if name not in _BY_CLASS:
        raise ConfigError(
            f"The pipeline {name!r} is not known here.", where=where, mend=f"Known: {', '.join(sorted(_BY_CLASS))}."
        )
    layout = LAYOUTS[_BY_CLASS[name]]
    if layout.name == "sdxl" and not _has(index, "text_encoder"):
        layout = LAYOUTS["sdxl_refiner"]
    wanted = [layout.denoiser, "vae", "scheduler"]
    wanted += [part for slot in layout.slots for part in (slot.model, slot.tokenizer)]
    for part in wanted:
        if not _has(index, part):
            raise ConfigError(
                f"The pipeline has no {part}.", where=where, mend="Give the whole pipeline, with all its text encoders."
            )
    return layout


def of_model(config: DenoiserConfig, readings: Sequence[Reading]) -> Layout:
    """The layout that a model is handed out in. Raises ConfigError naming the setting that no pipeline has."""
    if config.family == "mmdit":
        layout = LAYOUTS["sd3"]
    elif config.family != "unet" or config.classes is not None or config.context_width is None:
        field = "family" if config.family != "unet" else "classes" if config.classes is not None else "context_width"
        raise _no_pipeline(f"denoiser.{field}", getattr(config, field))
    elif config.size_numbers not in _BY_SIZE_NUMBERS:
        raise _no_pipeline("denoiser.size_numbers", config.size_numbers)
    else:
        layout = LAYOUTS[_BY_SIZE_NUMBERS[config.size_numbers]]
    if config.combine != layout.combine:
        raise _no_pipeline("denoiser.combine", config.combine)
    if (config.pooled_width is None) != (layout.name == "sd"):
        raise _no_pipeline("denoiser.pooled_width", config.pooled_width)
    wanted = [_essence(slot.reading) for slot in layout.slots]
    found = [_essence(one) for one in readings]
    if found != wanted:
        raise ConfigError(
            f"Its text encoders are {_said(found)}; a {layout.pipeline} reads {_said(wanted)}.",
            where="text_encoders",
            mend="Train with such encoders to hand it out.",
        )
    return layout


def class_of(pipeline: Pipeline) -> str:
    """diffusers' class for it. Raises ConfigError for channels that none of them reads."""
    layout, channels = pipeline.layout, pipeline.denoiser.in_channels
    if channels == pipeline.autoencoder.latent_channels:
        return layout.pipeline
    if pipeline.paints and layout.inpainting:
        return layout.inpainting
    raise _no_pipeline("denoiser.in_channels", channels)


def _has(index: Mapping[str, Any], part: str) -> bool:
    named = index.get(part)
    return isinstance(named, list) and bool(named) and named[-1] is not None


def _essence(reading: Reading) -> tuple[str, int]:
    return reading.kind, reading.layer


def _said(readings: Sequence[tuple[str, int]]) -> str:
    return ", ".join(f"{kind} (layer {layer})" for kind, layer in readings) or "none"


def _no_pipeline(field: str, value: Any) -> ConfigError:
    return ConfigError(
        f"diffusers has no pipeline for a model with {field}={value!r}.",
        where=field,
        mend="Those of SD 1, SD 2, SDXL, its refiner and SD 3 can be handed out.",
    )
