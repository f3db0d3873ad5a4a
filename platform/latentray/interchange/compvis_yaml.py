"""The configuration beside a single file: what CompVis' and Stability's YAML says that the weights' shapes do not."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from latentray.config.autoencoder import AutoencoderConfig
from latentray.config.denoiser import DenoiserConfig
from latentray.errors import ConfigError
from latentray.interchange.layouts import Pipeline

_BETAS = (0.00085, 0.012)
_PREDICTIONS = {"eps": "epsilon", "v": "v", "x0": "x0"}
_SCALINGS = {"EpsScaling": "epsilon", "VScaling": "v"}
_SIZES = {"original_size_as_tuple": 2, "crop_coords_top_left": 2, "target_size_as_tuple": 2, "aesthetic_score": 1}
"""SDXL's conditions besides text -> how many numbers each is."""
_DEFAULT_RESOLUTION = 256
"""Of the autoencoder in every published YAML; that of SD 2 with v-prediction says image_size 64 of a model for 768 pixels."""
_EMPTY = "legacy_ucg_value"
"""sgm's word for what a dropped caption is replaced by; without it, its embedding is multiplied by zero."""
_EMBEDDER = "sgm.modules.encoders.modules."
_UNET = "ldm.modules.diffusionmodules.openaimodel"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Told:
    """What a YAML says; None where it says nothing."""

    heads: int | None = None
    head_dim: int | None = None
    size_numbers: int | None = None
    size_width: int | None = None
    prediction: str | None = None
    timesteps: int | None = None
    scale: float | None = None
    latent_size: int | None = None
    zero_when_empty: bool | None = None


def beside(path: Path) -> Path | None:
    """The YAML that belongs to a single file by its name."""
    found = [path.with_suffix(suffix) for suffix in (".yaml", ".yml") if path.with_suffix(suffix).is_file()]
    return found[0] if found else None


def read(path: Path) -> Told:
    """Read a YAML of LDM's form (SD 1, SD 2) or of sgm's (SDXL).

    Raises ConfigError for one that is neither, and for noise other than Stable Diffusion's.
    """
    try:
        params = yaml.safe_load(path.read_bytes())["model"]["params"]
        network = (params.get("unet_config") or params["network_config"])["params"]
    except (yaml.YAMLError, KeyError, TypeError, AttributeError):
        raise ConfigError(
            "It is no configuration of CompVis' or Stability's form: it has no model.params.unet_config or network_config.",
            where=str(path),
            mend="Give the model's own YAML, or none where the weights' shapes are enough.",
        ) from None
    for key, wanted in zip(("linear_start", "linear_end"), _BETAS, strict=True):
        if float(params.get(key, wanted)) != wanted:
            raise ConfigError(
                f"{key} is {params[key]}: no schedule here has that.",
                where=f"{path}: model.params.{key}",
                mend=f"{wanted} is.",
            )
    numbers, width = _sizes(params)
    prediction = _prediction(params, path)
    denoiser = (params.get("denoiser_config") or {}).get("params") or {}
    return Told(
        heads=_positive(network.get("num_heads")) if not _positive(network.get("num_head_channels")) else None,
        head_dim=_positive(network.get("num_head_channels")),
        size_numbers=numbers,
        size_width=width,
        prediction=prediction,
        timesteps=params.get("timesteps", denoiser.get("num_idx")),
        scale=None if params.get("scale_factor") is None else float(params["scale_factor"]),
        latent_size=None
        if prediction == "v" and _resolution(params) == _DEFAULT_RESOLUTION
        else params.get("image_size"),
        zero_when_empty=False if any(_EMPTY in one for one in _embedders_of(params)) else None,
    )


def write(pipeline: Pipeline) -> str:
    """The YAML of a pipeline of SD 1, SD 2 or SDXL. Raises ConfigError for what its form cannot say."""
    objective, config = pipeline.objective, pipeline.denoiser
    if objective.schedule != "scaled_linear":
        raise _unsayable("objective.schedule", objective.schedule)
    network = _network(config)
    autoencoder = _first_stage(pipeline.autoencoder, pipeline.size)
    params: dict[str, Any] = {"scale_factor": pipeline.scale.scale}
    if not config.size_numbers:
        short = {ours: theirs for theirs, ours in _PREDICTIONS.items()}
        plain = config.in_channels == config.out_channels
        params |= {
            "parameterization": short[objective.prediction],
            "linear_start": _BETAS[0],
            "linear_end": _BETAS[1],
            "timesteps": objective.timesteps,
            "image_size": pipeline.size // pipeline.autoencoder.downsampling,
            "channels": config.out_channels,
            "first_stage_key": "jpg",
            "cond_stage_key": "txt",
            "conditioning_key": "crossattn" if plain else "hybrid",
            "use_ema": False,
            "unet_config": _made(f"{_UNET}.UNetModel", network),
            "first_stage_config": _made("ldm.models.autoencoder.AutoencoderKL", autoencoder),
            "cond_stage_config": _cond_stage(pipeline),
        }
        name = "ldm.models.diffusion.ddpm.LatentDiffusion"
        name = name if plain else "ldm.models.diffusion.ddpm.LatentInpaintDiffusion"
        return yaml.safe_dump({"model": _made(name, params)}, sort_keys=False)
    scalings = {ours: theirs for theirs, ours in _SCALINGS.items()}
    if objective.prediction not in scalings:
        raise _unsayable("objective.prediction", objective.prediction)
    if pipeline.zero_when_empty and config.size_numbers == 5:
        # The refiner's published YAML says as little of it as the base's, and the refiner reads the empty caption.
        raise _unsayable("stage.zero_when_dropped", True)
    network |= {"adm_in_channels": (config.pooled_width or 0) + config.size_numbers * config.size_width}
    network |= {"num_classes": "sequential"}
    denoiser = {
        "num_idx": objective.timesteps,
        "scaling_config": {"target": f"sgm.modules.diffusionmodules.denoiser_scaling.{scalings[objective.prediction]}"},
        "discretization_config": {"target": "sgm.modules.diffusionmodules.discretizer.LegacyDDPMDiscretization"},
    }
    params |= {
        "disable_first_stage_autocast": True,
        "denoiser_config": _made("sgm.modules.diffusionmodules.denoiser.DiscreteDenoiser", denoiser),
        "network_config": _made("sgm.modules.diffusionmodules.openaimodel.UNetModel", network),
        "conditioner_config": _made("sgm.modules.GeneralConditioner", {"emb_models": _embedders(pipeline)}),
        "first_stage_config": _made("sgm.models.autoencoder.AutoencoderKL", autoencoder),
    }
    return yaml.safe_dump({"model": _made("sgm.models.diffusion.DiffusionEngine", params)}, sort_keys=False)


def _made(target: str, params: Mapping[str, Any]) -> dict[str, Any]:
    return {"target": target, "params": dict(params)}


def _network(config: DenoiserConfig) -> dict[str, Any]:
    if config.depth[-1] not in (0, config.middle_depth) or not config.middle_depth:
        raise _unsayable("denoiser.middle_depth", config.middle_depth)
    depths = [*(max(depth, 1) for depth in config.depth[:-1]), config.middle_depth]
    uniform = {depth for depth in (*config.depth, config.middle_depth) if depth}
    if len(uniform) > 1 and not config.size_numbers:  # LDM's own code knows one depth
        raise _unsayable("denoiser.depth", config.depth)
    return {
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "model_channels": config.channels[0],
        "channel_mult": [_multiple(width, config.channels[0]) for width in config.channels],
        "num_res_blocks": config.blocks,
        "attention_resolutions": [2**level for level, depth in enumerate(config.depth) if depth],
        "use_spatial_transformer": True,
        "transformer_depth": uniform.pop() if len(uniform) == 1 else depths,
        "context_dim": config.context_width,
        "use_linear_in_transformer": config.linear_projection,
        "legacy": False,
        **({"num_head_channels": config.head_dim} if config.head_dim else {"num_heads": config.heads}),
    }


def _first_stage(config: AutoencoderConfig, size: int) -> dict[str, Any]:
    for field in ("attention", "quant_convolutions"):
        if not getattr(config, field):
            raise _unsayable(f"autoencoder.{field}", False)
    layout = {
        "double_z": True,
        "z_channels": config.latent_channels,
        "resolution": size,
        "in_channels": config.in_channels,
        "out_ch": config.in_channels,
        "ch": config.channels[0],
        "ch_mult": [_multiple(width, config.channels[0]) for width in config.channels],
        "num_res_blocks": config.blocks,
        "attn_resolutions": [],
        "dropout": 0.0,
    }
    return {"embed_dim": config.latent_channels, "ddconfig": layout, "lossconfig": {"target": "torch.nn.Identity"}}


def _cond_stage(pipeline: Pipeline) -> dict[str, Any]:
    if pipeline.encoders[0].described.get("hidden_act", "quick_gelu") == "quick_gelu":
        return {"target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder"}
    return _made("ldm.modules.encoders.modules.FrozenOpenCLIPEmbedder", {"freeze": True, "layer": "penultimate"})


def _embedders(pipeline: Pipeline) -> list[dict[str, Any]]:
    """SDXL's conditions: its text encoders, then the numbers that say a size."""
    config = pipeline.denoiser
    clip = _made(f"{_EMBEDDER}FrozenCLIPEmbedder", {"layer": "hidden", "layer_idx": 11})
    large = {"arch": "ViT-bigG-14", "layer": "penultimate", "always_return_pooled": True, "legacy": False}
    found = [_made(f"{_EMBEDDER}FrozenOpenCLIPEmbedder2", large)]
    if len(pipeline.encoders) == 2:
        found.insert(0, clip)
    dropped = {} if pipeline.zero_when_empty else {_EMPTY: ""}
    found = [{"input_key": "txt", **dropped, **one} for one in found]
    names = ["original_size_as_tuple", "crop_coords_top_left"]
    names.append("aesthetic_score" if config.size_numbers == 5 else "target_size_as_tuple")
    numbers = _made(f"{_EMBEDDER}ConcatTimestepEmbedderND", {"outdim": config.size_width})
    return found + [{"input_key": name, **numbers} for name in names]


def _sizes(params: Mapping[str, Any]) -> tuple[int | None, int | None]:
    told = [one for one in _embedders_of(params) if one.get("input_key") in _SIZES]
    if not told:
        return None, None
    return sum(_SIZES[one["input_key"]] for one in told), int(told[0]["params"]["outdim"])


def _embedders_of(params: Mapping[str, Any]) -> list[dict[str, Any]]:
    conditioner = params.get("conditioner_config") or {}
    return (conditioner.get("params") or {}).get("emb_models") or []


def _prediction(params: Mapping[str, Any], path: Path) -> str | None:
    if "denoiser_config" in params:
        scaling = ((params["denoiser_config"].get("params") or {}).get("scaling_config") or {}).get("target", "")
        name = scaling.rsplit(".", 1)[-1]
        if not name:
            return None
        known, found = _SCALINGS, _SCALINGS.get(name)
    else:
        name = params.get("parameterization", "eps")
        known, found = _PREDICTIONS, _PREDICTIONS.get(name)
    if found is None:
        raise ConfigError(f"The prediction {name!r} is not known.", where=str(path), mend=f"Known: {', '.join(known)}.")
    return found


def _resolution(params: Mapping[str, Any]) -> int | None:
    first_stage = (params.get("first_stage_config") or {}).get("params") or {}
    return (first_stage.get("ddconfig") or {}).get("resolution")


def _positive(value: Any) -> int | None:
    return int(value) if value is not None and int(value) > 0 else None


def _multiple(width: int, base: int) -> int:
    if width % base:
        raise _unsayable("channels", width)
    return width // base


def _unsayable(field: str, value: Any) -> ConfigError:
    return ConfigError(
        f"CompVis' form cannot say {field.rpartition('.')[2]}={value!r}.",
        where=field,
        mend="Hand it out in diffusers' layout: to=diffusers.",
    )
