"""What sampling costs beside the network itself: ratios within one run. `make bench` prints them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import pytest
import torch

from latentray import build
from latentray.config.denoiser import DenoiserConfig
from latentray.config.objective import ObjectiveConfig
from latentray.diffusion import guidance, samplers, schedules

pytestmark = pytest.mark.slow
HANG_LIMIT_S = 60.0


def median_seconds(call: Callable[[], object], repeats: int = 9) -> float:
    call()
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


@pytest.fixture(scope="module")
def unet() -> torch.nn.Module:
    config = DenoiserConfig(
        channels=[128, 128], blocks=1, depth=[0, 1], heads=None, head_dim=64, context_width=64, linear_projection=True
    )
    return build.seeded(lambda: build.denoiser(config), 0).eval()


@torch.inference_mode()
def test_executor_beside_the_network(unet: torch.nn.Module) -> None:
    """Share of a sampling step that is not the network, batch 1, 32x32 latents."""
    schedule = schedules.build(ObjectiveConfig(schedule="cosine", prediction="v"))
    table = samplers.table("dpmpp_2m", schedule, "v", 10)
    x, context = torch.randn(1, 4, 32, 32), torch.randn(1, 16, 64)
    whole = median_seconds(lambda: samplers.execute([table], x, lambda u, t, rows: unet(u, t, context), no_noise))
    alone = median_seconds(lambda: samplers.execute([table], x, lambda u, t, rows: u, no_noise))
    print(f"\nexecutor: {alone / 10 * 1e3:.3f} ms of {whole / 10 * 1e3:.2f} ms per step = {alone / whole:.2%}")
    assert whole < HANG_LIMIT_S


@torch.inference_mode()
def test_batched_guidance_against_two_calls(unet: torch.nn.Module) -> None:
    """One call for both halves of classifier-free guidance against two calls, batch 4, 8x8 latents."""
    x, t, context = torch.randn(4, 4, 8, 8), torch.full((4,), 500.0), torch.randn(4, 16, 64)
    empty, scale = torch.zeros_like(context), torch.full((4,), 5.0)

    def batched() -> torch.Tensor:
        both = unet(torch.cat([x, x]), torch.cat([t, t]), torch.cat([empty, context]))
        return guidance.classifier_free(*both.chunk(2), scale)

    def apart() -> torch.Tensor:
        return guidance.classifier_free(unet(x, t, empty), unet(x, t, context), scale)

    torch.testing.assert_close(batched(), apart(), rtol=1e-4, atol=1e-4)
    one, two = median_seconds(batched), median_seconds(apart)
    print(f"\nguidance in one call: {one * 1e3:.1f} ms, in two: {two * 1e3:.1f} ms, {two / one:.2f}x")
    assert one < HANG_LIMIT_S


def no_noise(rows: object, row: int) -> torch.Tensor:
    raise AssertionError("a deterministic solver asked for noise")
