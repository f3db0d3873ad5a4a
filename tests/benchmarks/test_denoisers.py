"""What the U-Net costs beside diffusers' with the same weights: ratios within one run. `make bench` prints them.

bf16 on one thread, levels of 64, 128 and 256 channels with attention at each, heads of 64, 32x32 latents, 77 text tokens.
Each of diffusers' modes is timed in turn with each of ours, in CPU seconds of the one thread, which other work on the
machine disturbs least. Compiling takes minutes.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping

import pytest
import torch
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
REPEATS = 9


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


def medians(calls: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Median CPU seconds of each, in turn, after two calls to warm up."""
    for call in calls.values():
        call()
        call()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(REPEATS):
        for name, call in calls.items():
            begin = time.thread_time()
            call()
            seconds[name].append(time.thread_time() - begin)
    return {name: statistics.median(many) for name, many in seconds.items()}


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


def modes(run: Callable[[Callable[..., object]], Callable[[], object]]) -> dict[str, Callable[[], object]]:
    """Every mode's call: both networks, in both memory formats, eager and compiled in the better one."""
    calls: dict[str, Callable[[], object]] = {}
    for suffix, memory_format in FORMATS.items():
        ours, theirs = pair(memory_format)
        for whose, net in (("ours", ours), ("diffusers", theirs)):
            calls[f"{whose} eager{suffix}"] = run(net)
            calls[f"{whose} compiled{suffix}"] = run(torch.compile(net, dynamic=False))
    return calls


def values(output: object) -> Tensor:
    return output if isinstance(output, Tensor) else output.sample


@pytest.mark.parametrize("batch", [8, 1])
def test_forward(batch: int) -> None:
    given = inputs(batch)

    def run(net: Callable[..., object]) -> Callable[[], object]:
        @torch.no_grad()
        def call() -> Tensor:
            return values(net(*given))

        return call

    calls = modes(run)
    expected = calls["diffusers eager"]().float()
    for name, call in calls.items():
        assert (call().float() - expected).abs().max() < 0.05 * expected.abs().max(), name
    best = report(f"forward, batch {batch}", medians(calls))
    assert best["ours eager"] < best["diffusers eager"]


@pytest.mark.parametrize("batch", [8, 1])
def test_forward_and_backward(batch: int) -> None:
    given = inputs(batch)

    def run(net: Callable[..., object]) -> Callable[[], object]:
        def call() -> None:
            values(net(*given)).float().square().mean().backward()

        return call

    best = report(f"forward and backward, batch {batch}", medians(modes(run)))
    assert best["ours eager"] < best["diffusers eager"]
