"""The autoencoders: shapes, the posterior in closed form, one latent scale, and what is refused."""

import pytest
import torch

from latentray.config.autoencoder import AutoencoderConfig
from latentray.errors import ConfigError
from latentray.models.autoencoder import (
    IdentityAutoencoder,
    KLAutoencoder,
    LatentScale,
    Posterior,
    VQAutoencoder,
    last_layer_gradient,
)


def randomised(net: torch.nn.Module) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(0)
    for parameter in net.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return net.eval()


def tiny(**changes) -> KLAutoencoder:
    values = dict(channels=[8, 8], blocks=1, groups=4, patch=1, attention=False) | changes
    return randomised(KLAutoencoder(AutoencoderConfig(**values)))


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


def vq(**changes) -> VQAutoencoder:
    values = dict(kind="vq", channels=[8, 8], blocks=1, groups=4, latent_channels=3, codebook_size=6) | changes
    return randomised(VQAutoencoder(AutoencoderConfig(**values)))


def test_a_vq_model_decodes_the_nearest_vectors_and_encodes_what_lies_before_them():
    net = vq()
    x = torch.rand(2, 3, 4, 6) * 2 - 1
    posterior = net.encode(x)
    assert torch.equal(posterior.mean_BChw, net.encoder(x))
    torch.testing.assert_close(posterior.draw(torch.full_like(posterior.mean_BChw, 3.0)), posterior.mean_BChw)
    quantised = net.quantizer(posterior.mean_BChw)
    assert {tuple(v) for v in quantised.movedim(1, -1).reshape(-1, 3).tolist()} <= {
        tuple(v) for v in net.quantizer.codebook_KD.tolist()
    }
    assert torch.equal(net.decode(posterior.mean_BChw), net.decode(quantised))
    rec, latent, codes, features = net(x)
    torch.testing.assert_close(rec, net.decode(posterior.mean_BChw))
    assert torch.equal(latent, posterior.mean_BChw) and codes.shape == (2, 1, 2, 3)
    torch.testing.assert_close(net.decoder.last(features), rec)


def test_the_decoders_gradient_passes_the_quantisation_straight():
    net = vq().double()  # norms over a few pixels amplify the rounding of x + (q - x)
    x = torch.rand(1, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rec, latent, *_ = net(x)
    (at_latent,) = torch.autograd.grad(rec.sum(), latent, retain_graph=True)
    quantised = net.quantizer(latent).requires_grad_(True)
    (at_quantised,) = torch.autograd.grad(net.decoder(quantised).sum(), quantised)
    torch.testing.assert_close(at_latent, at_quantised)
    assert all(p.grad is None for p in net.parameters())
    rec.sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in net.encoder.parameters())


def test_the_identity_is_the_picture_itself():
    net = IdentityAutoencoder(AutoencoderConfig(kind="identity", latent_channels=3))
    x = torch.rand(2, 3, 5, 7) * 2 - 1
    posterior = net.encode(x)
    assert torch.equal(posterior.mean_BChw, x) and torch.equal(net.decode(x), x) and torch.equal(net(x)[0], x)
    assert (posterior.logvar_BChw == -30).all()
    assert net.config.downsampling == 1 and not list(net.state_dict())


def test_sd3s_form_has_no_convolutions_beside_the_latent():
    with_them, without = tiny(), tiny(quant_convolutions=False)
    gone = set(with_them.state_dict()) - set(without.state_dict())
    assert gone == {f"{part}.{kind}" for part in ("encoder.quant", "decoder.post_quant") for kind in ("weight", "bias")}
    posterior = without.encode(torch.zeros(1, 3, 4, 4))
    assert without.decode(posterior.mean_BChw).shape == (1, 3, 4, 4)


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
        ({"patch": 0}, "autoencoder.patch"),
        ({"blocks": 0}, "autoencoder.blocks"),
        ({"groups": 0}, "autoencoder.groups"),
        ({"latent_channels": 0}, "autoencoder.latent_channels"),
        ({"kind": "vqgan"}, "autoencoder.kind"),
        ({"kind": "vq"}, "autoencoder.codebook_size"),
        ({"kind": "vq", "codebook_size": 1}, "autoencoder.codebook_size"),
        ({"codebook_size": 512}, "autoencoder.codebook_size"),
        ({"kind": "identity"}, "autoencoder.latent_channels"),
    ],
)
def test_bad_settings_are_refused_at_construction(changes, where):
    with pytest.raises(ConfigError) as caught:
        AutoencoderConfig(**changes)
    assert caught.value.where == where
