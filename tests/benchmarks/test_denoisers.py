"""What the U-Net costs beside diffusers' with the same weights: ratios within one run. `make bench` prints them.

bf16 on one thread, levels of 64, 128 and 256 channels with attention at each, heads of 64, 32x32 latents, 77 text tokens.
Forward, ours is compiled as the sampler has it (`build.tuned`).
Each of diffusers' modes is timed in turn with each of ours, in CPU seconds of the one thread, which other work on the
machine disturbs least. Compiling takes minutes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import pytest
import torch
from interleaved import medians, products_of
from torch import Tensor, nn

from latentray import build
from latentray.checkpoint import interop_denoisers as interop
from latentray.config.denoiser import DenoiserConfig
from latentray.models import torchvision_ops

torchvision_ops.ensure_importable()
from diffusers import UNet2DConditionModel  # noqa: E402  (it imports torchvision)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
CONFIG = DenoiserConfig(
    channels=[64, 128, 256], depth=[1, 1, 1], heads=None, head_dim=64, context_width=768, linear_projection=True
)
FORMATS = {"": torch.contiguous_format, ", channels_last": torch.channels_last}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch._dynamo.reset()
    yield
    torch.set_num_threads(threads)


def pair(memory_format: torch.memory_format) -> tuple[nn.Module, Callable[..., Tensor]]:
    """Ours and diffusers' with the same weights, called alike."""
    ours = build.seeded(lambda: build.denoiser(CONFIG), 0).eval()
    described, state = interop.to_diffusers_unet(CONFIG, ours.state_dict())
    theirs = UNet2DConditionModel(**described).eval()
    theirs.load_state_dict(state)
    return tuple(net.to(dtype=torch.bfloat16, memory_format=memory_format) for net in (ours, theirs))


def inputs(batch: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, context = (torch.randn(shape, generator=generator) for shape in ((batch, 4, 32, 32), (batch, 77, 768)))
    return x.bfloat16(), torch.full((batch,), 500.0), context.bfloat16()


def report(title: str, seconds: Mapping[str, float]) -> dict[str, float]:
    """Print all; the best of ours and of diffusers', eager and compiled."""
    best = {
        whose: min(value for name, value in seconds.items() if name.startswith(whose))
        for whose in ("ours eager", "ours compiled", "diffusers eager", "diffusers compiled")
    }
    print(f"\n{title}")
    for name, value in seconds.items():
        ratio = best["diffusers eager"] / value
        print(f"  {name:36s} {value * 1e3:8.1f} ms, {ratio:.2f}x diffusers' best eager")
    return best


def tuned(call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """A call that is compiled, at its first time, as the sampler has its networks compiled."""

    def made() -> Tensor:
        with build.tuned(torch.device("cpu")):
            return call()

    return made


def modes(
    run: Callable[[Callable[..., object]], Callable[[], Tensor]], ours_compiled: Callable[..., Callable[[], Tensor]]
) -> dict[str, Callable[[], Tensor]]:
    """Every mode's call: both networks, in both memory formats, eager and compiled."""
    calls: dict[str, Callable[[], Tensor]] = {}
    for suffix, memory_format in FORMATS.items():
        ours, theirs = pair(memory_format)
        for whose, net in (("ours", ours), ("diffusers", theirs)):
            calls[f"{whose} eager{suffix}"] = run(net)
            compiled = run(torch.compile(net, dynamic=False))
            calls[f"{whose} compiled{suffix}"] = ours_compiled(compiled) if whose == "ours" else compiled
    return calls


def require_equal(calls: Mapping[str, Callable[[], Tensor]]) -> None:
    """Raise where a mode's result is not diffusers' own, to bf16's rounding."""
    expected = calls["diffusers eager"]().float()
    for name, call in calls.items():
        assert (call().float() - expected).abs().max() < 0.05 * expected.abs().max(), name


def values(output: object) -> Tensor:
    return output if isinstance(output, Tensor) else output.sample


@pytest.mark.parametrize("batch", [8, 1])
def test_forward(batch: int) -> None:
    given = inputs(batch)

    def run(net: Callable[..., object]) -> Callable[[], Tensor]:
        @torch.no_grad()
        def call() -> Tensor:
            return values(net(*given))

        return call

    calls = modes(run, tuned)
    require_equal(calls)
    _, theirs = pair(torch.channels_last)
    alone = products_of(theirs, run(theirs))
    best = report(f"forward, batch {batch}", medians({**calls, "convolutions and products alone": alone}))
    assert best["ours eager"] < best["diffusers eager"]


@pytest.mark.parametrize("batch", [8, 1])
def test_forward_and_backward(batch: int) -> None:
    given = inputs(batch)

    def run(net: Callable[..., object]) -> Callable[[], Tensor]:
        x = given[0].clone().requires_grad_()

        def call() -> Tensor:
            x.grad = None
            values(net(x, *given[1:])).float().square().mean().backward()
            assert x.grad is not None
            return x.grad

        return call

    calls = modes(run, lambda call: call)
    require_equal(calls)
    best = report(f"forward and backward, batch {batch}", medians(calls))
    assert best["ours eager"] < best["diffusers eager"]
