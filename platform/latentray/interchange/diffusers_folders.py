"""A pipeline's folder in diffusers' layout, read and written without diffusers.

>>> pipeline = from_diffusers("stabilityai/stable-diffusion-xl-base-1.0")
>>> to_diffusers("runs/my-model/model", "exported/my-model")
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from latentray.checkpoint import interop_autoencoders, interop_denoisers, schedulers
from latentray.checkpoint.foreign_layout import State
from latentray.config.denoiser import DenoiserConfig
from latentray.errors import ConfigError, InputMissing
from latentray.interchange import diffusers_autoencoders, encoders, fitting, folders, layouts
from latentray.interchange.encoders import Encoder
from latentray.interchange.layouts import Layout, Pipeline
from latentray.models.autoencoder import LatentScale

_VERSION = "0.30.0"
"""Of diffusers, whose settings are written."""
_NOT_OURS = ("safety_checker", "feature_extractor", "image_encoder")
_ZEROS = "force_zeros_for_empty_prompt"
"""SDXL's: whether zeros stand for a negative prompt that is not given. diffusers takes it for true where nothing is said."""
_UNFIT = {
    "unet": ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"),
    "transformer": ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler"),
}
"""Schedulers that a pipeline cannot draw with: a U-Net's asks them for `init_noise_sigma`, which those of flow matching lack;
SD 3's does not scale what its network reads, as Euler's and Heun's want."""
_DENOISER_CLASSES = {"unet": "UNet2DConditionModel", "transformer": "SD3Transformer2DModel"}


def from_diffusers(source: str, *, variant: str | None = None) -> Pipeline:
    """Read a whole pipeline of SD 1, SD 2, SDXL (base or refiner), SD 3 or SD 3.5.

    Args:
        source: a folder, its URI, or a hub id `owner/name`, with `@revision` behind it where one is meant.
        variant: of the weights' files, such as fp16; None for those without.

    A safety checker is left out. Raises ConfigError naming what cannot be said here (the pipeline's class, a setting of a
    network or of the scheduler, pickled weights, widths that do not go together), InputMissing for a part that is not
    there, ArtifactError for weights of another shape than their configuration's.
    """
    return read(folders.local(source, variant=variant), variant=variant, where=source)


def read(folder: Path, *, variant: str | None = None, where: str) -> Pipeline:
    """The same of a local folder; errors name `where` it came from."""
    if not (folder / folders.INDEX).is_file():
        raise InputMissing(
            f"It holds no {folders.INDEX}.",
            where=where,
            mend="Give the folder of a whole pipeline in diffusers' layout, or a single file of CompVis' layout.",
        )
    index = folders.read_json(folder / folders.INDEX)
    layout = layouts.of_index(index, where=f"{where}/{folders.INDEX}")
    objective, solver = schedulers.from_diffusers(folders.read_json(folder / "scheduler" / "scheduler_config.json"))
    described = folders.read_json(folder / layout.denoiser / "config.json")
    denoiser, denoiser_state = _read_denoiser(layout, described, _weights(folder, layout.denoiser, variant))
    autoencoder = diffusers_autoencoders.of_pipeline(folder, layout, variant=variant)
    pipeline = Pipeline(
        layout=layout,
        denoiser=denoiser,
        denoiser_state=denoiser_state,
        autoencoder=autoencoder.config,
        autoencoder_state=autoencoder.state,
        scale=LatentScale(shift=autoencoder.shift, scale=autoencoder.scale),
        encoders=tuple(_read_encoder(folder, slot, variant) for slot in layout.slots),
        objective=objective,
        solver=solver,
        size=autoencoder.size,
        zero_when_empty=layout.may_zero and bool(index.get(_ZEROS, True)),
    )
    fitting.require(pipeline, where=where)
    return pipeline


def write(pipeline: Pipeline, folder: Path, *, sampler: str) -> str:
    """Write a pipeline's files into an empty local folder; return the name of diffusers' class that reads them.

    Args:
        sampler: whose scheduler becomes the pipeline's own.

    Raises ConfigError, before anything is written, for what diffusers has no words for.
    """
    layout = pipeline.layout
    name = layouts.class_of(pipeline)
    scheduler = schedulers.to_diffusers(pipeline.objective, sampler)
    if scheduler["_class_name"] in _UNFIT[layout.denoiser]:
        raise ConfigError(
            f"{name} does not draw with the {scheduler['_class_name']}, which walks as {sampler!r} does.",
            where="sampler",
            mend="Choose dpmpp_2m, say.",
        )
    denoiser, denoiser_state = _described_denoiser(pipeline)
    autoencoder, autoencoder_state = _described_autoencoder(pipeline)
    index: dict[str, Any] = {"_class_name": name, "_diffusers_version": _VERSION}
    index |= {
        "scheduler": ["diffusers", scheduler["_class_name"]],
        layout.denoiser: ["diffusers", denoiser["_class_name"]],
        "vae": ["diffusers", autoencoder["_class_name"]],
    }
    for part, described, state in (
        (layout.denoiser, denoiser, denoiser_state),
        ("vae", autoencoder, autoencoder_state),
    ):
        _write_json(folder / part / "config.json", described)
        encoders.save(folder / part / "diffusion_pytorch_model.safetensors", state)
    _write_json(folder / "scheduler" / "scheduler_config.json", {"_diffusers_version": _VERSION, **scheduler})
    for slot, encoder in zip(layout.slots, pipeline.encoders, strict=True):
        classes = encoders.write_theirs(encoder, folder / slot.model, folder / slot.tokenizer)
        index |= {slot.model: ["transformers", classes[0]], slot.tokenizer: ["transformers", classes[1]]}
    if layout.may_zero:
        index[_ZEROS] = pipeline.zero_when_empty
    _write_json(folder / folders.INDEX, index | _lacking(layout))
    return name


def _lacking(layout: Layout) -> dict[str, Any]:
    """Parts that diffusers' pipelines may have and these do not, and their switches."""
    nothing = [None, None]
    if layout.name == "sd":
        return dict.fromkeys(_NOT_OURS, nothing) | {"requires_safety_checker": False}
    if layout.name == "sdxl":
        return dict.fromkeys(_NOT_OURS[1:], nothing)
    if layout.name == "sdxl_refiner":
        return {"text_encoder": nothing, "tokenizer": nothing, "requires_aesthetics_score": True}
    return {}


def _read_denoiser(
    layout: Layout, described: Mapping[str, Any], state: Mapping[str, Any]
) -> tuple[DenoiserConfig, State]:
    _require_class(described, _DENOISER_CLASSES[layout.denoiser], layout.denoiser)
    if layout.denoiser == "transformer":
        config, ours = interop_denoisers.from_diffusers_mmdit(described, state)
    else:
        numbers = {"sdxl": 6, "sdxl_refiner": 5}.get(layout.name)
        config, ours = interop_denoisers.from_diffusers_unet(described, state, size_numbers=numbers)
    return dataclasses.replace(config, combine=layout.combine), ours


def _described_denoiser(pipeline: Pipeline) -> tuple[dict[str, Any], State]:
    name = _DENOISER_CLASSES[pipeline.layout.denoiser]
    if pipeline.layout.denoiser == "transformer":
        described, state = interop_denoisers.to_diffusers_mmdit(pipeline.denoiser, pipeline.denoiser_state)
    else:
        described, state = interop_denoisers.to_diffusers_unet(pipeline.denoiser, pipeline.denoiser_state)
        described["sample_size"] = pipeline.size // pipeline.autoencoder.downsampling
    return {"_class_name": name, "_diffusers_version": _VERSION} | described, state


def _described_autoencoder(pipeline: Pipeline) -> tuple[dict[str, Any], State]:
    shift, state = pipeline.scale.shift, pipeline.autoencoder_state
    if shift and pipeline.layout.name != "sd3":
        state, shift = interop_autoencoders.without_shift(pipeline.autoencoder, state, shift=shift), 0.0
    described, state = interop_autoencoders.to_diffusers_kl(
        pipeline.autoencoder, state, shift=shift, scale=pipeline.scale.scale, size=pipeline.size
    )
    if pipeline.layout.name == "sd3":  # whose pipeline adds it, whatever it is
        described["shift_factor"] = shift
    return {"_class_name": "AutoencoderKL", "_diffusers_version": _VERSION} | described, state


def _read_encoder(folder: Path, slot: layouts.Slot, variant: str | None) -> Encoder:
    described, state = encoders.canonical(
        folders.read_json(folder / slot.model / "config.json"), _weights(folder, slot.model, variant), slot.reading.kind
    )
    return Encoder(
        name=slot.name, reading=slot.reading, described=described, state=state, tokenizer=folder / slot.tokenizer
    )


def _weights(folder: Path, part: str, variant: str | None) -> State:
    if not (folder / part).is_dir():
        raise InputMissing(f"The pipeline has no {part}.", where=str(folder / part), mend="Complete the download.")
    return folders.read_weights(folder / part, variant=variant)


def _require_class(described: Mapping[str, Any], name: str, part: str) -> None:
    if described.get("_class_name", name) != name:
        raise ConfigError(
            f"The pipeline's {part} is a {described['_class_name']}, and a {name} is read here.",
            where=f"{part}/config.json",
            mend=f"Replace it with a {name}.",
        )


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")
