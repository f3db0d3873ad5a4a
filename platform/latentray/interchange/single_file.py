"""A whole pipeline in one file of CompVis' layout: SD 1, SD 2, SDXL and its refiner.

>>> pipeline = from_single_file(Path("v1-5-pruned-emaonly.safetensors"), tokenizer="openai/clip-vit-large-patch14")
"""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from latentray.checkpoint import compvis, interop_autoencoders, weights
from latentray.checkpoint.foreign_layout import State
from latentray.checkpoint.schedulers import Solver
from latentray.config.objective import ObjectiveConfig
from latentray.diffusion import schedules
from latentray.errors import ArtifactError, ConfigError
from latentray.interchange import (
    compvis_yaml,
    encoders,
    fitting,
    folders,
    layouts,
    single_file_encoders,
    tokenizer_files,
)
from latentray.interchange.compvis_yaml import Told
from latentray.interchange.layouts import LAYOUTS, Layout, Pipeline
from latentray.interchange.single_file_encoders import IDLE_ENDS, OPEN_CLIP, TRANSFORMERS, below
from latentray.models.autoencoder import LatentScale

TOKENIZER = "openai/clip-vit-large-patch14"
_UNET, _AUTOENCODER = "model.diffusion_model.", "first_stage_model."
_ENCODERS = {
    "sd": ("cond_stage_model.",),
    "sdxl": ("conditioner.embedders.0.", "conditioner.embedders.1."),
    "sdxl_refiner": ("conditioner.embedders.0.",),
}
_SCALES = {"sd": 0.18215, "sdxl": 0.13025, "sdxl_refiner": 0.13025}
_LATENT_SIZES = {"sd": 64, "sdxl": 128, "sdxl_refiner": 128}
_V_LATENT_SIZE = 96
"""Of SD 2 with v-prediction, which was trained at 768 pixels."""
_V, _ZERO_SNR = "v_pred", "ztsnr"
"""Empty tensors by which later checkpoints say what they were trained on."""
_IDLE = (
    "alphas_cumprod", "betas", "denoiser.", "embedding_manager.", "log_one_minus_alphas_cumprod", "logvar", "lvlb_weights",
    "model_ema.", "posterior_", "scale_factor", "sqrt_", "first_stage_model.loss.", _V, _ZERO_SNR,
)  # fmt: skip
"""What such files hold besides weights."""


def from_single_file(
    path: Path,
    *,
    described: Path | None = None,
    prediction: str | None = None,
    tokenizer: str = TOKENIZER,
    ema: bool = True,
) -> Pipeline:
    """Read a checkpoint of SD 1, SD 2, SDXL or its refiner.

    Args:
        path: a .safetensors file, or a .ckpt that holds tensors alone.
        described: its YAML; None for the one beside it, if there is one.
        prediction: epsilon or v, where neither file nor YAML says it: SD 2's weights do not.
        tokenizer: a folder or hub id of CLIP's, which no such file holds.
        ema: take the averages of the U-Net's weights where the file has both.

    Raises ConfigError for a pickle with more than tensors in it, a layout that is not read, a prediction that nobody tells;
    ArtifactError for a weight that has no place, is missing, or has another shape; InputMissing without the tokenizer.
    """
    state = read_file(path)
    yaml_path = described or compvis_yaml.beside(path)
    told = compvis_yaml.read(yaml_path) if yaml_path else Told()
    layout, forms = _layout_of(state, path)
    _require_place(state, (_UNET, _AUTOENCODER, *_ENCODERS[layout.name]), path)
    denoiser, denoiser_state = compvis.read_unet(
        below(compvis.averaged(state) if ema else state, _UNET),
        heads=told.heads,
        head_dim=told.head_dim,
        size_numbers=told.size_numbers or {"sdxl": 6, "sdxl_refiner": 5}.get(layout.name),
        size_width=told.size_width or 256,
    )
    denoiser = dataclasses.replace(denoiser, combine=layout.combine)
    autoencoder, autoencoder_state = compvis.read_autoencoder(
        {key: value for key, value in below(state, _AUTOENCODER).items() if not key.startswith("loss.")}
    )
    is_sd2 = layout.name == "sd" and forms[0] == OPEN_CLIP
    objective = _objective(state, told, prediction, must_be_told=is_sd2, where=path)
    latent_size = told.latent_size or (
        _V_LATENT_SIZE if is_sd2 and objective.prediction == "v" else _LATENT_SIZES[layout.name]
    )
    vocabulary = tokenizer_files.located(tokenizer)
    pipeline = Pipeline(
        layout=layout,
        denoiser=denoiser,
        denoiser_state=denoiser_state,
        autoencoder=autoencoder,
        autoencoder_state=autoencoder_state,
        scale=LatentScale(shift=0.0, scale=told.scale or _SCALES[layout.name]),
        encoders=tuple(
            single_file_encoders.read(below(state, prefix), form, slot, vocabulary)
            for prefix, form, slot in zip(_ENCODERS[layout.name], forms, layout.slots, strict=True)
        ),
        objective=objective,
        solver=Solver(sampler="dpmpp_2m"),
        size=latent_size * autoencoder.downsampling,
        # As SDXL's base was trained, and is drawn with by those who made it; not so its refiner.
        zero_when_empty=layout.name == "sdxl" if told.zero_when_empty is None else told.zero_when_empty,
    )
    fitting.require(pipeline, where=str(path))
    return pipeline


def write(pipeline: Pipeline, path: Path) -> None:
    """Write a pipeline as one file, its YAML beside it, in an empty local folder.

    Raises ConfigError, before anything is written, for what this layout has no words for.
    """
    layout = pipeline.layout
    if layout.name not in _ENCODERS:
        raise ConfigError(
            f"There is no single file of CompVis' layout for {layout.pipeline}.",
            where="to",
            mend="Hand it out in diffusers' layout: to=diffusers.",
        )
    layouts.class_of(pipeline)
    described, autoencoder_state = compvis_yaml.write(pipeline), pipeline.autoencoder_state
    if pipeline.scale.shift:
        autoencoder_state = interop_autoencoders.without_shift(
            pipeline.autoencoder, autoencoder_state, shift=pipeline.scale.shift
        )
    parts = {
        _UNET: compvis.write_unet(pipeline.denoiser, pipeline.denoiser_state),
        _AUTOENCODER: compvis.write_autoencoder(pipeline.autoencoder, autoencoder_state),
    }
    for prefix, encoder in zip(_ENCODERS[layout.name], pipeline.encoders, strict=True):
        under, state = single_file_encoders.written(encoder, layout)
        parts[prefix + under] = state
    whole = {prefix + key: value for prefix, state in parts.items() for key, value in state.items()}
    if pipeline.objective.prediction == "v" and layout.name != "sd":
        whole[_V] = torch.empty(0)
    if pipeline.objective.zero_terminal_snr:
        whole[_ZERO_SNR] = torch.empty(0)
    encoders.save(path, whole)
    path.with_suffix(".yaml").write_text(described)


def read_file(path: Path) -> State:
    """The tensors of a .safetensors file, or of a .ckpt by torch's loader of tensors alone.

    Raises ConfigError for other pickles and for a .ckpt whose reading would run code.
    """
    if path.suffix == ".safetensors":
        return weights.read(path)
    if path.suffix != ".ckpt":
        raise (
            folders.pickled(str(path))
            if path.suffix in folders.PICKLES
            else ConfigError(
                f"{path.suffix or 'A file without a suffix'} is not read.",
                where=str(path),
                mend="Give .safetensors or .ckpt.",
            )
        )
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError):
        raise ConfigError(
            "The .ckpt holds more than tensors, whose reading can run any code, or it is damaged: it is not read.",
            where=str(path),
            mend="Give the .safetensors file of the same model, or convert it in a sandbox first.",
        ) from None
    found = found.get("state_dict", found) if isinstance(found, Mapping) else {}
    return {key: value for key, value in found.items() if isinstance(value, Tensor)}


def _layout_of(state: Mapping[str, Tensor], path: Path) -> tuple[Layout, tuple[tuple[str, str], ...]]:
    """Which pipeline a file holds, and the form of each of its text encoders."""
    for name in ("sdxl", "sdxl_refiner", "sd"):
        forms = []
        for prefix in _ENCODERS[name]:
            here = [one for one in (TRANSFORMERS, OPEN_CLIP) if any(key.startswith(prefix + one[0]) for key in state)]
            forms += here[:1]
        if len(forms) == len(_ENCODERS[name]) and any(key.startswith(_UNET) for key in state):
            return LAYOUTS[name], tuple(forms)
    if any(key.startswith(f"{_UNET}joint_blocks.") for key in state):
        what, mend = "It is a single file of SD 3", "Give SD 3's folder in diffusers' layout."
    else:
        what = f"It is no whole checkpoint of SD 1, SD 2 or SDXL; its first weight is {next(iter(state), 'none')!r}"
        mend = "Give a file with U-Net, autoencoder and text encoder, or a folder in diffusers' layout."
    raise ConfigError(f"{what}.", where=str(path), mend=mend)


def _require_place(state: Mapping[str, Tensor], prefixes: tuple[str, ...], path: Path) -> None:
    strange = [key for key in state if not key.startswith((*prefixes, *_IDLE)) and not key.endswith(IDLE_ENDS)]
    if strange:
        raise ArtifactError(
            f"{strange[0]} belongs to no part of such a pipeline; {len(strange) - 1} more do not.",
            where=str(path),
            mend="Give a checkpoint of SD 1, SD 2 or SDXL.",
        )


def _objective(
    state: Mapping[str, Tensor], told: Told, prediction: str | None, *, must_be_told: bool, where: Path
) -> ObjectiveConfig:
    found = prediction or told.prediction or ("v" if _V in state else None)
    if found is None:
        if must_be_told:
            raise ConfigError(
                "Nothing says what the network predicts: SD 2's file is the same for noise and for v.",
                where=str(where),
                mend="Add prediction=v (SD 2 at 768 pixels) or prediction=epsilon (its base at 512), or its YAML beside it.",
            )
        found = "epsilon"
    objective = ObjectiveConfig(
        schedule="scaled_linear",
        prediction=found,
        timesteps=told.timesteps or 1000,
        zero_terminal_snr=_ZERO_SNR in state,
    )
    table = state.get("alphas_cumprod")
    if table is not None and _ZERO_SNR not in state:
        own = schedules.scaled_linear(objective.timesteps).alphas_cumprod
        if table.shape != own.shape or not torch.allclose(table.double(), own, rtol=1e-3, atol=1e-5):
            raise ConfigError(
                "The file was trained on other noise than Stable Diffusion's.",
                where=f"{where}: alphas_cumprod",
                mend="No schedule here has it.",
            )
    return objective
