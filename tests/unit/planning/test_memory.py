"""Memory by ZeRO stage: the published closed forms, and what DeepSpeed really holds."""

import gc
import warnings

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from latentray import build
from latentray.config import compose
from latentray.config.train import DeepSpeedConfig, Train
from latentray.planning import memory, optimizer_state
from latentray.planning.accelerators import ACCELERATORS
from latentray.planning.workload import Linear, Network, Workload
from latentray.training.ema import EMA
from latentray.training.engine import Engine

P, N = 1_000_000, 4
NET = Network(name="denoiser", parameters=P, averaged=True, optimizer_numbers=2 * P)


def held(stage: int, weight_bytes: int, *, world: int = N, net: Network = NET, **deepspeed) -> memory.States:
    return memory.states(net, stage=stage, world=world, weight_bytes=weight_bytes, offload=DeepSpeedConfig(**deepspeed))


@pytest.mark.parametrize(
    ("stage", "weight_bytes", "per_parameter"),
    [
        (0, 4, 16),  # AdamW in fp32: weight, gradient, two moments
        (1, 2, 2 + 2 + 12 / N),  # Rajbhandari et al. 2020, figure 1, with K = 12
        (2, 2, 2 + (2 + 12) / N),
        (3, 2, (2 + 2 + 12) / N),
        (1, 4, 4 + 4 + 12 / N),  # the fp32 copy is kept beside fp32 weights
    ],
)
def test_the_published_closed_forms(stage, weight_bytes, per_parameter):
    found = held(stage, weight_bytes, extra={"zero_optimization": {"stage3_max_live_parameters": 0}})
    assert found.weights + found.gradients + found.optimizer == per_parameter * P
    assert found.average == (4 * P if stage == 0 else 4 * P / N)


def test_stage_3_gathers_no_more_than_it_may():
    assert held(3, 2).weights == 2 * P / N + 2 * P
    limited = held(3, 2, extra={"zero_optimization": {"stage3_max_live_parameters": P // 10}})
    assert limited.weights == 2 * P / N + 2 * P // 10
    assert held(3, 2, world=1).weights == 2 * P


def test_an_offload_moves_bytes_and_loses_none():
    here, there = held(2, 2), held(2, 2, offload_optimizer="cpu")
    assert there.optimizer == there.average == 0
    assert there.host == here.optimizer + here.average + 4 * P / N  # and the fp32 gradients its step needs
    assert held(3, 2, offload_parameters="cpu").host == 2 * P / N
    disk = {"nvme_path": "/scratch"}
    mapped = held(2, 2, offload_optimizer="nvme", **disk)
    assert (mapped.disk, mapped.host, mapped.optimizer) == (there.host, 0, 0)
    assert held(3, 2, offload_parameters="nvme", **disk).disk == 2 * P / N


def test_the_discriminator_has_no_average_and_frozen_networks_have_only_weights():
    frozen = Network(name="LPIPS", parameters=500, trained=False, bytes=2_000)
    critic = Network(name="discriminator", parameters=P, optimizer_numbers=2 * P)
    assert memory.checkpoint_bytes([NET, critic, frozen]) == 16 * P + 12 * P
    assert memory.result_bytes([NET, critic, frozen]) == 4 * P
    made = memory.memory(_work(NET, critic, frozen), _train(), DEVICE, stage=1, world=N, micro_batch=1, lazy=True)
    assert made.frozen == 2_000
    assert made.average == P
    assert made.optimizer == 2 * 12 * P // N


DEVICE = ACCELERATORS["rtx4090"]


def _train(*overrides: str) -> Train:
    return compose.load("train", Train, ["tracking=none", "cluster=none", *overrides])


def _work(*networks: Network, per_sample: float = 1e6, peak: float = 1.2e6) -> Workload:
    return Workload(
        networks=networks or (NET,),
        activations=Linear(fixed=0, per_sample=per_sample),
        peak=Linear(fixed=1e7, per_sample=peak),
        flops={"bf16": 1.0},
    )


@settings(max_examples=60, deadline=None)
@given(
    stage=st.sampled_from(memory.STAGES),
    parameters=st.integers(1, 3 * 10**9),
    world=st.sampled_from([1, 2, 8, 64]),
    per_sample=st.floats(1e5, 1e10),
    headroom=st.floats(0.01, 0.5),
)
def test_the_largest_micro_batch_fits_and_the_next_does_not(stage, parameters, world, per_sample, headroom):
    work = _work(
        Network(name="d", parameters=parameters, averaged=True, optimizer_numbers=2 * parameters),
        per_sample=per_sample,
        peak=1.1 * per_sample,
    )
    config = _CONFIG

    def total(micro_batch: int) -> int:
        made = memory.memory(work, config, DEVICE, stage=stage, world=world, micro_batch=micro_batch, lazy=False)
        assert made.total >= sum(getattr(made, part) for part in made.PARTS)
        return made.total

    largest = memory.largest_micro_batch(work, config, DEVICE, stage=stage, world=world, headroom=headroom, lazy=False)
    assert largest == 0 or total(largest) <= memory.usable(DEVICE, headroom)
    assert total(largest + 1) > memory.usable(DEVICE, headroom)


_CONFIG = _train()


@given(parameters=st.integers(10**6, 10**10), world=st.sampled_from([2, 8, 64]))
def test_a_higher_stage_never_takes_more_until_weights_are_gathered(parameters, world):
    net = Network(name="d", parameters=parameters, averaged=True, optimizer_numbers=2 * parameters)
    totals = []
    for stage in (1, 2):
        found = held(stage, 2, world=world, net=net)
        totals.append(found.weights + found.gradients + found.optimizer + found.average)
    assert totals[1] < totals[0]


@pytest.fixture(scope="module")
def alone():
    """A process group of this process alone."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29541",
        }.items():  # fmt: skip
            patch.setenv(name, value)
        begun = not dist.is_initialized()
        if begun:
            dist.init_process_group("gloo", rank=0, world_size=1)
        yield
        if begun:
            dist.destroy_process_group()


def living_bytes() -> int:
    """Of all tensors in this process that have contents, each storage once."""
    gc.collect()
    found: dict[int, int] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for one in gc.get_objects():
            # What oneDNN packs, as compiled networks of other tests are, has no storage.
            if type(one) in (torch.Tensor, nn.Parameter) and one.device.type == "cpu" and not one.is_mkldnn:
                for tensor in (one, one.grad):
                    if tensor is not None:
                        found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    found.pop(0, None)
    return sum(found.values())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "precision", "optimizer"),
    [
        (0, "fp32", "adamw"),
        (1, "bf16", "adamw"),
        (1, "fp32", "adamw"),
        (2, "bf16", "adamw"),
        (3, "bf16", "adamw"),
        (0, "fp32", "adafactor"),
        (0, "fp32", "muon"),
        (1, "bf16", "muon"),
        (2, "bf16", "muon"),
    ],
)
def test_deepspeed_holds_what_the_plan_says(alone, stage, precision, optimizer, monkeypatch):
    monkeypatch.setattr(build, "require_compiler", lambda: None)
    width, layers, bucket = 256, 8, 100_000
    config = _train(
        f"deepspeed=zero{stage}", f"precision={precision}", "global_batch_size=4",
        f"+deepspeed.extra.zero_optimization.reduce_bucket_size={bucket}", f"optimizer={optimizer}",
    )  # fmt: skip
    before = living_bytes()
    net = nn.Sequential(nn.Sequential(*(nn.Linear(width, width) for _ in range(layers))))
    kept, staged = optimizer_state.numbers(optimizer, net), optimizer_state.staged(optimizer, net)
    parameters = sum(p.numel() for p in net.parameters())
    engine = Engine(net, config, world=1, device=torch.device("cpu"))
    average = EMA(engine, half_life_samples=100)
    x = torch.zeros(4, width, dtype=engine.dtype)
    with torch.compiler.set_stance("force_eager"):  # Muon's kernels: the same tensors without a compiler
        for step in range(2):
            loss = engine(x).float().square().mean()
            engine.backward(loss)
            del loss
            if step == 0:
                engine.step()
                average.update(4)
    found = memory.states(
        Network(name="net", parameters=parameters, averaged=True, optimizer_numbers=kept, staged_numbers=staged),
        stage=stage,
        world=1,
        weight_bytes=memory.weight_bytes(precision, stage),
        offload=config.deepspeed,
    )
    buffer = found.buffers if stage == 3 else 0  # stages 1 and 2 let go of it when the backward pass ends
    expected = found.weights + found.gradients + found.optimizer + found.average + buffer
    assert living_bytes() - before == pytest.approx(expected, rel=0.02)
    engine.close()
