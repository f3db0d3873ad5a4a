"""Large pictures in parts: the whole to rounding, in less memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from latentray import build
from latentray.config.autoencoder import AutoencoderConfig
from latentray.errors import ConfigError
from latentray.models import tiling
from latentray.models.autoencoder import Autoencoder
from latentray.planning.meter import Meter


def small(**changes) -> Autoencoder:
    values = dict(channels=[8, 16, 16], blocks=1, groups=4) | changes
    net = build.seeded(lambda: build.autoencoder(AutoencoderConfig(**values)), 0).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in net.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return net.requires_grad_(False)


NETS = {
    "kl": {},
    "one level": {"channels": [8], "attention": False},
    "patch": {"channels": [8, 16], "patch": 2, "blocks": 2},
    "as SD 3": {"quant_convolutions": False, "latent_channels": 16},
    "vq": {"kind": "vq", "codebook_size": 16},
}


def smooth(batch: int, channels: int, height: int, width: int) -> Tensor:
    """Latents as those of pictures: neighbours alike."""
    coarse = torch.randn(batch, channels, 2 + height // 8, 2 + width // 8, generator=torch.Generator().manual_seed(1))
    return torch.nn.functional.interpolate(coarse, size=(height, width), mode="bicubic")


@pytest.mark.parametrize("rows", [1, 3, 8, 500])
@pytest.mark.parametrize("name", NETS)
def test_strips_are_the_whole(name, rows):
    net = small(**NETS[name])
    f = net.config.downsampling
    x = torch.rand(2, 3, 5 * f, 7 * f, generator=torch.Generator().manual_seed(0)) * 2 - 1
    before = x.clone()
    expected = net.encode(x)
    got = tiling.encode_in_strips(net, x, rows=rows)
    torch.testing.assert_close(got.mean_BChw, expected.mean_BChw, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.logvar_BChw, expected.logvar_BChw, rtol=1e-5, atol=1e-5)
    latent = expected.mean_BChw
    picture = net.decode(latent)
    again = tiling.decode_in_strips(net, latent, rows=rows, kept_on=torch.device("cpu"))
    assert (again - picture).abs().max() <= 1e-5 * picture.abs().max()
    assert torch.equal(x, before) and torch.equal(latent, expected.mean_BChw)  # nothing given is written to


def test_strips_are_the_whole_in_bf16_too():
    net = small().bfloat16()
    latent = smooth(1, 4, 12, 20)
    whole, exact = net.decode(latent.bfloat16()).float(), small().decode(latent)
    strips = tiling.decode_in_strips(net, latent.bfloat16(), rows=5)
    assert strips.dtype == torch.bfloat16
    assert (strips.float() - exact).square().mean() <= 1.1 * (whole - exact).square().mean()


@pytest.mark.parametrize("sliced", [tiling.decode_sliced, tiling.decode_in_strips])
def test_a_batch_is_its_pictures(sliced):
    net = small()
    latent = smooth(3, 4, 6, 6)
    torch.testing.assert_close(sliced(net, latent), net.decode(latent), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sliced", [tiling.encode_sliced, tiling.encode_in_strips])
def test_a_batch_of_pictures_is_encoded_as_one_by_one(sliced):
    net = small()
    x = smooth(3, 3, 8, 12)
    torch.testing.assert_close(sliced(net, x).mean_BChw, net.encode(x).mean_BChw, rtol=1e-5, atol=1e-5)


def peak_of(call) -> int:
    """Bytes of tensors that lived at once, beside weights and what was given."""
    meter = Meter([])
    with meter, torch.no_grad():
        call()
    return meter.peak


def test_strips_need_less_memory():
    net = small(channels=[32, 32, 64], groups=8, attention=False)
    latent = smooth(1, 4, 96, 96)
    whole = peak_of(lambda: net.decode(latent))
    strips = peak_of(lambda: tiling.decode_in_strips(net, latent, rows=16))
    assert strips < 0.62 * whole
    x = smooth(1, 3, 384, 384)
    assert peak_of(lambda: tiling.encode_in_strips(net, x, rows=16)) < 0.75 * peak_of(lambda: net.encode(x))


def test_sizes_that_do_not_divide_are_refused():
    with pytest.raises(ConfigError, match="does not divide"):
        tiling.encode_in_strips(small(), torch.zeros(1, 3, 6, 8))


def test_the_identity_needs_no_parts():
    net = build.autoencoder(AutoencoderConfig(kind="identity", latent_channels=3))
    x = torch.rand(2, 3, 9, 9)
    for decode in (tiling.decode_in_strips, tiling.decode_sliced):
        assert torch.equal(decode(net, x), x)
    for encode in (tiling.encode_in_strips, tiling.encode_sliced):
        assert torch.equal(encode(net, x).mean_BChw, x)
