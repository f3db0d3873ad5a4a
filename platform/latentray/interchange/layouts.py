"""The pipelines that are exchanged: which parts each has, which of our configurations it is, and diffusers' names for it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from latentray.checkpoint.foreign_layout import State
from latentray.checkpoint.schedulers import Solver
from latentray.conditioning.text import Reading
from latentray.config.autoencoder import AutoencoderConfig
from latentray.config.beside import KINDS, BesideConfig
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
    may_zero: bool = False
    """Whether zeros may stand for a negative prompt that is not given."""


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
    zero_when_empty: bool = False
    """Zeros stand for a negative prompt that is not given."""

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
        guidance_scale=5.0, may_zero=True,
    ),
    "sdxl_refiner": Layout(
        name="sdxl_refiner", denoiser="unet", slots=(_SECOND,), combine="one",
        pipeline="StableDiffusionXLImg2ImgPipeline", inpainting="", steps=50, guidance_scale=5.0, may_zero=True,
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


def known(index: Mapping[str, Any]) -> Layout | None:
    """The layout of a model_index.json by its class alone; None of a pipeline that is not exchanged."""
    name = _BY_CLASS.get(str(index.get("_class_name")))
    return None if name is None else LAYOUTS[name]


def of_model(config: DenoiserConfig, readings: Sequence[Reading]) -> Layout:
    """The layout that a denoiser is handed out in. Raises ConfigError naming the setting that no pipeline has."""
    is_unet = config.family == "unet"
    for refused, field, mend in (
        (not is_unet and config.family != "mmdit", "family", "Denoisers of pictures can be handed out: unet, mmdit."),
        (config.classes is not None, "classes", "Train on captions to hand it out, with denoiser.classes=null."),
        (config.context_width is None, "context_width", "Train on captions to hand it out."),
        (config.context_layers, "context_layers", "Train on a ready text encoder, clip_l say, to hand it out."),
        (is_unet and config.size_numbers not in _BY_SIZE_NUMBERS, "size_numbers",
         f"Pipelines know {', '.join(map(str, _BY_SIZE_NUMBERS))}."),
    ):  # fmt: skip
        if refused:
            raise _no_pipeline(f"denoiser.{field}", getattr(config, field), mend)
    layout = LAYOUTS[_BY_SIZE_NUMBERS[config.size_numbers] if is_unet else "sd3"]
    if config.combine != layout.combine:
        raise _no_pipeline("denoiser.combine", config.combine, f"{layout.pipeline} has {layout.combine}.")
    if (config.pooled_width is None) != (layout.name == "sd"):
        reads = "no pooled text" if layout.name == "sd" else "pooled text"
        raise _no_pipeline("denoiser.pooled_width", config.pooled_width, f"{layout.pipeline} reads {reads}.")
    wanted = [_essence(slot.reading) for slot in layout.slots]
    found = [_essence(one) for one in readings]
    if found != wanted:
        raise ConfigError(
            f"Its text encoders are {_said(found)}; a {layout.pipeline} reads {_said(wanted)}.",
            where="text_encoders",
            mend="Train with such encoders to hand it out.",
        )
    return layout


def require_sayable(
    layout: Layout,
    *,
    denoiser: DenoiserConfig,
    autoencoder: AutoencoderConfig,
    objective: ObjectiveConfig,
    zero_when_empty: bool,
) -> None:
    """Raise ConfigError, naming the setting, for what a pipeline of this layout cannot be told of a model."""
    channels = autoencoder.latent_channels
    more = denoiser.in_channels - channels
    beside = next((kind for kind in KINDS if BesideConfig(kind=kind).channels(channels) == more), None)
    for refused, field, value, mend in (
        (autoencoder.kind != "kl", "autoencoder.kind", autoencoder.kind, "Train in the latents of one of kind kl."),
        (autoencoder.patch != 1, "autoencoder.patch", autoencoder.patch, "Train in the latents of one with patch=1."),
        (objective.learned_variance, "objective.learned_variance", True, "Pipelines draw with none: train without it."),
        (objective.schedule in ("ve", "unnoised"), "objective.schedule", objective.schedule,
         "Pipelines draw from discrete noise levels (scaled_linear, say) or by flow."),
        (beside is None, "denoiser.in_channels", denoiser.in_channels, f"Latents have {channels} channels."),
        (beside == "super_resolution" or (beside == "inpainting" and not layout.inpainting), "beside.kind", beside,
         f"{layout.pipeline} sees nothing beside the latent{', or a mask' if layout.inpainting else ''}."),
        (zero_when_empty and not layout.may_zero, "stage.zero_when_dropped", True,
         f"{layout.pipeline} embeds the empty caption: train on with stage.zero_when_dropped=false."),
    ):  # fmt: skip
        if refused:
            raise _no_pipeline(field, value, mend)


def class_of(pipeline: Pipeline) -> str:
    """diffusers' class for it. Raises ConfigError as `require_sayable` does."""
    require_sayable(
        pipeline.layout,
        denoiser=pipeline.denoiser,
        autoencoder=pipeline.autoencoder,
        objective=pipeline.objective,
        zero_when_empty=pipeline.zero_when_empty,
    )
    return pipeline.layout.inpainting if pipeline.paints else pipeline.layout.pipeline


def _has(index: Mapping[str, Any], part: str) -> bool:
    named = index.get(part)
    return isinstance(named, list) and bool(named) and named[-1] is not None


def _essence(reading: Reading) -> tuple[str, int]:
    return reading.kind, reading.layer


def _said(readings: Sequence[tuple[str, int]]) -> str:
    return ", ".join(f"{kind} (layer {layer})" for kind, layer in readings) or "none"


def _no_pipeline(field: str, value: Any, mend: str) -> ConfigError:
    return ConfigError(
        f"No pipeline of SD 1, SD 2, SDXL, its refiner or SD 3 is of a model with {field}={value!r}.",
        where=field,
        mend=mend,
    )
