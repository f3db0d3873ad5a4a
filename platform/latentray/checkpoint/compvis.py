"""Networks in CompVis' layout and back: U-Net, KL autoencoder and OpenCLIP's text model, each without its prefix.

A file of this layout says no configuration: widths, depths and projections follow from the shapes, and what shapes do not
tell (attention heads) from the published models' rule. A state dict is renamed, split and joined, never computed on.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from latentray.checkpoint import compvis_names
from latentray.checkpoint.foreign_layout import State, renamed
from latentray.config.autoencoder import AutoencoderConfig
from latentray.config.denoiser import DenoiserConfig
from latentray.errors import ArtifactError, ConfigError

GROUPS = 32
"""Of every GroupNorm: CompVis' code has no setting for it."""
_SD1_HEADS, _HEAD_DIM = 8, 64
_SDXL_POOLED_WIDTH = 1280


def read_unet(
    state: Mapping[str, Tensor],
    *,
    heads: int | None = None,
    head_dim: int | None = None,
    size_numbers: int | None = None,
    size_width: int = 256,
) -> tuple[DenoiserConfig, State]:
    """A U-Net's configuration, from its shapes, and its weights under our names.

    Args:
        heads, head_dim: what a configuration beside the file says; else 8 heads where SD 1's convolutions project into the
            transformers, and heads 64 wide where linear layers do (SD 2, SDXL).
        size_numbers, size_width: the same of SDXL's numbers; else 5 where that leaves a pooled text 1280 wide, or 6.

    Raises ArtifactError naming the weight that no U-Net of SD 1, SD 2 or SDXL has, or that is missing.
    """
    downs = sorted(_numbers(state, r"input_blocks\.(\d+)\.0\.op\.weight"))
    count = max(_numbers(state, r"input_blocks\.(\d+)\.0\."), default=0)
    blocks = downs[0] - 1 if downs else count
    firsts = [level * (blocks + 1) + 1 for level in range(len(downs) + 1)]
    channels = [_shape(state, f"input_blocks.{first}.0.out_layers.3.weight")[0] for first in firsts]
    depth = [_depth(state, f"input_blocks.{first}.1") for first in firsts]
    middle = _depth(state, "middle_block.1")
    projections = [key for key in state if key.endswith(".proj_in.weight")]
    linear = bool(projections) and state[projections[0]].ndim == 2
    if heads is None and head_dim is None:
        heads, head_dim = (None, _HEAD_DIM) if linear else (_SD1_HEADS, None)
    config = DenoiserConfig(
        in_channels=_shape(state, "input_blocks.0.0.weight")[1],
        out_channels=_shape(state, "out.2.weight")[0],
        channels=channels,
        blocks=blocks,
        depth=depth,
        middle_depth=middle,
        linear_projection=linear,
        groups=GROUPS,
        heads=heads,
        head_dim=head_dim,
        context_width=_context_width(state),
        classes=None if "label_emb.weight" not in state else _shape(state, "label_emb.weight")[0] - 1,
        **_added(state, size_numbers, size_width),
    )
    ours = {theirs: one for one, theirs in compvis_names.of_unet(config)}
    return config, renamed(state, ours)


def write_unet(config: DenoiserConfig, state: Mapping[str, Tensor]) -> State:
    """The inverse of `read_unet`. Raises ConfigError for a U-Net that CompVis' code does not build."""
    _require_groups("denoiser.groups", config.groups)
    if config.family != "unet" or config.level_heads is not None:
        field = "family" if config.family != "unet" else "level_heads"
        raise ConfigError(
            "CompVis' layout holds U-Nets with one number of heads, or one width of them.",
            where=f"denoiser.{field}",
            mend="Hand it out in diffusers' layout: to=diffusers.",
        )
    return renamed(state, dict(compvis_names.of_unet(config)))


def read_autoencoder(state: Mapping[str, Tensor]) -> tuple[AutoencoderConfig, State]:
    """A KL autoencoder's configuration, from its shapes, and its weights under our names. Raises as `read_unet` does."""
    levels = max(_numbers(state, r"encoder\.down\.(\d+)\."), default=-1) + 1
    config = AutoencoderConfig(
        in_channels=_shape(state, "encoder.conv_in.weight")[1],
        latent_channels=_shape(state, "decoder.conv_in.weight")[1],
        channels=[_shape(state, f"encoder.down.{level}.block.0.conv1.weight")[0] for level in range(levels)],
        blocks=max(_numbers(state, r"encoder\.down\.0\.block\.(\d+)\."), default=0) + 1,
        attention="encoder.mid.attn_1.q.weight" in state,
        groups=GROUPS,
        quant_convolutions="quant_conv.weight" in state,
    )
    ours = {theirs: one for one, theirs in compvis_names.of_autoencoder(config)}
    out = renamed(state, ours)
    return config, {
        key: value.flatten(1) if ".attn.to_" in key and value.ndim == 4 else value for key, value in out.items()
    }


def write_autoencoder(config: AutoencoderConfig, state: Mapping[str, Tensor]) -> State:
    """The inverse of `read_autoencoder`. Raises ConfigError for one that CompVis' code does not build."""
    _require_groups("autoencoder.groups", config.groups)
    for field, wanted in (("kind", "kl"), ("patch", 1)):
        if getattr(config, field) != wanted:
            raise ConfigError(
                f"CompVis' layout holds autoencoders with {field}={wanted}.",
                where=f"autoencoder.{field}",
                mend="Train with that to hand it out.",
            )
    wide = {
        key: value[:, :, None, None] if ".attn.to_" in key and key.endswith("weight") else value
        for key, value in state.items()
    }
    return renamed(wide, dict(compvis_names.of_autoencoder(config)))


def clip_from_open_clip(state: Mapping[str, Tensor], *, drop_last: bool = False) -> State:
    """OpenCLIP's text model under the names of transformers' CLIPTextModelWithProjection.

    Args:
        drop_last: leave out the last layer, and the projection behind it: SD 2 never ran them.

    Raises ArtifactError naming a weight that is none of a text model's.
    """
    out: State = {}
    single = {theirs: ours for ours, theirs in compvis_names.OPEN_CLIP.items()}
    parts = {theirs: ours for ours, theirs in compvis_names.OPEN_CLIP_LAYER.items()}
    last = max(_numbers(state, r"transformer\.resblocks\.(\d+)\."), default=-1)
    for key, value in state.items():
        found = re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+?)[._](weight|bias)", key)
        if key in single:
            out[single[key]] = value
        elif key == "text_projection":
            if not drop_last:
                out["text_projection.weight"] = value.T
        elif found is None:
            raise _misplaced(key)
        elif int(found[1]) < last or not drop_last:
            layer = f"text_model.encoder.layers.{found[1]}"
            if found[2] == "attn.in_proj":
                for name, part in zip("qkv", value.chunk(3), strict=True):
                    out[f"{layer}.self_attn.{name}_proj.{found[3]}"] = part
            elif found[2] in parts:
                out[f"{layer}.{parts[found[2]]}.{found[3]}"] = value
            else:
                raise _misplaced(key)
    return out


def open_clip_from_clip(state: Mapping[str, Tensor]) -> State:
    """The inverse of `clip_from_open_clip`."""
    out: State = {}
    fused: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        found = re.fullmatch(r"text_model\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", key)
        if key in compvis_names.OPEN_CLIP:
            out[compvis_names.OPEN_CLIP[key]] = value
        elif key == "text_projection.weight":
            out["text_projection"] = value.T
        elif found is None:
            raise _misplaced(key)
        elif found[2].startswith("self_attn.") and found[2][10] in "qkv" and found[2][11:] == "_proj":
            name = f"transformer.resblocks.{found[1]}.attn.in_proj_{found[3]}"
            fused.setdefault(name, {})[found[2][10]] = value
        elif found[2] in compvis_names.OPEN_CLIP_LAYER:
            part = compvis_names.OPEN_CLIP_LAYER[found[2]]
            out[f"transformer.resblocks.{found[1]}.{part}.{found[3]}"] = value
        else:
            raise _misplaced(key)
    return out | {name: torch.cat([parts[one] for one in "qkv"]) for name, parts in fused.items()}


def averaged(state: Mapping[str, Tensor]) -> State:
    """The state dict with the averages that CompVis' trainer keeps in place of the U-Net's weights, where it holds them."""
    out = {key: value for key, value in state.items() if not key.startswith(compvis_names.EMA_PREFIX)}
    for key in out:
        if key.startswith("model."):
            out[key] = state.get(compvis_names.ema_name(key), out[key])
    return out


def _numbers(state: Mapping[str, Tensor], pattern: str) -> set[int]:
    found = (re.match(pattern, key) for key in state)
    return {int(one[1]) for one in found if one}


def _depth(state: Mapping[str, Tensor], prefix: str) -> int:
    return max(_numbers(state, re.escape(prefix) + r"\.transformer_blocks\.(\d+)\."), default=-1) + 1


def _shape(state: Mapping[str, Tensor], key: str) -> torch.Size:
    if key not in state:
        raise ArtifactError(
            "A weight that such a network has is missing.",
            where=key,
            mend="Give a whole checkpoint of SD 1, SD 2 or SDXL, or the pipeline's folder in diffusers' layout.",
        )
    return state[key].shape


def _context_width(state: Mapping[str, Tensor]) -> int | None:
    """None where the cross-attention is as wide as each level: it is self-attention then."""
    widths = [tuple(value.shape) for key, value in state.items() if key.endswith(".attn2.to_k.weight")]
    if len({tokens for _, tokens in widths}) > 1 and all(width == tokens for width, tokens in widths):
        return None
    return widths[0][1] if widths else None


def _added(state: Mapping[str, Tensor], size_numbers: int | None, size_width: int) -> dict[str, Any]:
    if "label_emb.0.0.weight" not in state:
        return {}
    total = _shape(state, "label_emb.0.0.weight")[1]
    if size_numbers is None:
        size_numbers = 5 if total - 5 * size_width == _SDXL_POOLED_WIDTH else 6
    return {"pooled_width": total - size_numbers * size_width, "size_numbers": size_numbers, "size_width": size_width}


def _require_groups(field: str, groups: int) -> None:
    if groups != GROUPS:
        raise ConfigError(
            f"CompVis' layout has {GROUPS} groups in every GroupNorm, and these are {groups}.",
            where=field,
            mend="Hand it out in diffusers' layout: to=diffusers.",
        )


def _misplaced(key: str) -> ArtifactError:
    return ArtifactError("A weight has no place in a text model.", where=key, mend="Give a checkpoint of SD 2 or SDXL.")
