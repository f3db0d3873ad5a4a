"""Autoencoders drawn at random give diffusers' numbers from the same weights: outputs, gradients and bf16's error."""

from __future__ import annotations

import random
import statistics

import pytest
import torch
from torch import Tensor, nn

from latentray import build
from latentray.checkpoint import interop_autoencoders as interop
from latentray.config.autoencoder import AutoencoderConfig
from latentray.models import torchvision_ops
from latentray.models.autoencoder import Autoencoder

torchvision_ops.ensure_importable()
from diffusers import AutoencoderKL, VQModel  # noqa: E402  (it imports torchvision)

KINDS = ("kl", "sd3", "vq")
CASES = [(kind, seed) for kind in KINDS for seed in range(5)]
TO = {"kl": (interop.to_diffusers_kl, AutoencoderKL), "vq": (interop.to_diffusers_vq, VQModel)}


def draw(kind: str, seed: int) -> AutoencoderConfig:
    """An autoencoder of random widths, levels and groups, downsampling by 1 to 8."""
    pick = random.Random(f"{kind}{seed}")
    groups = pick.choice([2, 4])
    return AutoencoderConfig(
        kind="vq" if kind == "vq" else "kl",
        in_channels=pick.choice([1, 3]),
        latent_channels=pick.choice([3, 4, 8, 16]),
        channels=[groups * pick.choice([1, 2, 3, 4]) for _ in range(pick.choice([1, 2, 3, 4]))],
        blocks=pick.choice([1, 2]),
        attention=pick.random() < 0.7,
        groups=groups,
        quant_convolutions=kind != "sd3",
        codebook_size=pick.choice([5, 64]) if kind == "vq" else None,
    )


def pair_of(config: AutoencoderConfig, seed: int) -> tuple[Autoencoder, nn.Module]:
    """Ours with random weights, so that nothing is zero, and diffusers' with the same, each in its place."""
    ours = build.seeded(lambda: build.autoencoder(config), seed).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in ours.named_parameters():
        spread = 0.5 if parameter.ndim == 1 else 1.3 * parameter[0].numel() ** -0.5
        centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        parameter.data.normal_(centre, spread, generator=generator)
    for codebook in ours.buffers():
        codebook.normal_(generator=generator)
    to, theirs_of = TO[config.kind]
    described, state = to(config, ours.state_dict(), shift=0.0, scale=1.0, size=64)
    theirs = theirs_of(**described).eval()
    theirs.load_state_dict({key: value.clone() for key, value in state.items()})
    return ours, theirs


def pictures(config: AutoencoderConfig, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 + seed)
    side = config.downsampling
    shape = (2, config.in_channels, side * max(24 // side, 2), side * max(32 // side, 3))
    return torch.rand(shape, generator=generator) * 2 - 1


def moments(net: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    """Mean and log-variance, or the latent that is quantised."""
    found = net.encode(x)
    if isinstance(net, Autoencoder):
        return (found.mean_BChw, found.logvar_BChw) if net.config.kind == "kl" else (found.mean_BChw,)
    return (found.latent_dist.mean, found.latent_dist.logvar) if isinstance(net, AutoencoderKL) else (found.latents,)


def picture(net: nn.Module, latent: Tensor) -> Tensor:
    found = net.decode(latent)
    return found if isinstance(found, Tensor) else found.sample


def largest(a: Tensor, b: Tensor) -> float:
    """Largest difference in parts of the expected's scale."""
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize(("kind", "seed"), CASES)
def test_pictures_and_latents_are_diffusers(kind, seed):
    config = draw(kind, seed)
    ours, theirs = pair_of(config, seed)
    x = pictures(config, seed)
    with torch.no_grad():
        expected = moments(theirs, x)
        for got, wanted in zip(moments(ours, x), expected, strict=True):
            assert largest(got, wanted) <= 1e-5
        assert largest(picture(ours, expected[0]), picture(theirs, expected[0])) <= 1e-5


@pytest.mark.parametrize(("kind", "seed"), CASES)
def test_gradients_are_diffusers(kind, seed):
    """Of all weights and of the input, in both halves; through the quantisation, straight."""
    config = draw(kind, seed)
    ours, theirs = pair_of(config, seed)
    x = pictures(config, seed)
    with torch.no_grad():
        start = moments(theirs, x)[0]
    found = []
    for net in (ours, theirs):
        leaf, latent = x.clone().requires_grad_(True), start.clone().requires_grad_(True)
        weigh = torch.Generator().manual_seed(seed)
        total = torch.zeros(())
        for value in (*moments(net, leaf), picture(net, latent) if config.kind == "kl" else decoded(net, latent)):
            total = total + (value * torch.randn(value.shape, generator=weigh)).sum()
        total.backward()
        found.append((net, leaf.grad, latent.grad))
    (_, at_x, at_latent), (_, their_x, their_latent) = found
    assert largest(at_x, their_x) <= 1e-5
    assert largest(at_latent, their_latent) <= 1e-5
    back = interop.from_diffusers_vq if config.kind == "vq" else interop.from_diffusers_kl
    described = {key: value for key, value in theirs.config.items() if not key.startswith("_")}
    gradients = {key: p.grad for key, p in theirs.named_parameters() if p.grad is not None}
    theirs_renamed = back(described, gradients).state
    mine = {key: p.grad for key, p in ours.named_parameters()}
    scale = max(float(g.abs().max()) for g in mine.values())
    for key, gradient in mine.items():
        assert float((gradient - theirs_renamed[key]).abs().max()) <= 1e-5 * scale, key


def decoded(net: nn.Module, latent: Tensor) -> Tensor:
    """A VQ model's decoding with the gradient passed by the quantisation, which our `decode` does in training alone."""
    if not isinstance(net, Autoencoder):
        return picture(net, latent)
    return net.decoder(latent + (net.quantizer(latent) - latent).detach())


def quantised_picture(net: nn.Module, latent: Tensor) -> Tensor:
    """Decoding past the quantisation, which in bf16 finds other vectors in diffusers."""
    if isinstance(net, Autoencoder):
        return net.decoder(latent)
    return net.decode(latent).sample if isinstance(net, AutoencoderKL) else net.decode(latent, True).sample


def test_bf16_is_no_further_from_fp32_than_diffusers():
    """The median over the configurations drawn: one alone is a matter of luck."""
    ratios = []
    for kind, seed in CASES:
        config = draw(kind, seed)
        ours, theirs = pair_of(config, seed)
        x = pictures(config, seed)
        with torch.no_grad():
            exact = moments(theirs, x)
            drawn = picture(theirs, exact[0])
            read = ours.quantizer(exact[0]) if kind == "vq" else exact[0]
            errors = []
            for net in (ours, theirs):
                net.to(torch.bfloat16)
                half = quantised_picture(net, read.bfloat16())
                at_picture = (half.float() - drawn).square().mean()
                at_latent = (moments(net, x.bfloat16())[0].float() - exact[0]).square().mean()
                errors.append((at_latent.sqrt(), at_picture.sqrt()))
        ratios += [float(a / b) for a, b in zip(*errors, strict=True)]
    assert len(ratios) >= 20
    print(f"bf16's error against diffusers', median of {len(ratios)}: {statistics.median(ratios):.3f}")
    assert statistics.median(ratios) <= 1.1


@pytest.mark.slow
def test_the_full_size_autoencoder_is_diffusers():
    config = AutoencoderConfig()
    ours, theirs = pair_of(config, 0)
    x = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        expected = moments(theirs, x)
        for got, wanted in zip(moments(ours, x), expected, strict=True):
            assert largest(got, wanted) <= 1e-4
        assert largest(picture(ours, expected[0]), picture(theirs, expected[0])) <= 1e-4
