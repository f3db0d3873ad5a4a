"""CompVis' layout both ways: against diffusers' own conversion, at full size by name and shape, tiny by every bit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from latentray import build
from latentray.checkpoint import compvis, compvis_names
from latentray.checkpoint.interop_autoencoders import to_diffusers_kl
from latentray.checkpoint.interop_denoisers import to_diffusers_unet
from latentray.config import compose
from latentray.config.autoencoder import AutoencoderConfig
from latentray.config.denoiser import DenoiserConfig
from latentray.config.train import Train
from latentray.errors import ArtifactError, ConfigError
from latentray.models import torchvision_ops

torchvision_ops.ensure_importable()
from diffusers.loaders import single_file_utils as theirs  # noqa: E402  (it imports torchvision)
from transformers import CLIPTextConfig, CLIPTextModelWithProjection  # noqa: E402

UNET, AUTOENCODER = "model.diffusion_model.", "first_stage_model."
FULL = {
    "unet_sd15": 859_520_964, "unet_sd2": 865_910_724, "unet_sdxl": 2_567_463_684, "unet_sdxl_refiner": 2_259_526_660,
}  # fmt: skip
SD1_ENDS = {
    "input_blocks.0.0.weight": (320, 4, 3, 3),
    "input_blocks.3.0.op.weight": (320, 320, 3, 3),
    "input_blocks.11.0.out_layers.3.weight": (1280, 1280, 3, 3),
    "middle_block.1.transformer_blocks.0.attn2.to_k.weight": (1280, 768),
    "output_blocks.2.1.conv.weight": (1280, 1280, 3, 3),
    "output_blocks.5.2.conv.weight": (1280, 1280, 3, 3),
    "output_blocks.11.1.proj_out.weight": (320, 320, 1, 1),
    "out.2.weight": (4, 320, 3, 3),
}
"""Of the published v1-5-pruned-emaonly, as its readers know them."""


def shipped(name: str) -> DenoiserConfig:
    return compose.load("train", Train, [f"denoiser={name}"]).denoiser


def shapes(state) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in state.items()}


def unet(config: DenoiserConfig, device: str = "cpu") -> torch.nn.Module:
    with torch.device(device):
        return build.seeded(lambda: build.denoiser(config), 0)


def under(prefix: str, state) -> dict[str, torch.Tensor]:
    return {prefix + key: value for key, value in state.items()}


@pytest.mark.parametrize("name", FULL)
def test_a_published_unet_has_every_name_once_as_diffusers_converts_it(name):
    config = shipped(name)
    net = unet(config, "meta")
    assert build.parameter_count(net) == FULL[name]
    state = net.state_dict()
    written = compvis.write_unet(config, state)
    assert len(written) == len(state)
    assert sum(value.numel() for value in written.values()) == FULL[name]
    told = {"size_numbers": config.size_numbers} if config.size_numbers else {}
    again, ours = compvis.read_unet(written, **told)
    config.combine = again.combine
    assert again == config
    assert shapes(ours) == shapes(state)
    described, wanted = to_diffusers_unet(config, state)
    converted = theirs.convert_ldm_unet_checkpoint(under(UNET, written), described)
    assert shapes(converted) == shapes(wanted)
    if name == "unet_sd15":
        assert {key: tuple(written[key].shape) for key in SD1_ENDS} == SD1_ENDS


def test_the_published_autoencoder_has_every_name_once_as_diffusers_converts_it():
    config = compose.load("train", Train, ["autoencoder=kl_f8"]).autoencoder
    with torch.device("meta"):
        net = build.autoencoder(config)
    state = net.state_dict()
    written = compvis.write_autoencoder(config, state)
    assert sum(value.numel() for value in written.values()) == build.parameter_count(net) == 83_653_863
    assert written["encoder.mid.attn_1.q.weight"].shape == (512, 512, 1, 1)
    assert written["decoder.up.3.upsample.conv.weight"].shape == (512, 512, 3, 3)
    assert written["decoder.up.0.block.0.nin_shortcut.weight"].shape == (128, 256, 1, 1)
    again, ours = compvis.read_autoencoder(written)
    assert again == config
    assert shapes(ours) == shapes(state)
    described, wanted = to_diffusers_kl(config, state, shift=0.0, scale=0.18215, size=512)
    converted = theirs.convert_ldm_vae_checkpoint(under(AUTOENCODER, written), described)
    assert shapes(converted) == shapes(wanted)


CONFIGS = st.builds(
    lambda channels, blocks, depths, linear, added: DenoiserConfig(
        channels=[32 * width for width in channels],
        blocks=blocks,
        depth=(depths * 3)[: len(channels)],
        middle_depth=2,
        heads=8 if not linear else None,
        head_dim=32 if linear else None,
        linear_projection=linear,
        context_width=24,
        groups=32,
        **({"pooled_width": 8, "size_numbers": added, "size_width": 4} if added else {}),
    ),
    channels=st.lists(st.integers(1, 2), min_size=1, max_size=3),
    blocks=st.integers(1, 2),
    depths=st.lists(st.integers(0, 2), min_size=1, max_size=3),
    linear=st.booleans(),
    added=st.sampled_from([0, 5, 6]),
)


@settings(max_examples=12, deadline=None)
@given(CONFIGS)
def test_any_unet_goes_both_ways_with_every_bit_and_as_diffusers_converts_it(config):
    state = unet(config).state_dict()
    written = compvis.write_unet(config, state)
    told = dict(heads=config.heads, head_dim=config.head_dim)
    told |= {"size_numbers": config.size_numbers, "size_width": 4} if config.size_numbers else {}
    again, ours = compvis.read_unet(written, **told)
    if not any(config.depth):  # its middle is all that reads text
        assert again.context_width == 24
    assert again == config
    assert set(ours) == set(state)
    assert all(ours[key].data_ptr() == value.data_ptr() for key, value in state.items())  # nothing is copied
    if config.depth[-1] in (0, 2):  # else diffusers has no settings for its middle
        described, wanted = to_diffusers_unet(config, state)
        converted = theirs.convert_ldm_unet_checkpoint(under(UNET, written), described)
        assert set(converted) == set(wanted)
        assert all(torch.equal(converted[key], value) for key, value in wanted.items())


@pytest.mark.parametrize("attention", [True, False])
@pytest.mark.parametrize("quant", [True, False])
def test_an_autoencoder_goes_both_ways_with_every_bit_and_as_diffusers_converts_it(attention, quant):
    config = AutoencoderConfig(
        channels=[32, 64, 64], blocks=1, latent_channels=5, attention=attention, quant_convolutions=quant
    )
    state = build.seeded(lambda: build.autoencoder(config), 0).state_dict()
    written = compvis.write_autoencoder(config, state)
    again, ours = compvis.read_autoencoder(written)
    assert again == config
    assert set(ours) == set(state)
    assert all(torch.equal(ours[key], value) for key, value in state.items())
    if attention and quant:
        described, wanted = to_diffusers_kl(config, state, shift=0.0, scale=1.0, size=32)
        converted = theirs.convert_ldm_vae_checkpoint(under(AUTOENCODER, written), described)
        assert set(converted) == set(wanted)
        assert all(torch.equal(converted[key], value) for key, value in wanted.items())


def clip(width: int = 64, layers: int = 3) -> CLIPTextModelWithProjection:
    torch.manual_seed(0)
    config = CLIPTextConfig(
        hidden_size=width, intermediate_size=96, num_hidden_layers=layers, num_attention_heads=width // 64,
        vocab_size=99, max_position_embeddings=8, projection_dim=48, hidden_act="gelu", bos_token_id=97, eos_token_id=98,
    )  # fmt: skip
    return CLIPTextModelWithProjection(config)


def test_open_clips_text_model_goes_both_ways_with_every_bit_and_as_diffusers_converts_it():
    model = clip()
    state = {key: value for key, value in model.state_dict().items() if "position_ids" not in key}
    written = compvis.open_clip_from_clip(state)
    assert written["transformer.resblocks.1.attn.in_proj_weight"].shape == (192, 64)
    assert torch.equal(written["text_projection"], state["text_projection.weight"].T)
    again = compvis.clip_from_open_clip(written)
    assert set(again) == set(state)
    assert all(torch.equal(again[key], value) for key, value in state.items())
    converted = theirs.convert_open_clip_checkpoint(model, under("conditioner.embedders.1.model.", written),
                                                    prefix="conditioner.embedders.1.model.")  # fmt: skip
    assert all(torch.equal(converted[key], value) for key, value in state.items())


def test_sd2_leaves_the_last_layer_out():
    state = {key: value for key, value in clip().state_dict().items() if "position_ids" not in key}
    found = compvis.clip_from_open_clip(compvis.open_clip_from_clip(state), drop_last=True)
    assert not any(".layers.2." in key or key.startswith("text_projection") for key in found)
    assert set(found) < set(state)
    assert "text_model.final_layer_norm.weight" in found


def test_averages_stand_in_for_the_weights_they_average():
    weight, average = torch.zeros(2), torch.ones(2)
    key = "model.diffusion_model.input_blocks.0.0.weight"
    assert compvis_names.ema_name(key) == "model_ema.diffusion_modelinput_blocks00weight"
    state = {key: weight, compvis_names.ema_name(key): average, "model_ema.decay": torch.tensor(0.9), "betas": weight}
    found = compvis.averaged(state)
    assert set(found) == {key, "betas"}
    assert found[key] is average
    assert compvis.averaged({key: weight})[key] is weight


def test_weights_of_another_network_are_refused_by_name():
    config = DenoiserConfig(channels=[32], blocks=1, depth=[1], middle_depth=1, heads=8, groups=32, context_width=8)
    written = compvis.write_unet(config, unet(config).state_dict())
    for broken, where in (
        ({**written, "input_blocks.9.1.qkv.weight": torch.ones(1)}, "input_blocks"),
        ({**written, "control_model.x.weight": torch.ones(1)}, "control_model.x.weight"),
        ({key: value for key, value in written.items() if key != "out.2.weight"}, "out.2.weight"),
        ({}, "input_blocks"),
    ):
        with pytest.raises(ArtifactError) as caught:
            compvis.read_unet(broken)
        assert caught.value.where.startswith(where)
    with pytest.raises(ArtifactError) as caught:
        compvis.clip_from_open_clip({"visual.conv1.weight": torch.ones(1)})
    assert caught.value.where == "visual.conv1.weight"


@pytest.mark.parametrize(
    ("config", "where"),
    [
        (DenoiserConfig(channels=[8], depth=[1], heads=2, groups=4, blocks=1), "denoiser.groups"),
        (DenoiserConfig(channels=[64], depth=[1], heads=None, level_heads=[2], blocks=1), "denoiser.level_heads"),
        (DenoiserConfig(family="mmdit", heads=2, head_dim=8), "denoiser.family"),
        (AutoencoderConfig(channels=[8], groups=4), "autoencoder.groups"),
        (AutoencoderConfig(patch=4), "autoencoder.patch"),
        (AutoencoderConfig(kind="vq", codebook_size=8), "autoencoder.kind"),
    ],
)
def test_what_compvis_code_does_not_build_is_refused_by_our_setting(config, where):
    write = compvis.write_autoencoder if isinstance(config, AutoencoderConfig) else compvis.write_unet
    with pytest.raises(ConfigError) as caught:
        write(config, {})
    assert caught.value.where == where
