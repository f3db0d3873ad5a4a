"""What a step costs beside the network, and that it waits for nothing: ratios within one run. `make bench` prints them."""

from __future__ import annotations

import time
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from latentray import build
from latentray.config.denoiser import DenoiserConfig
from latentray.diffusion import samplers, schedules
from latentray.diffusion.executor import Slots, Table

pytestmark = pytest.mark.slow
VP, FLOW, VE = schedules.scaled_linear(1000), schedules.RectifiedFlow(), schedules.VarianceExploding()
SHAPE = (4, 32, 32)
STEPS = 40
TABLES = [
    samplers.table(name, schedule, prediction, STEPS, **options)
    for name, schedule, prediction, options in (
        ("ddpm", VP, "v", {}), ("ddim", VP, "v", {"eta": 0.5}), ("euler", VP, "v", {}), ("euler_ancestral", VP, "v", {}),
        ("heun", VP, "v", {}), ("dpmpp_2m", VP, "v", {}), ("dpmpp_3m", VP, "v", {}), ("dpmpp_2m_sde", VP, "v", {}),
        ("unipc", VP, "v", {"order": 3}), ("flow_euler", FLOW, "flow", {}), ("flow_heun", FLOW, "flow", {}),
        ("langevin", VE, "edm", {"inner_steps": 1}),
    )
]  # fmt: skip


def itself(x: Tensor, t: Tensor, rows: Tensor) -> Tensor:
    return x


def ready_noise(rows: Sequence[int], row: int) -> Tensor:
    return NOISE[: len(rows)]


NOISE = torch.randn(len(TABLES), *SHAPE, generator=torch.Generator().manual_seed(0))


def filled(tables: Sequence[Table], *, device: str = "cpu") -> Slots:
    slots = Slots(len(tables), SHAPE, dtype=torch.float32, device=device)
    for i, table in enumerate(tables):
        slots.admit(i, table, NOISE[i])
    return slots


def seconds_per_step(tables: Sequence[Table]) -> float:
    """The fastest of several walks: what the machine does besides only adds."""
    everyone, best = range(len(tables)), float("inf")
    for _ in range(7):
        slots = filled(tables)
        begin = time.perf_counter()
        for _ in range(STEPS):
            slots.advance(everyone, itself, ready_noise)
        best = min(best, (time.perf_counter() - begin) / STEPS)
    return best


@torch.inference_mode()
def test_a_step_costs_at_most_half_a_percent_of_the_network() -> None:
    config = DenoiserConfig(
        channels=[112, 112], blocks=1, depth=[0, 1], heads=None, head_dim=56, context_width=64, groups=16,
        linear_projection=True,
    )  # fmt: skip
    net = build.seeded(lambda: build.denoiser(config), 0).eval()
    parameters = sum(p.numel() for p in net.parameters())
    assert 3.5e6 <= parameters <= 4.6e6
    x, t, context = NOISE[:1], torch.tensor([500.0]), torch.randn(1, 16, 64)
    net(x, t, context)
    forward = float("inf")
    for _ in range(9):
        begin = time.perf_counter()
        net(x, t, context)
        forward = min(forward, time.perf_counter() - begin)
    worst = 0.0
    for table in TABLES:
        worst = max(worst, seconds_per_step([table]))
    print(
        f"\nstep: {worst * 1e3:.3f} ms beside {forward * 1e3:.1f} ms ({parameters / 1e6:.1f} M) = {worst / forward:.2%}"
    )
    assert worst <= 0.005 * forward


@torch.inference_mode()
def test_the_cost_does_not_grow_with_the_number_of_solvers() -> None:
    """Twelve of one solver against twelve solvers, with and without fresh noise in the one."""
    mixed = seconds_per_step(TABLES)
    for one in (TABLES[0], TABLES[6]):
        same = seconds_per_step([one] * len(TABLES))
        print(f"\n12 solvers: {mixed * 1e3:.3f} ms, 1 solver: {same * 1e3:.3f} ms, {mixed / same:.2f}x")
        assert mixed <= 1.5 * same
