"""What a whole training step costs beside a loop as diffusers' own scripts and accelerate make it: ratios within one run.

Forward, backward, clipping, AdamW and the average of the weights, of the U-Net of `test_denoisers.py` at batch 8. Theirs: fp32
weights under autocast to bf16, torch's default AdamW (and the fused one), diffusers' EMAModel, in both memory formats. Ours: the
engine and the average that every run has, bf16 over fp32 master weights. CPU seconds of one thread, in turn.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
from interleaved import medians
from torch import Tensor
from torch.nn import functional as F

from latentray import build
from latentray.checkpoint import interop_denoisers as interop
from latentray.config.cluster import ClusterConfig
from latentray.config.deepspeed import DeepSpeedConfig
from latentray.config.denoiser import DenoiserConfig
from latentray.config.train import Train
from latentray.models import torchvision_ops
from latentray.training.ema import EMA
from latentray.training.engine import Engine

torchvision_ops.ensure_importable()
from diffusers import UNet2DConditionModel  # noqa: E402  (it imports torchvision)
from diffusers.training_utils import EMAModel  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
CONFIG = DenoiserConfig(
    channels=[64, 128, 256], depth=[1, 1, 1], heads=None, head_dim=64, context_width=768, linear_projection=True
)
BATCH, LR = 8, 1e-4
Step = Callable[[], float]
"""One step of training; its loss."""


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One thread, and a process group of one."""
    monkeypatch.setenv("LOCAL_RANK", "0")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch._dynamo.reset()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
    torch.set_num_threads(threads)


@functools.cache
def batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Noisy latents, noise levels, context and the target."""
    made = torch.Generator().manual_seed(0)
    x, context, target = (
        torch.randn(shape, generator=made) for shape in ((BATCH, 4, 32, 32), (BATCH, 77, 768), (BATCH, 4, 32, 32))
    )
    return x, torch.linspace(0, 999, BATCH), context, target


def ours(*, compiled: bool) -> Step:
    config = Train(
        global_batch_size=BATCH, total_samples=10**6, precision="bf16", compile=compiled,
        deepspeed=DeepSpeedConfig(zero_stage=1), cluster=ClusterConfig(kind="none"),
    )  # fmt: skip
    net = build.seeded(lambda: build.denoiser(CONFIG), 0)
    engine = Engine(net, config, world=1, device=torch.device("cpu"))
    engine.set_lr(LR)
    ema = EMA(engine, half_life_samples=1000)
    x, t, context, target = batch()

    def step() -> float:
        y = engine(x.to(engine.dtype), t, context.to(engine.dtype))
        loss = F.mse_loss(y.float(), target)
        engine.backward(loss)
        engine.step()
        ema.update(BATCH)
        return float(loss.detach())

    return step


def theirs(*, memory_format: torch.memory_format, compiled: bool, fused: bool) -> Step:
    described, state = interop.to_diffusers_unet(CONFIG, build.seeded(lambda: build.denoiser(CONFIG), 0).state_dict())
    net = UNet2DConditionModel(**described).train()
    net.load_state_dict(state)
    net = net.to(memory_format=memory_format)
    optimizer = torch.optim.AdamW(net.parameters(), lr=LR, fused=fused)
    ema = EMAModel(net.parameters(), model_cls=UNet2DConditionModel, model_config=net.config)
    call = torch.compile(net, dynamic=False) if compiled else net
    x, t, context, target = batch()

    def step() -> float:
        with torch.autocast("cpu", torch.bfloat16):
            y = call(x, t, context).sample
        loss = F.mse_loss(y.float(), target)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ema.step(net.parameters())
        return float(loss.detach())

    return step


def test_a_training_step() -> None:
    last = torch.channels_last
    steps = {
        "ours": ours(compiled=False),
        "ours, compiled": ours(compiled=True),
        "diffusers": theirs(memory_format=torch.contiguous_format, compiled=False, fused=False),
        "diffusers, channels_last": theirs(memory_format=last, compiled=False, fused=False),
        "diffusers, channels_last, fused AdamW": theirs(memory_format=last, compiled=False, fused=True),
        "diffusers, compiled": theirs(memory_format=torch.contiguous_format, compiled=True, fused=False),
        "diffusers, compiled, channels_last, fused AdamW": theirs(memory_format=last, compiled=True, fused=True),
    }
    losses = {name: [step() for _ in range(3)] for name, step in steps.items()}  # it warms up, too
    for name, found in losses.items():
        assert found == pytest.approx(losses["diffusers"], rel=0.02), name
    seconds = medians(steps, warm_ups=0)
    loop = min(seconds["diffusers"], seconds["diffusers, channels_last"])
    print(f"\na training step, batch {BATCH}")
    for name, value in seconds.items():
        print(f"  {name:48s} {value * 1e3:8.1f} ms, {loop / value:.2f}x the accelerate-style loop")
    assert min(seconds["ours"], seconds["ours, compiled"]) < loop
