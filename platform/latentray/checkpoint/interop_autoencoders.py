"""Autoencoders in diffusers' layout and back: configurations and the names of weights, never the networks themselves.

A state dict is renamed, not computed on, so both ways together change no bit. What diffusers can say and latentray
cannot build, or the other way round, is refused with ConfigError naming the setting.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from latentray.checkpoint import autoencoder_names
from latentray.checkpoint.foreign_layout import Described, State, inexpressible, renamed, require, told, unread
from latentray.config.autoencoder import AutoencoderConfig
from latentray.errors import ArtifactError, ConfigError

_DOWN, _UP = "DownEncoderBlock2D", "UpDecoderBlock2D"
_SHARED: Described = {
    "in_channels": 3, "out_channels": 3, "down_block_types": (_DOWN,), "up_block_types": (_UP,),
    "block_out_channels": (64,), "layers_per_block": 1, "act_fn": "silu", "norm_num_groups": 32, "sample_size": 32,
    "scaling_factor": 0.18215, "mid_block_add_attention": True, "force_upcast": True,
}  # fmt: skip
"""Settings of both classes, with their defaults. `force_upcast` is a pipeline's choice of a type and changes no network."""
_KL: Described = _SHARED | {
    "latent_channels": 4, "shift_factor": None, "latents_mean": None, "latents_std": None, "use_quant_conv": True,
    "use_post_quant_conv": True,
}  # fmt: skip
_VQ: Described = _SHARED | {
    "latent_channels": 3, "num_vq_embeddings": 256, "vq_embed_dim": None, "norm_type": "group",
    "lookup_from_codebook": False, "force_upcast": False,
}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ReadAutoencoder:
    """An autoencoder as another library's folder describes it."""

    config: AutoencoderConfig
    state: State
    shift: float
    scale: float
    """`z = (latent - shift) * scale`, as LatentScale has it."""
    size: int
    """Pixels of the square it was trained on."""


def to_diffusers_kl(
    config: AutoencoderConfig, state: Mapping[str, Tensor], *, shift: float, scale: float, size: int
) -> tuple[Described, State]:
    """Arguments of `diffusers.AutoencoderKL` and its state dict.

    Pipelines of SD 1, SD 2 and SDXL leave diffusers' `shift_factor` out of account: for them, see `without_shift`. Raises
    ConfigError for an autoencoder that diffusers has no settings for, ArtifactError for weights of another network.
    """
    described = _described(config, "kl", scale=scale, size=size) | {
        "shift_factor": shift or None,
        "use_quant_conv": config.quant_convolutions,
        "use_post_quant_conv": config.quant_convolutions,
    }
    return described, renamed(state, dict(autoencoder_names.of_autoencoder(config)))


def from_diffusers_kl(described: Mapping[str, Any], state: Mapping[str, Tensor]) -> ReadAutoencoder:
    """The inverse of `to_diffusers_kl`, for the config.json of any `AutoencoderKL` of SD 1, SD 2, SDXL, SD 3 or Flux.

    Raises ConfigError naming the setting that latentray does not build, ArtifactError for weights of another network.
    """
    found = told(_KL, described, of="AutoencoderKL")
    require(found, {"latents_mean": (None,), "latents_std": (None,)})
    if found["use_quant_conv"] != found["use_post_quant_conv"]:
        raise unread("use_post_quant_conv", found["use_post_quant_conv"], (f"{found['use_quant_conv']}, as before it",))
    return _read(found, state, kind="kl", quant_convolutions=found["use_quant_conv"])


def to_diffusers_vq(
    config: AutoencoderConfig, state: Mapping[str, Tensor], *, shift: float, scale: float, size: int
) -> tuple[Described, State]:
    """Arguments of `diffusers.VQModel` and its state dict. Raises as `to_diffusers_kl` does."""
    if shift:
        raise inexpressible("shift", "a VQModel whose latents are shifted", "Take the shift out first: without_shift.")
    if not config.quant_convolutions:
        raise inexpressible(
            "autoencoder.quant_convolutions", "a VQModel without quantising convolutions", "Set it to true."
        )
    described = _described(config, "vq", scale=scale, size=size) | {
        "num_vq_embeddings": config.codebook_size,
        "vq_embed_dim": config.latent_channels,
    }
    return described, renamed(state, dict(autoencoder_names.of_autoencoder(config)))


def from_diffusers_vq(described: Mapping[str, Any], state: Mapping[str, Tensor]) -> ReadAutoencoder:
    """The inverse of `to_diffusers_vq`, for the config.json of a `VQModel`. Raises as `from_diffusers_kl` does."""
    found = told(_VQ, described, of="VQModel")
    require(
        found,
        {
            "vq_embed_dim": (None, found["latent_channels"]),
            "norm_type": ("group",),
            "lookup_from_codebook": (False,),
        },
    )
    return _read(found, state, kind="vq", codebook_size=found["num_vq_embeddings"])


def without_shift(config: AutoencoderConfig, state: Mapping[str, Tensor], *, shift: float) -> State:
    """Weights of an autoencoder whose latents are the same, less `shift`: for readers that know a scale alone.

    The shift moves into the biases of the 1x1 convolutions on both sides of the latent (and into the codebook), where it
    is exact up to rounding. Raises ConfigError for an autoencoder without them.
    """
    if not config.quant_convolutions:
        raise ConfigError(
            "Without 1x1 convolutions a shift of the latents cannot be moved into the weights: the convolution beside "
            "them pads with zeros.",
            where="autoencoder.quant_convolutions",
            mend="Keep the shift: SD 3's pipelines read it.",
        )
    out = dict(state)
    mean = out["encoder.quant.bias"].clone()
    mean[: config.latent_channels] -= shift
    weight = out["decoder.post_quant.weight"]
    after = out["decoder.post_quant.bias"] + shift * weight.flatten(1).sum(1)
    out |= {"encoder.quant.bias": mean, "decoder.post_quant.bias": after}
    codebook = autoencoder_names.CODEBOOK[0]
    if codebook in out:
        out[codebook] = out[codebook] - shift
    return out


def _described(config: AutoencoderConfig, kind: str, *, scale: float, size: int) -> Described:
    if config.kind != kind:
        raise inexpressible("autoencoder.kind", f"the kind {config.kind} in this class", f"Give one of kind {kind}.")
    if config.patch != 1:
        raise inexpressible("autoencoder.patch", "pixels folded into channels", "Train with patch=1 to hand it out.")
    levels = len(config.channels)
    return {
        "in_channels": config.in_channels,
        "out_channels": config.in_channels,
        "down_block_types": [_DOWN] * levels,
        "up_block_types": [_UP] * levels,
        "block_out_channels": list(config.channels),
        "layers_per_block": config.blocks,
        "latent_channels": config.latent_channels,
        "norm_num_groups": config.groups,
        "sample_size": size,
        "scaling_factor": scale,
        "mid_block_add_attention": config.attention,
    }


def _read(found: Described, state: Mapping[str, Tensor], **settings: Any) -> ReadAutoencoder:
    levels = len(found["block_out_channels"])
    require(
        found,
        {
            "act_fn": ("silu",),
            "out_channels": (found["in_channels"],),
            "down_block_types": ([_DOWN] * levels,),
            "up_block_types": ([_UP] * levels,),
        },
    )
    if found["scaling_factor"] is None:
        raise unread("scaling_factor", None, ("a number",))
    config = AutoencoderConfig(
        in_channels=found["in_channels"],
        latent_channels=found["latent_channels"],
        channels=list(found["block_out_channels"]),
        blocks=found["layers_per_block"],
        attention=found["mid_block_add_attention"],
        groups=found["norm_num_groups"],
        **settings,
    )
    ours = {theirs: ours for ours, theirs in autoencoder_names.of_autoencoder(config)}
    size = found["sample_size"]
    return ReadAutoencoder(
        config=config,
        state=_flat(renamed(_newer(state), ours)),
        shift=float(found.get("shift_factor") or 0.0),
        scale=float(found["scaling_factor"]),
        size=int(max(size) if isinstance(size, list | tuple) else size),
    )


def _newer(state: Mapping[str, Tensor]) -> State:
    """The state dict with the attention's parts under today's names."""
    out: State = {}
    for key, value in state.items():
        head, between, part = key.rpartition(".attentions.0.")
        name, _, kind = part.rpartition(".")
        out[f"{head}{between}{autoencoder_names.OLDER_ATTENTION.get(name, name)}.{kind}" if between else key] = value
    return out


def _flat(state: State) -> State:
    """The attention's projections as matrices: older files hold them as 1x1 convolutions."""
    for key, value in state.items():
        if ".attn.to_" in key and value.ndim == 4:
            if value.shape[2:] != (1, 1):
                raise ArtifactError("A projection is no 1x1 convolution.", where=key, mend="Give SD's autoencoder.")
            state[key] = value.flatten(1)
    return state
