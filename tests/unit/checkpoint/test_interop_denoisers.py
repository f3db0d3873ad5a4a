"""Denoisers in diffusers' layout and back: every bit, the configurations that were published, and what is refused."""

import pytest
import torch

from latentray import build
from latentray.checkpoint import interop_denoisers as interop
from latentray.config import compose
from latentray.config.denoiser import DenoiserConfig
from latentray.config.train import Train
from latentray.errors import ArtifactError, ConfigError
from latentray.models import torchvision_ops

torchvision_ops.ensure_importable()
from diffusers import SD3Transformer2DModel, UNet2DConditionModel  # noqa: E402  (it imports torchvision)

BOTH_WAYS = {
    "unet": (interop.to_diffusers_unet, interop.from_diffusers_unet, UNet2DConditionModel),
    "mmdit": (interop.to_diffusers_mmdit, interop.from_diffusers_mmdit, SD3Transformer2DModel),
}
SD15 = {
    "_class_name": "UNet2DConditionModel", "_diffusers_version": "0.6.0", "act_fn": "silu", "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280], "center_input_sample": False, "cross_attention_dim": 768,
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "downsample_padding": 1, "flip_sin_to_cos": True, "freq_shift": 0, "in_channels": 4, "layers_per_block": 2,
    "mid_block_scale_factor": 1, "norm_eps": 1e-05, "norm_num_groups": 32, "out_channels": 4, "sample_size": 64,
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
}  # fmt: skip
SD21 = SD15 | {
    "attention_head_dim": [5, 10, 20, 20], "cross_attention_dim": 1024, "dual_cross_attention": False,
    "num_class_embeds": None, "only_cross_attention": False, "sample_size": 96, "upcast_attention": True,
    "use_linear_projection": True,
}  # fmt: skip
SDXL = SD21 | {
    "attention_head_dim": [5, 10, 20], "block_out_channels": [320, 640, 1280], "cross_attention_dim": 2048,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2, 10], "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
    "addition_embed_type_num_heads": 64, "projection_class_embeddings_input_dim": 2816, "upcast_attention": None,
}  # fmt: skip
REFINER = SDXL | {
    "attention_head_dim": [6, 12, 24, 24], "block_out_channels": [384, 768, 1536, 1536], "cross_attention_dim": 1280,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": 4, "projection_class_embeddings_input_dim": 2560,
}  # fmt: skip
SD3 = {
    "_class_name": "SD3Transformer2DModel", "attention_head_dim": 64, "caption_projection_dim": 1536, "in_channels": 16,
    "joint_attention_dim": 4096, "num_attention_heads": 24, "num_layers": 24, "out_channels": 16, "patch_size": 2,
    "pooled_projection_dim": 2048, "pos_embed_max_size": 192, "sample_size": 128,
}  # fmt: skip
SD35_MEDIUM = SD3 | {
    "dual_attention_layers": list(range(13)), "qk_norm": "rms_norm", "pos_embed_max_size": 384,
}  # fmt: skip
SD35_LARGE = SD3 | {
    "num_attention_heads": 38, "num_layers": 38, "caption_projection_dim": 2432, "qk_norm": "rms_norm",
}  # fmt: skip
PUBLISHED = [
    ("unet_sd15", SD15, 859_520_964), ("unet_sd2", SD21, 865_910_724), ("unet_sdxl", SDXL, 2_567_463_684),
    ("unet_sdxl_refiner", REFINER, 2_259_526_660), ("mmdit_sd3_medium", SD3, 2_028_328_000),
    ("mmdit_sd35_medium", SD35_MEDIUM, 2_243_171_520), ("mmdit_sd35_large", SD35_LARGE, 8_056_627_520),
]  # fmt: skip
TINY = [name for name in compose.groups()["denoiser"] if "tiny" in name and name.startswith(("unet", "mmdit"))]


def shipped(name: str) -> DenoiserConfig:
    return compose.load("train", Train, [f"denoiser={name}"]).denoiser


def heads_of(net: torch.nn.Module) -> dict[str, int]:
    return {name: module.heads for name, module in net.named_modules() if hasattr(module, "heads")}


@pytest.mark.parametrize(("name", "described", "parameters"), PUBLISHED, ids=[name for name, *_ in PUBLISHED])
def test_published_networks_have_the_sizes_and_places_that_diffusers_gives_them(name, described, parameters):
    to, back, theirs_of = BOTH_WAYS[name.partition("_")[0]]
    with torch.device("meta"):
        ours = build.denoiser(shipped(name))
        theirs = theirs_of(**{key: value for key, value in described.items() if not key.startswith("_")})
    config, state = back(described, theirs.state_dict())
    assert config == shipped(name)
    assert {key: value.shape for key, value in state.items()} == {k: v.shape for k, v in ours.state_dict().items()}
    assert build.parameter_count(ours) == build.parameter_count(theirs) == parameters
    again, renamed = to(config, ours.state_dict())
    assert {key: value.shape for key, value in renamed.items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    with torch.device("meta"):
        rebuilt = theirs_of(**again)
    assert heads_of(rebuilt) == heads_of(theirs)  # shapes do not tell them
    assert back(again, renamed)[0] == config


@pytest.mark.parametrize("name", TINY)
def test_both_ways_change_no_bit(name):
    config = shipped(name)
    to, back, theirs_of = BOTH_WAYS[config.family]
    state = build.seeded(lambda: build.denoiser(config), 0).state_dict()
    described, theirs = to(config, state)
    assert set(theirs) == set(theirs_of(**described).state_dict())
    options = {"size_numbers": config.size_numbers} if config.size_numbers else {}
    again, ours = back(described, theirs, **options)
    assert again == config
    assert list(ours) == list(state) and all(torch.equal(ours[key], state[key]) for key in state)
    assert all(ours[key].data_ptr() == state[key].data_ptr() for key in state)  # nothing is copied


def test_the_widths_of_pooled_text_and_sizes_are_told_apart_by_sdxls():
    for numbers in (6, 5):
        total = 1280 + 256 * numbers
        config, _ = interop.from_diffusers_unet(SDXL | {"projection_class_embeddings_input_dim": total}, {})
        assert (config.pooled_width, config.size_numbers) == (1280, numbers)
    told = SDXL | {"projection_class_embeddings_input_dim": 900, "addition_time_embed_dim": 100}
    assert interop.from_diffusers_unet(told, {})[0].pooled_width == 300
    assert interop.from_diffusers_unet(told, {}, size_numbers=5)[0].pooled_width == 400


@pytest.mark.parametrize(
    ("described", "changes", "where"),
    [
        (SD15, {"act_fn": "gelu"}, "act_fn"),
        (SD15, {"class_embed_type": "projection"}, "class_embed_type"),
        (SD15, {"only_cross_attention": [True, True, True, False]}, "only_cross_attention"),
        (SD15, {"encoder_hid_dim": 4096}, "encoder_hid_dim"),
        (SD15, {"addition_embed_type": "image"}, "addition_embed_type"),
        (SD15, {"down_block_types": ["DownBlock2D"] * 3 + ["AttnDownBlock2D"]}, "down_block_types"),
        (SD15, {"up_block_types": ["UpBlock2D"] * 4}, "up_block_types"),
        (SD15, {"layers_per_block": [1, 2, 2, 2]}, "layers_per_block"),
        (SD15, {"transformer_layers_per_block": [[1, 1], 1, 1, 1]}, "transformer_layers_per_block"),
        (SD15, {"cross_attention_dim": [768, 768, 768, 512]}, "cross_attention_dim"),
        (SD15, {"attention_head_dim": [5, 10]}, "attention_head_dim"),
        (SD15, {"norm_num_groups": 7}, "denoiser.channels"),
        (SD15, {"conditioning_embedding": 1}, "conditioning_embedding"),
        (SD3, {"qk_norm": "layer_norm"}, "qk_norm"),
        (SD3, {"caption_projection_dim": 1152}, "caption_projection_dim"),
        (SD3, {"pos_embed_max_size": None}, "pos_embed_max_size"),
        (SD3, {"axes_dims_rope": [16]}, "axes_dims_rope"),
    ],
)
def test_a_network_that_latentray_does_not_build_is_refused_by_its_setting(described, changes, where):
    back = interop.from_diffusers_mmdit if described is SD3 else interop.from_diffusers_unet
    with pytest.raises(ConfigError) as caught:
        back(described | changes, {})
    assert caught.value.where == where
    assert caught.value.mend


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"depth": [1, 2], "middle_depth": 1}, "denoiser.middle_depth"),
        ({"middle_depth": 0}, "denoiser.middle_depth"),
        ({"pooled_width": 8}, "denoiser.pooled_width"),
        ({"size_numbers": 6}, "denoiser.size_numbers"),
    ],
)
def test_a_network_that_diffusers_has_no_settings_for_is_refused_by_ours(changes, where):
    config = DenoiserConfig(**{"channels": [32, 32], "depth": [1, 1], **changes})
    with pytest.raises(ConfigError) as caught:
        interop.to_diffusers_unet(config, {})
    assert caught.value.where == where
    with pytest.raises(ConfigError) as caught:
        interop.to_diffusers_mmdit(DenoiserConfig(family="mmdit", heads=2, head_dim=8), {})
    assert caught.value.where == "denoiser.pooled_width"


def test_weights_of_another_network_are_refused_by_name():
    config = shipped("mmdit_tiny_sd35")
    described, theirs = interop.to_diffusers_mmdit(config, build.denoiser(config).state_dict())
    with pytest.raises(ArtifactError) as caught:
        interop.from_diffusers_mmdit(described, theirs | {"transformer_blocks.9.ff.net.2.weight": torch.ones(1)})
    assert caught.value.where == "transformer_blocks.9.ff.net.2.weight"
    for broken in ({}, {"pos_embed.pos_embed": torch.ones(1, 9, 64)}):
        with pytest.raises(ArtifactError) as caught:
            interop.from_diffusers_mmdit(described, broken)
        assert caught.value.where == "positions"
