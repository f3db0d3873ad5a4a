"""Autoencoders in diffusers' layout and back: every bit, the configurations that were published, and what is refused."""

import pytest
import torch

from latentray import build
from latentray.checkpoint import interop_autoencoders as interop
from latentray.checkpoint.autoencoder_names import OLDER_ATTENTION
from latentray.config import compose
from latentray.config.autoencoder import AutoencoderConfig
from latentray.config.train import Train
from latentray.errors import ArtifactError, ConfigError
from latentray.models import torchvision_ops

torchvision_ops.ensure_importable()
from diffusers import AutoencoderKL, VQModel  # noqa: E402  (it imports torchvision)

BOTH_WAYS = {
    "kl": (interop.to_diffusers_kl, interop.from_diffusers_kl, AutoencoderKL),
    "vq": (interop.to_diffusers_vq, interop.from_diffusers_vq, VQModel),
}
SD15 = {
    "_class_name": "AutoencoderKL", "_diffusers_version": "0.6.0", "act_fn": "silu", "in_channels": 3, "out_channels": 3,
    "block_out_channels": [128, 256, 512, 512], "down_block_types": ["DownEncoderBlock2D"] * 4, "latent_channels": 4,
    "layers_per_block": 2, "norm_num_groups": 32, "sample_size": 512, "up_block_types": ["UpDecoderBlock2D"] * 4,
}  # fmt: skip
SDXL = SD15 | {"force_upcast": True, "sample_size": 1024, "scaling_factor": 0.13025}
SD3 = SDXL | {
    "latent_channels": 16, "latents_mean": None, "latents_std": None, "scaling_factor": 1.5305, "shift_factor": 0.0609,
    "use_post_quant_conv": False, "use_quant_conv": False,
}  # fmt: skip
VQ_F4 = {
    "_class_name": "VQModel", "act_fn": "silu", "block_out_channels": [128, 256, 512], "in_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 3, "latent_channels": 3, "layers_per_block": 2, "norm_num_groups": 32,
    "num_vq_embeddings": 8192, "out_channels": 3, "sample_size": 256, "up_block_types": ["UpDecoderBlock2D"] * 3,
    "vq_embed_dim": 3,
}  # fmt: skip
PUBLISHED = [
    ("kl_f8", SD15, 83_653_863, (0.0, 0.18215, 512)), ("kl_f8", SDXL, 83_653_863, (0.0, 0.13025, 1024)),
    ("kl_f8_sd3", SD3, 83_819_683, (0.0609, 1.5305, 1024)), ("vq_f4", VQ_F4, 55_322_782, (0.0, 0.18215, 256)),
]  # fmt: skip


def shipped(name: str) -> AutoencoderConfig:
    return compose.load("train", Train, [f"autoencoder={name}", "stage=autoencoder"]).autoencoder


def tiny(**changes) -> AutoencoderConfig:
    return AutoencoderConfig(**(dict(channels=[8, 16], blocks=1, groups=4) | changes))


SMALL = {
    "kl": tiny(),
    "kl without attention": tiny(attention=False, channels=[8]),
    "kl as in SD 3": tiny(quant_convolutions=False, latent_channels=16),
    "vq": tiny(kind="vq", codebook_size=10, latent_channels=3),
}


@pytest.mark.parametrize(("name", "described", "parameters", "numbers"), PUBLISHED)
def test_published_networks_have_the_sizes_and_places_that_diffusers_gives_them(name, described, parameters, numbers):
    config = shipped(name)
    to, back, theirs_of = BOTH_WAYS[config.kind]
    with torch.device("meta"):
        ours = build.autoencoder(config)
        theirs = theirs_of(**{key: value for key, value in described.items() if not key.startswith("_")})
    found = back(described, theirs.state_dict())
    assert found.config == config
    assert (found.shift, found.scale, found.size) == numbers
    assert {key: value.shape for key, value in found.state.items()} == {
        key: value.shape for key, value in ours.state_dict().items()
    }
    assert build.parameter_count(theirs) == parameters
    codebook = config.latent_channels * (config.codebook_size or 0)  # a parameter there, a buffer here
    assert build.parameter_count(ours) == parameters - codebook
    again, renamed = to(config, ours.state_dict(), shift=found.shift, scale=found.scale, size=found.size)
    assert {key: value.shape for key, value in renamed.items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    assert back(again, renamed).config == config


@pytest.mark.parametrize("name", SMALL)
def test_both_ways_change_no_bit(name):
    config = SMALL[name]
    to, back, theirs_of = BOTH_WAYS[config.kind]
    state = build.seeded(lambda: build.autoencoder(config), 0).state_dict()
    shift = 0.25 if config.kind == "kl" else 0.0
    described, theirs = to(config, state, shift=shift, scale=1.5, size=64)
    theirs_of(**described).load_state_dict(theirs)  # strict: every weight has its place
    found = back(described, theirs)
    assert (found.config, found.shift, found.scale, found.size) == (config, shift, 1.5, 64)
    assert set(found.state) == set(state) and all(torch.equal(found.state[key], state[key]) for key in state)
    assert all(found.state[key].data_ptr() == state[key].data_ptr() for key in state)  # nothing is copied


def test_the_names_of_older_files_and_projections_as_convolutions_are_read():
    """The published weights of SD 1 and SD 2 call the attention's parts by diffusers' first names."""
    state = build.seeded(lambda: build.autoencoder(SMALL["kl"]), 0).state_dict()
    described, theirs = interop.to_diffusers_kl(SMALL["kl"], state, shift=0, scale=1, size=64)
    newer = {value: key for key, value in OLDER_ATTENTION.items()}
    older = {}
    for key, value in theirs.items():
        head, between, part = key.rpartition(".attentions.0.")
        name, _, kind = part.rpartition(".")
        key = f"{head}{between}{newer.get(name, name)}.{kind}" if between else key
        older[key] = value[:, :, None, None] if between and value.ndim == 2 else value
    assert set(older) != set(theirs)
    found = interop.from_diffusers_kl(described, older)
    assert set(found.state) == set(state) and all(torch.equal(found.state[key], state[key]) for key in state)


@pytest.mark.parametrize("name", ["kl", "vq"])
def test_a_shift_moved_into_the_weights_leaves_the_pictures_and_moves_the_latents(name):
    net = build.seeded(lambda: build.autoencoder(SMALL[name]), 0).double().eval()
    state = net.state_dict()
    state["encoder.quant.bias"] = torch.randn(
        state["encoder.quant.bias"].shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    net.load_state_dict(state)
    moved = build.autoencoder(SMALL[name]).double().eval()
    moved.load_state_dict(interop.without_shift(SMALL[name], state, shift=0.3))
    x = torch.rand(2, 3, 8, 12, dtype=torch.float64) * 2 - 1
    with torch.no_grad():
        before, after = net.encode(x), moved.encode(x)
        torch.testing.assert_close(after.mean_BChw, before.mean_BChw - 0.3)
        torch.testing.assert_close(after.logvar_BChw, before.logvar_BChw)
        torch.testing.assert_close(moved.decode(after.mean_BChw), net.decode(before.mean_BChw))


def test_a_shift_that_the_weights_cannot_take_is_refused():
    with pytest.raises(ConfigError) as caught:
        interop.without_shift(SMALL["kl as in SD 3"], {}, shift=0.1)
    assert caught.value.where == "autoencoder.quant_convolutions"


@pytest.mark.parametrize(
    ("described", "changes", "where"),
    [
        (SD15, {"act_fn": "gelu"}, "act_fn"),
        (SD15, {"latents_mean": [0.0] * 4}, "latents_mean"),
        (SD15, {"out_channels": 4}, "out_channels"),
        (SD15, {"use_quant_conv": False}, "use_post_quant_conv"),
        (SD15, {"down_block_types": ["AttnDownEncoderBlock2D"] * 4}, "down_block_types"),
        (SD15, {"up_block_types": ["UpDecoderBlock2D"] * 3}, "up_block_types"),
        (SD15, {"norm_num_groups": 7}, "autoencoder.channels"),
        (SD15, {"scaling_factor": None}, "scaling_factor"),
        (SD15, {"temporal_compression_ratio": 4}, "temporal_compression_ratio"),
        (VQ_F4, {"vq_embed_dim": 8}, "vq_embed_dim"),
        (VQ_F4, {"norm_type": "spatial"}, "norm_type"),
        (VQ_F4, {"lookup_from_codebook": True}, "lookup_from_codebook"),
    ],
)
def test_a_network_that_latentray_does_not_build_is_refused_by_its_setting(described, changes, where):
    back = interop.from_diffusers_vq if described is VQ_F4 else interop.from_diffusers_kl
    with pytest.raises(ConfigError) as caught:
        back(described | changes, {})
    assert caught.value.where == where
    assert caught.value.mend


@pytest.mark.parametrize(
    ("to", "changes", "shift", "where"),
    [
        (interop.to_diffusers_kl, {"patch": 2}, 0.0, "autoencoder.patch"),
        (interop.to_diffusers_kl, {"kind": "vq", "codebook_size": 4}, 0.0, "autoencoder.kind"),
        (interop.to_diffusers_vq, {}, 0.0, "autoencoder.kind"),
        (interop.to_diffusers_vq, {"kind": "vq", "codebook_size": 4}, 0.5, "shift"),
        (
            interop.to_diffusers_vq,
            {"kind": "vq", "codebook_size": 4, "quant_convolutions": False},
            0.0,
            "autoencoder.quant_convolutions",
        ),
    ],
)
def test_what_diffusers_cannot_say_is_refused(to, changes, shift, where):
    with pytest.raises(ConfigError) as caught:
        to(tiny(**changes), {}, shift=shift, scale=1.0, size=64)
    assert caught.value.where == where
    assert caught.value.mend


def test_weights_of_another_network_are_refused_by_name():
    config = SMALL["kl without attention"]
    described, theirs = interop.to_diffusers_kl(config, {}, shift=0, scale=1, size=8)
    key = "encoder.mid_block.attentions.0.to_q.weight"
    with pytest.raises(ArtifactError, match="no place") as caught:
        interop.from_diffusers_kl(described, theirs | {key: torch.zeros(1)})
    assert caught.value.where == key
