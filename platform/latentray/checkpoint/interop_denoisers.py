"""Denoisers in diffusers' layout and back: configurations and the names of weights, never the networks themselves.

A state dict is renamed, not computed on, so both ways together change no bit. What diffusers can say and latentray
cannot build, or the other way round, is refused with ConfigError naming the setting.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from latentray.checkpoint import denoiser_names
from latentray.checkpoint.foreign_layout import Described, State, inexpressible, renamed, unread
from latentray.checkpoint.foreign_layout import told as read_settings
from latentray.config.denoiser import DenoiserConfig
from latentray.errors import ArtifactError

_BUILT = "SD 1, SD 2, SDXL, SD 3 and SD 3.5"
_UNET_FIXED: Described = {
    "act_fn": "silu", "attention_type": "default", "center_input_sample": False, "class_embed_type": None,
    "class_embeddings_concat": False, "conv_in_kernel": 3, "conv_out_kernel": 3, "cross_attention_norm": None,
    "downsample_padding": 1, "dropout": 0.0, "dual_cross_attention": False, "encoder_hid_dim": None,
    "encoder_hid_dim_type": None, "flip_sin_to_cos": True, "freq_shift": 0, "mid_block_only_cross_attention": None,
    "mid_block_scale_factor": 1, "mid_block_type": "UNetMidBlock2DCrossAttn", "norm_eps": 1e-5,
    "num_attention_heads": None, "only_cross_attention": False, "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False, "resnet_time_scale_shift": "default",
    "reverse_transformer_layers_per_block": None, "time_cond_proj_dim": None, "time_embedding_act_fn": None,
    "time_embedding_dim": None, "time_embedding_type": "positional", "timestep_post_act": None,
}  # fmt: skip
"""Settings of diffusers' U-Net with the one value each that latentray builds; diffusers' default in every case."""
_SDXL_POOLED_WIDTH = 1280
_UNET_IDLE = ("sample_size", "upcast_attention", "addition_embed_type_num_heads")
"""Settings that change no number of the networks built here."""
_DOWN = {True: "CrossAttnDownBlock2D", False: "DownBlock2D"}
_UP = {True: "CrossAttnUpBlock2D", False: "UpBlock2D"}


def to_diffusers_unet(config: DenoiserConfig, state: Mapping[str, Tensor]) -> tuple[Described, State]:
    """Arguments of `diffusers.UNet2DConditionModel` and its state dict.

    Raises ConfigError for a U-Net that diffusers has no settings for, ArtifactError for weights of another network.
    """
    return _describe_unet(config), renamed(state, dict(denoiser_names.of_unet(config)))


def from_diffusers_unet(
    described: Mapping[str, Any], state: Mapping[str, Tensor], *, size_numbers: int | None = None
) -> tuple[DenoiserConfig, State]:
    """The inverse of `to_diffusers_unet`, for the config.json of any `UNet2DConditionModel` of SD 1, SD 2 or SDXL.

    diffusers tells only the sum of the widths of pooled text and size numbers: without `size_numbers`, the pooled text is
    taken to be 1280 wide, as SDXL's and its refiner's is, or else the numbers to be six. The last of `num_class_embeds`
    classes is taken for the null class. Raises ConfigError naming the setting that latentray does not build,
    ArtifactError for weights of another network.
    """
    config = _read_unet(described, size_numbers)
    return config, renamed(state, {theirs: ours for ours, theirs in denoiser_names.of_unet(config)})


def to_diffusers_mmdit(config: DenoiserConfig, state: Mapping[str, Tensor]) -> tuple[Described, State]:
    """Arguments of `diffusers.SD3Transformer2DModel` and its state dict. Raises as `to_diffusers_unet` does."""
    if config.pooled_width is None:
        raise inexpressible("denoiser.pooled_width", "an MMDiT without pooled text", "Set it to the encoder's width.")
    described: Described = {
        "sample_size": config.base_grid * config.patch,
        "patch_size": config.patch,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "num_layers": config.layers,
        "attention_head_dim": config.head_dim,
        "num_attention_heads": config.heads,
        "joint_attention_dim": config.context_width,
        "caption_projection_dim": config.width,
        "pooled_projection_dim": config.pooled_width,
        "pos_embed_max_size": config.max_grid,
        "dual_attention_layers": list(config.dual_attention),
        "qk_norm": "rms_norm" if config.qk_norm else None,
    }
    out = renamed(state, dict(denoiser_names.of_mmdit(config)))
    return described, _reshaped(out, denoiser_names.POSITIONS[1], (1, config.max_grid**2, config.width))


def from_diffusers_mmdit(described: Mapping[str, Any], state: Mapping[str, Tensor]) -> tuple[DenoiserConfig, State]:
    """The inverse of `to_diffusers_mmdit`, for the config.json of any `SD3Transformer2DModel`."""
    known: Described = {
        "sample_size": 128, "patch_size": 2, "in_channels": 16, "num_layers": 18, "attention_head_dim": 64,
        "num_attention_heads": 18, "joint_attention_dim": 4096, "caption_projection_dim": 1152,
        "pooled_projection_dim": 2048, "out_channels": 16, "pos_embed_max_size": 96, "dual_attention_layers": (),
        "qk_norm": None,
    }  # fmt: skip
    told = read_settings(known, described, of=_BUILT)
    width = told["num_attention_heads"] * told["attention_head_dim"]
    for field, wanted in (("qk_norm", (None, "rms_norm")), ("caption_projection_dim", (width,))):
        if told[field] not in wanted:
            raise unread(field, told[field], wanted)
    if not told["pos_embed_max_size"]:
        raise unread("pos_embed_max_size", told["pos_embed_max_size"], ("a number of tokens",))
    config = DenoiserConfig(
        family="mmdit",
        in_channels=told["in_channels"],
        out_channels=told["out_channels"] or told["in_channels"],
        context_width=told["joint_attention_dim"],
        pooled_width=told["pooled_projection_dim"],
        combine="sd3",
        heads=told["num_attention_heads"],
        head_dim=told["attention_head_dim"],
        layers=told["num_layers"],
        patch=told["patch_size"],
        max_grid=told["pos_embed_max_size"],
        base_grid=told["sample_size"] // told["patch_size"],
        qk_norm=told["qk_norm"] is not None,
        dual_attention=list(told["dual_attention_layers"]),
    )
    out = renamed(state, {theirs: ours for ours, theirs in denoiser_names.of_mmdit(config)})
    return config, _reshaped(out, denoiser_names.POSITIONS[0], (config.max_grid, config.max_grid, config.width))


def _describe_unet(config: DenoiserConfig) -> Described:
    if config.middle_depth == 0 or (config.depth[-1] and config.middle_depth != config.depth[-1]):
        raise inexpressible(
            "denoiser.middle_depth",
            "a middle of another depth than the last level",
            "Set it to the last of denoiser.depth.",
        )
    described: Described = {
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "block_out_channels": list(config.channels),
        "layers_per_block": config.blocks,
        "down_block_types": [_DOWN[bool(depth)] for depth in config.depth],
        "up_block_types": [_UP[bool(depth)] for depth in reversed(config.depth)],
        "transformer_layers_per_block": [*(max(depth, 1) for depth in config.depth[:-1]), config.middle_depth],
        # Despite its name, diffusers reads the number of heads here.
        "attention_head_dim": config.heads or [config.heads_at(level) for level in range(len(config.channels))],
        # Attention over tokens as wide as the pixels and without tokens given: that is self-attention in diffusers.
        "cross_attention_dim": config.context_width or list(config.channels),
        "use_linear_projection": config.linear_projection,
        "norm_num_groups": config.groups,
    }
    if config.classes is not None:
        described["num_class_embeds"] = config.classes + 1
    if config.pooled_width is not None and config.size_numbers:
        described |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": config.size_width,
            "projection_class_embeddings_input_dim": config.pooled_width + config.size_numbers * config.size_width,
        }
    elif config.reads and config.reads != ("labels",):
        raise inexpressible(
            f"denoiser.{'pooled_width' if config.size_numbers == 0 else 'size_numbers'}",
            "pooled text without size numbers, or these alone",
            "Set pooled_width and size_numbers, or neither.",
        )
    return described


def _read_unet(described: Mapping[str, Any], size_numbers: int | None) -> DenoiserConfig:
    known: Described = {
        "in_channels": 4, "out_channels": 4, "block_out_channels": (320, 640, 1280, 1280), "layers_per_block": 2,
        "down_block_types": [_DOWN[True]] * 3 + [_DOWN[False]], "up_block_types": [_UP[False]] + [_UP[True]] * 3,
        "transformer_layers_per_block": 1, "attention_head_dim": 8, "cross_attention_dim": 1280,
        "use_linear_projection": False, "norm_num_groups": 32, "num_class_embeds": None, "addition_embed_type": None,
        "addition_time_embed_dim": None, "projection_class_embeddings_input_dim": None,
        **_UNET_FIXED,
    } | dict.fromkeys(_UNET_IDLE)  # fmt: skip
    told = read_settings(known, described, of=_BUILT)
    channels, levels = list(told["block_out_channels"]), len(told["block_out_channels"])
    crosses = [kind == _DOWN[True] for kind in told["down_block_types"]]
    for field, wanted in (
        *((field, (value,)) for field, value in _UNET_FIXED.items()),
        ("down_block_types", ([_DOWN[one] for one in crosses],)),
        ("up_block_types", ([_UP[one] for one in reversed(crosses)],)),
        ("addition_embed_type", (None, "text_time")),
    ):
        value = told[field]
        if (list(value) if isinstance(value, tuple) else value) not in wanted:
            raise unread(field, value, wanted)
    if not isinstance(told["layers_per_block"], int):
        raise unread("layers_per_block", told["layers_per_block"], ("one number for all levels",))
    layers, heads = (
        _per_level(told, field, levels) for field in ("transformer_layers_per_block", "attention_head_dim")
    )
    widths = {width // one for width, one in zip(channels, heads, strict=True)}
    of_heads: dict[str, Any] = {"heads": None, "level_heads": heads}
    if isinstance(told["attention_head_dim"], int):
        of_heads = {"heads": told["attention_head_dim"]}
    elif len(widths) == 1:
        of_heads = {"heads": None, "head_dim": widths.pop()}
    return DenoiserConfig(
        in_channels=told["in_channels"],
        out_channels=told["out_channels"],
        channels=channels,
        blocks=told["layers_per_block"],
        depth=[depth if crossing else 0 for depth, crossing in zip(layers, crosses, strict=True)],
        middle_depth=layers[-1],
        linear_projection=told["use_linear_projection"],
        groups=told["norm_num_groups"],
        context_width=_context_width(told["cross_attention_dim"], channels),
        classes=None if told["num_class_embeds"] is None else told["num_class_embeds"] - 1,
        **of_heads,
        **(_added(told, size_numbers) if told["addition_embed_type"] else {}),
    )


def _context_width(given: Any, channels: list[int]) -> int | None:
    """None where the cross-attention is as wide as each level: it is self-attention then."""
    if isinstance(given, int):
        return given
    if list(given) == channels:
        return None
    raise unread("cross_attention_dim", given, ("one number", channels))


def _added(told: Described, size_numbers: int | None) -> dict[str, Any]:
    total, each = told["projection_class_embeddings_input_dim"], told["addition_time_embed_dim"]
    if size_numbers is None:
        size_numbers = 5 if total - 5 * each == _SDXL_POOLED_WIDTH else 6
    return {
        "pooled_width": total - size_numbers * each,
        "combine": "sdxl" if size_numbers == 6 else "one",
        "size_numbers": size_numbers,
        "size_width": each,
    }


def _reshaped(state: State, name: str, shape: tuple[int, ...]) -> State:
    if name not in state or state[name].numel() != math.prod(shape):
        raise ArtifactError(
            "The table of positions is missing or of another size.",
            where=name,
            mend="Give the configuration it was made with.",
        )
    return state | {name: state[name].reshape(shape)}


def _per_level(told: Described, field: str, levels: int) -> list[int]:
    numbers = [told[field]] * levels if isinstance(told[field], int) else list(told[field])
    if len(numbers) != levels or any(not isinstance(one, int) for one in numbers):
        raise unread(field, told[field], ("one number, or one per level",))
    return numbers
