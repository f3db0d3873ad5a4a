"""The U-Net: diffusers' numbers from the same weights, in both of Stable Diffusion's layouts."""

import pytest
import torch

from latentray.config.denoiser import DenoiserConfig
from latentray.errors import ConfigError
from latentray.models import torchvision_ops
from latentray.models.unet import UNet

torchvision_ops.ensure_importable()
from diffusers import UNet2DConditionModel  # noqa: E402  (it imports torchvision)

SD1 = DenoiserConfig(channels=[8, 16, 16], blocks=2, depth=[1, 1, 0], heads=2, context_width=6, groups=4)
SD2 = DenoiserConfig(
    channels=[8, 16], blocks=1, depth=[0, 2], middle_depth=2, heads=None, head_dim=8, context_width=6,
    linear_projection=True, groups=4,
)  # fmt: skip
_RES = {
    "norm1": "norm1", "conv1": "conv1", "time": "time_emb_proj", "norm2": "norm2", "conv2": "conv2", "skip": "conv_shortcut",
}  # fmt: skip
_BLOCK = {
    **{f"norm{i}": f"norm{i}" for i in (1, 2, 3)},
    **{f"attn{i}.to_{x}": f"attn{i}.to_{x}" for i in (1, 2) for x in "qkv"},
    **{f"attn{i}.to_out": f"attn{i}.to_out.0" for i in (1, 2)},
    "ff.proj": "ff.net.0.proj",
    "ff.out": "ff.net.2",
}


def names_in_diffusers(config: DenoiserConfig) -> dict[str, str]:
    """Prefix of our module -> diffusers' prefix."""
    names = {
        "time_in": "time_embedding.linear_1", "time_out": "time_embedding.linear_2",
        "conv_in": "conv_in", "norm_out": "conv_norm_out", "conv_out": "conv_out",
    }  # fmt: skip

    def pair(ours: str, theirs: str, at: int, depth: int) -> None:
        names.update({f"{ours}.res.{a}": f"{theirs}.resnets.{at}.{b}" for a, b in _RES.items()})
        names.update(
            {f"{ours}.transformer.{a}": f"{theirs}.attentions.{at}.{a}" for a in ("norm", "proj_in", "proj_out")}
        )
        for k in range(depth):
            prefix = f"{theirs}.attentions.{at}.transformer_blocks.{k}"
            names.update({f"{ours}.transformer.blocks.{k}.{a}": f"{prefix}.{b}" for a, b in _BLOCK.items()})

    last = len(config.channels) - 1
    for level in range(last + 1):
        for i in range(config.blocks):
            pair(f"down.{level * config.blocks + i}", f"down_blocks.{level}", i, config.depth[level])
        names[f"down.{(level + 1) * config.blocks - 1}.resample.conv"] = f"down_blocks.{level}.downsamplers.0.conv"
        for i in range(config.blocks + 1):
            pair(f"up.{level * (config.blocks + 1) + i}", f"up_blocks.{level}", i, config.depth[last - level])
        names[f"up.{(level + 1) * (config.blocks + 1) - 1}.resample.conv"] = f"up_blocks.{level}.upsamplers.0.conv"
    pair("middle_in", "mid_block", 0, config.middle_depth)
    names.update({f"middle_out.{a}": f"mid_block.resnets.1.{b}" for a, b in _RES.items()})
    return names


def theirs_of(config: DenoiserConfig) -> UNet2DConditionModel:
    heads = [config.heads_at(width) for width in config.channels]
    return UNet2DConditionModel(
        in_channels=4,
        out_channels=4,
        block_out_channels=config.channels,
        layers_per_block=config.blocks,
        down_block_types=["CrossAttnDownBlock2D" if d else "DownBlock2D" for d in config.depth],
        up_block_types=["CrossAttnUpBlock2D" if d else "UpBlock2D" for d in reversed(config.depth)],
        transformer_layers_per_block=[max(d, 1) for d in config.depth],
        attention_head_dim=heads,  # despite its name, diffusers takes the number of heads here
        cross_attention_dim=config.context_width,
        use_linear_projection=config.linear_projection,
        norm_num_groups=config.groups,
    ).eval()


@pytest.mark.parametrize("config", [SD1, SD2], ids=["sd1", "sd2"])
def test_parity_with_diffusers(config):
    torch.manual_seed(0)
    ours, theirs = UNet(config).eval(), theirs_of(config)
    names = names_in_diffusers(config)
    state = {}
    for key, value in ours.state_dict().items():
        prefix, kind = key.rsplit(".", 1)
        state[f"{names[prefix]}.{kind}"] = value
    theirs.load_state_dict(state)  # strict: every weight has its place
    x, t, context = torch.randn(2, 4, 8, 12), torch.tensor([3, 981]), torch.randn(2, 5, 6)
    with torch.no_grad():
        expected, got = theirs(x, t, context).sample, ours(x, t, context)
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()
    training = ours(x, t, context)  # with gradients the CPU takes another attention path
    assert (training - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_every_parameter_gets_a_gradient():
    net = UNet(SD2)
    net(torch.randn(2, 4, 4, 4), torch.tensor([1, 500]), torch.randn(2, 3, 6)).square().mean().backward()
    assert [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_time_and_text_change_the_prediction():
    net = UNet(SD2).eval()
    x, t, context = torch.randn(1, 4, 4, 4), torch.tensor([10]), torch.randn(1, 3, 6)
    base = net(x, t, context)
    assert not torch.allclose(base, net(x, t + 500, context))
    assert not torch.allclose(base, net(x, t, context + 1))
    assert torch.equal(base, net(x, t, context))


def test_an_unconditional_network_takes_no_text():
    config = DenoiserConfig(channels=[8], blocks=1, depth=[1], heads=2, context_width=None, groups=4)
    assert UNet(config)(torch.randn(1, 4, 4, 4), torch.tensor([1])).shape == (1, 4, 4, 4)


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"channels": [10], "depth": [1]}, "denoiser.channels"),
        ({"channels": [32], "depth": [1], "heads": 5}, "denoiser.heads"),
        ({"channels": [32], "depth": [1], "heads": None}, "denoiser.heads"),
        ({"channels": [32], "depth": [1], "head_dim": 8}, "denoiser.heads"),
        ({"channels": [32], "depth": [1, 1]}, "denoiser.depth"),
    ],
)
def test_bad_settings_are_refused_at_construction(changes, where):
    with pytest.raises(ConfigError) as caught:
        DenoiserConfig(**changes)
    assert caught.value.where == where
