"""The autoencoder: diffusers' numbers from the same weights, the posterior in closed form, one latent scale."""

import pytest
import torch

from latentray.config.autoencoder import AutoencoderConfig
from latentray.errors import ConfigError
from latentray.models import torchvision_ops
from latentray.models.autoencoder import KLAutoencoder, LatentScale, Posterior, last_layer_gradient

torchvision_ops.ensure_importable()
from diffusers import AutoencoderKL  # noqa: E402  (it imports torchvision)

SMALL = AutoencoderConfig(channels=[8, 16, 16], blocks=1, groups=4, latent_channels=3)
_RES = {"norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2", "skip": "conv_shortcut"}
_ATTENTION = {
    "norm": "group_norm",
    "attn.to_q": "to_q",
    "attn.to_k": "to_k",
    "attn.to_v": "to_v",
    "attn.to_out": "to_out.0",
}


def randomised(net: torch.nn.Module) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(0)
    for parameter in net.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return net.eval()


def tiny(**changes) -> KLAutoencoder:
    values = dict(channels=[8, 8], blocks=1, groups=4, patch=1, attention=False) | changes
    return randomised(KLAutoencoder(AutoencoderConfig(**values)))


def names_in_diffusers(config: AutoencoderConfig) -> dict[str, str]:
    """Prefix of our module -> diffusers' prefix."""
    names = {"encoder.quant": "quant_conv", "decoder.post_quant": "post_quant_conv"}
    last = len(config.channels) - 1
    for side, blocks, halves in (("encoder", config.blocks, "down"), ("decoder", config.blocks + 1, "up")):
        names |= {f"{side}.{one}": f"{side}.{one}" for one in ("conv_in", "conv_out")} | {
            f"{side}.norm_out": f"{side}.conv_norm_out"
        }
        at = 0
        for level in range(last + 1):
            for block in range(blocks):
                theirs = f"{side}.{halves}_blocks.{level}.resnets.{block}"
                names |= {f"{side}.levels.{at}.{a}": f"{theirs}.{b}" for a, b in _RES.items()}
                at += 1
            if level < last:
                names[f"{side}.levels.{at}.conv"] = f"{side}.{halves}_blocks.{level}.{halves}samplers.0.conv"
                at += 1
        for ours, theirs in ((0, 0), (2, 1)):
            names |= {f"{side}.middle.{ours}.{a}": f"{side}.mid_block.resnets.{theirs}.{b}" for a, b in _RES.items()}
        names |= {f"{side}.middle.1.{a}": f"{side}.mid_block.attentions.0.{b}" for a, b in _ATTENTION.items()}
    return names


def test_parity_with_diffusers():
    ours = randomised(KLAutoencoder(SMALL))
    theirs = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 3,
        up_block_types=["UpDecoderBlock2D"] * 3,
        block_out_channels=SMALL.channels,
        layers_per_block=SMALL.blocks,
        latent_channels=SMALL.latent_channels,
        norm_num_groups=SMALL.groups,
    ).eval()
    names = names_in_diffusers(SMALL)
    state = {}
    for key, value in ours.state_dict().items():
        prefix, kind = key.rsplit(".", 1)
        state[f"{names[prefix]}.{kind}"] = value
    theirs.load_state_dict(state)  # strict: every weight has its place
    x = torch.rand(2, 3, 16, 24) * 2 - 1
    with torch.no_grad():
        posterior, expected = ours.encode(x), theirs.encode(x).latent_dist
        torch.testing.assert_close(posterior.mean_BChw, expected.mean, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(posterior.logvar_BChw, expected.logvar, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(posterior.kl(), expected.kl(), rtol=1e-4, atol=1e-4)
        picture = theirs.decode(expected.mean).sample
        got = ours.decode(posterior.mean_BChw)
    assert (got - picture).abs().max() <= 1e-5 * picture.abs().max()


def test_the_posterior_in_closed_form():
    standard = Posterior(mean_BChw=torch.zeros(2, 1, 2, 2), logvar_BChw=torch.zeros(2, 1, 2, 2))
    assert torch.equal(standard.kl(), torch.zeros(2))
    mean, logvar = torch.tensor([1.0, 2.0]).view(2, 1, 1, 1), torch.tensor([0.5, -1.0]).view(2, 1, 1, 1)
    one = Posterior(mean_BChw=mean, logvar_BChw=logvar)
    normal = torch.distributions.Normal(mean.double(), (0.5 * logvar.double()).exp())
    expected = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0)).flatten()
    torch.testing.assert_close(one.kl().double(), expected)
    torch.testing.assert_close(one.draw(torch.full_like(mean, 2.0)), mean + 2 * (0.5 * logvar).exp())


def test_the_log_variance_is_bounded():
    net = tiny()
    torch.nn.init.constant_(net.encoder.quant.bias, 1e4)
    assert net.encode(torch.zeros(1, 3, 4, 4)).logvar_BChw.max() == 20.0


def test_forward_is_encode_draw_decode():
    net = tiny(patch=2, attention=True)
    x = torch.rand(2, 3, 8, 8) * 2 - 1
    posterior = net.encode(x)
    noise = torch.randn_like(posterior.mean_BChw)
    rec, mean, logvar, features = net(x, noise)
    torch.testing.assert_close(rec, net.decode(posterior.draw(noise)))
    torch.testing.assert_close(net.decoder.last(features), rec)
    assert torch.equal(mean, posterior.mean_BChw) and torch.equal(logvar, posterior.logvar_BChw)
    torch.testing.assert_close(net(x)[0], net.decode(posterior.mean_BChw))


@pytest.mark.parametrize(("channels", "patch", "size"), [([8], 8, 16), ([8, 8], 2, 8), ([8, 8, 8], 1, 12)])
def test_shapes_follow_the_downsampling(channels, patch, size):
    net = tiny(channels=channels, patch=patch)
    f = net.config.downsampling
    posterior = net.encode(torch.zeros(1, 3, size, 2 * size - size % f))
    assert posterior.mean_BChw.shape == (1, 4, size // f, 2 * size // f)
    assert net.decode(posterior.mean_BChw).shape == (1, 3, size, 2 * size)


def test_a_size_that_does_not_divide_is_refused():
    with pytest.raises(ConfigError, match="6x5 does not divide by 2"):
        tiny().encode(torch.zeros(1, 3, 5, 6))


@pytest.mark.parametrize("patch", [1, 2])
def test_the_last_layers_gradient_equals_autograds(patch):
    net = tiny(patch=patch)
    x = torch.rand(2, 3, 8, 8)
    rec, *_, features = net(x)
    weight = net.decoder.conv_out.weight
    (expected,) = torch.autograd.grad((rec - x).square().mean(), weight, retain_graph=True)
    leaf = rec.detach().requires_grad_(True)
    (at_picture,) = torch.autograd.grad((leaf - x).square().mean(), leaf)
    got = last_layer_gradient(at_picture, features, patch, weight.shape)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-7)


def test_restoring_undoes_normalising_with_the_same_two_numbers():
    scale = LatentScale(shift=0.3, scale=1.7)
    latent = torch.randn(2, 4, 3, 3, dtype=torch.float64) * 5 + 2
    torch.testing.assert_close(scale.restore(scale.normalise(latent)), latent)
    torch.testing.assert_close(scale.normalise(torch.tensor(0.3)), torch.tensor(0.0))
    torch.testing.assert_close(scale.normalise(torch.tensor(1.3)), torch.tensor(1.7))


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"channels": []}, "autoencoder.channels"),
        ({"channels": [10]}, "autoencoder.channels"),
        ({"patch": 0}, "autoencoder"),
        ({"blocks": 0}, "autoencoder"),
    ],
)
def test_bad_settings_are_refused_at_construction(changes, where):
    with pytest.raises(ConfigError) as caught:
        AutoencoderConfig(**changes)
    assert caught.value.where == where
