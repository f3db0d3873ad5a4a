"""Networks drawn at random give diffusers' numbers from the same weights: outputs, gradients and bf16's error."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from latentray import build
from latentray.checkpoint import interop_denoisers as interop
from latentray.config.denoiser import DenoiserConfig
from latentray.models import torchvision_ops
from latentray.models.mmdit import MMDiT
from latentray.models.unet import UNet

torchvision_ops.ensure_importable()
from diffusers import SD3Transformer2DModel, UNet2DConditionModel  # noqa: E402  (it imports torchvision)

KINDS = ("sd1", "sd2", "sdxl", "refiner", "classes", "alone")
CASES = [("unet", kind, seed) for kind in KINDS for seed in range(3)]
CASES += [("mmdit", kind, seed) for kind in ("sd3", "sd35") for seed in range(4)]


def draw_unet(kind: str, seed: int) -> DenoiserConfig:
    """A U-Net of one of SD's kinds, of random widths, levels, heads and depths."""
    pick = random.Random(f"{kind}{seed}")
    levels, groups, head_dim = pick.choice([1, 2, 3]), pick.choice([2, 4]), pick.choice([4, 8])
    channels = [math.lcm(groups, head_dim) * pick.choice([1, 2, 3]) for _ in range(levels)]
    depth = [pick.choice([0, 1, 2]) for _ in range(levels)]
    heads = pick.choice(
        [
            {"heads": pick.choice([1, 2, 4])},
            {"heads": None, "head_dim": head_dim},
            {"heads": None, "level_heads": [pick.choice([1, 2, 4]) for _ in range(levels)]},
        ]
    )
    return DenoiserConfig(
        in_channels=pick.choice([3, 4, 9]),
        out_channels=pick.choice([3, 4]),
        channels=channels,
        blocks=pick.choice([1, 2]),
        depth=depth,
        middle_depth=depth[-1] or pick.choice([1, 2]),
        linear_projection=kind != "sd1",
        groups=groups,
        context_width=None if kind in ("classes", "alone") else pick.choice([6, 10]),
        pooled_width=pick.choice([5, 12]) if kind in ("sdxl", "refiner") else None,
        size_numbers={"sdxl": 6, "refiner": 5}.get(kind, 0),
        size_width=pick.choice([4, 8]),
        classes=pick.choice([3, 7]) if kind == "classes" else None,
        **heads,
    )


def draw_mmdit(kind: str, seed: int) -> DenoiserConfig:
    """SD 3, or SD 3.5 with normalised queries and keys and maybe dual attention."""
    pick = random.Random(f"{kind}{seed}")
    layers = pick.choice([1, 2, 4])
    return DenoiserConfig(
        family="mmdit",
        in_channels=pick.choice([3, 4, 16]),
        out_channels=pick.choice([4, 16]),
        context_width=pick.choice([6, 10]),
        pooled_width=pick.choice([5, 12]),
        heads=pick.choice([1, 2, 3]),
        head_dim=pick.choice([4, 8]),
        layers=layers,
        patch=pick.choice([1, 2]),
        max_grid=pick.choice([12, 15]),
        base_grid=pick.choice([4, 9]),
        qk_norm=kind == "sd35",
        dual_attention=list(range(pick.randint(0, layers))) if kind == "sd35" else [],
    )


def pair_of(family: str, kind: str, seed: int) -> tuple[UNet | MMDiT, nn.Module]:
    """Ours with random weights, so that nothing is zero, and diffusers' with the same, each in its place."""
    config = draw_unet(kind, seed) if family == "unet" else draw_mmdit(kind, seed)
    ours = build.seeded(lambda: build.denoiser(config), seed).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in ours.named_parameters():
        spread = 0.5 if parameter.ndim == 1 else 1.3 * parameter[0].numel() ** -0.5
        centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        parameter.data.normal_(centre, spread, generator=generator)
    if family == "unet":
        described, state = interop.to_diffusers_unet(config, ours.state_dict())
        theirs: nn.Module = UNet2DConditionModel(**described)
    else:
        described, state = interop.to_diffusers_mmdit(config, ours.state_dict())
        theirs = SD3Transformer2DModel(**described)
    theirs.load_state_dict(state)  # strict: every weight has its place
    return ours, theirs.eval()


def inputs_of(config: DenoiserConfig, seed: int) -> dict[str, Tensor]:
    """Two samples on a latent that is not square, and for a U-Net one that does not halve evenly either."""
    generator = torch.Generator().manual_seed(seed + 100)
    side = (10, 13) if config.family == "unet" else (8 * config.patch, 5 * config.patch)
    given = {
        "x": torch.randn(2, config.in_channels, *side, generator=generator),
        "t": torch.tensor([3.0, 981.0]),
    }
    if config.context_width is not None:
        given["context"] = torch.randn(2, 5, config.context_width, generator=generator)
    if config.pooled_width is not None:
        given["pooled"] = torch.randn(2, config.pooled_width, generator=generator)
    if config.size_numbers:
        given["size"] = torch.randint(0, 1024, (2, config.size_numbers), generator=generator).float()
    if config.classes is not None:
        given["labels"] = torch.tensor([1, config.classes])
    return given


def call_ours(net: UNet | MMDiT, given: Mapping[str, Tensor]) -> Tensor:
    return net(given["x"], given["t"], given.get("context"), **{name: given[name] for name in net.config.reads})


def call_theirs(net: nn.Module, given: Mapping[str, Tensor]) -> Tensor:
    if isinstance(net, SD3Transformer2DModel):
        return net(given["x"], given["context"], given["pooled"], given["t"]).sample
    added = {"text_embeds": given.get("pooled"), "time_ids": given.get("size")}
    return net(
        given["x"], given["t"], given.get("context"), class_labels=given.get("labels"), added_cond_kwargs=added
    ).sample


def cast(given: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Latent, text and pooled text in a network's type; times, sizes and labels as they are."""
    return {name: value.to(dtype) if name in ("x", "context", "pooled") else value for name, value in given.items()}


def error(got: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest number expected."""
    return float((got - expected).detach().abs().max() / expected.detach().abs().max())


@pytest.mark.parametrize(("family", "kind", "seed"), CASES)
def test_outputs_are_those_of_diffusers(family, kind, seed):
    ours, theirs = pair_of(family, kind, seed)
    given = inputs_of(ours.config, seed)
    with torch.no_grad():
        expected = call_theirs(theirs, given)
        assert error(call_ours(ours, given), expected) <= 1e-5
    assert error(call_ours(ours, given), expected) <= 1e-5  # with gradients the CPU takes another attention path


@pytest.mark.parametrize(("family", "kind", "seed"), CASES)
def test_every_gradient_is_that_of_diffusers(family, kind, seed):
    """In float64, where what is left between two ways to the same gradient cannot hide a wrong one."""
    ours, theirs = pair_of(family, kind, seed)
    given = cast(inputs_of(ours.config, seed), torch.float64)
    outputs = call_ours(ours.double(), given), call_theirs(theirs.double(), given)
    weight = torch.randn(outputs[0].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for output in outputs:
        (output * weight).sum().backward()
    to = interop.to_diffusers_unet if family == "unet" else interop.to_diffusers_mmdit
    gradients = {name: p.grad for name, p in ours.named_parameters()} | dict(ours.named_buffers())
    _, renamed = to(ours.config, gradients)
    expected = {name: p.grad for name, p in theirs.named_parameters()}
    scale = max(float(grad.abs().max()) for grad in expected.values())
    for name, grad in expected.items():
        # diffusers takes the root mean square of queries and keys in float32 whatever their type
        assert float((renamed[name] - grad).abs().max()) <= (1e-6 if ours.config.qk_norm else 1e-10) * scale, name
    assert error(*outputs) <= (1e-6 if ours.config.qk_norm else 1e-10)


@pytest.mark.parametrize(
    ("grad", "memory_format"),
    [(False, torch.contiguous_format), (False, torch.channels_last), (True, torch.contiguous_format)],
)
def test_bf16_is_as_exact_as_in_diffusers(grad, memory_format):
    ratios = []
    for case in CASES[::2]:
        ours, theirs = pair_of(*case)
        given = inputs_of(ours.config, case[2])
        low = cast(given, torch.bfloat16)
        with torch.set_grad_enabled(grad):
            exact = call_theirs(theirs, given)
            ours, theirs = ours.to(torch.bfloat16, memory_format=memory_format), theirs.bfloat16()
            got = call_ours(ours, low).float(), call_theirs(theirs, low).float()
        own, other = (float((one - exact).detach().square().mean().sqrt()) for one in got)
        ratios.append(own / other)
    assert len(ratios) >= 10
    assert statistics.median(ratios) <= 1.1


@pytest.mark.slow
def test_stable_diffusion_15_at_full_size():
    config = DenoiserConfig()
    ours = build.seeded(lambda: UNet(config), 0).eval().requires_grad_(False)
    described, state = interop.to_diffusers_unet(config, ours.state_dict())
    with torch.device("meta"):
        theirs = UNet2DConditionModel(**described)
    theirs.load_state_dict(state, assign=True)  # the same memory: twice 3.4 GB would not fit everywhere
    assert build.parameter_count(ours) == 859_520_964
    generator = torch.Generator().manual_seed(0)
    x, context = torch.randn(1, 4, 32, 32, generator=generator), torch.randn(1, 77, 768, generator=generator)
    t = torch.tensor([601.0])
    with torch.inference_mode():
        assert error(ours(x, t, context), theirs.eval()(x, t, context).sample) <= 1e-4
