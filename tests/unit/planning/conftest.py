"""A configuration so small that its step can be run beside its plan."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from latentray.config import compose
from latentray.config.plan import PlanConfig

TINY = [
    "gpu=cpu", "gpus=1", "precision=fp32", "tracking=none", "cluster=none", "size=64", "global_batch_size=24",
    "total_samples=4800", "checkpoint_every_samples=0", "autoencoder.channels=[16,32]", "autoencoder.groups=8",
    "autoencoder.blocks=1", "denoiser.channels=[16,32]", "denoiser.groups=8", "denoiser.depth=[0,1]",
    "denoiser.heads=2", "denoiser.context_width=16",
]  # fmt: skip
STAGE1 = [
    "stage=autoencoder", "stage.lpips.weight=0", "stage.discriminator.channels=8", "stage.discriminator.layers=1",
    "stage.discriminator.start_samples=0",
]  # fmt: skip


@pytest.fixture(scope="session")
def tiny() -> Callable[..., PlanConfig]:
    """tiny(*overrides): the small configuration with overrides; of stage 2 unless one is stage=autoencoder."""

    def load(*more: str) -> PlanConfig:
        return compose.load("plan", PlanConfig, [*TINY, *(STAGE1 if "stage=autoencoder" in more else ()), *more])

    return load
