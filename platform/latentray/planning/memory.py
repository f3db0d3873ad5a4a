"""Memory of one worker by ZeRO stage (Rajbhandari et al. 2020), as DeepSpeed and `training.ema` hold it. Pure.

With P parameters over N workers, w bytes a weight (2 in bf16, else 4) and M numbers that the optimizer keeps of them (2 P
with AdamW, fewer with Muon and Adafactor), a worker holds:

    stage       weights          gradients   fp32 copy   optimizer   average
    0           w P              w P         -           4 M         4 P
    1           w P              w P         4 P/N       4 M/N       4 P/N
    2           w P              w P/N       4 P/N       4 M/N       4 P/N
    3           w P/N + gathered w P/N       4 P/N       4 M/N       4 P/N

Stages 1 to 3 keep the fp32 copy even where the weights are fp32. Stage 3 leaves up to
`stage3_max_live_parameters` gathered. Gradients are reduced through a buffer of `reduce_bucket_size` elements.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable

from latentray.config.train import DeepSpeedConfig, Train
from latentray.planning.accelerators import Accelerator
from latentray.planning.workload import Network, Workload

STAGES = (0, 1, 2, 3)
_BUCKET_ELEMENTS = 500_000_000
_LIVE_ELEMENTS = 1_000_000_000
"""DeepSpeed's defaults."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one device at the worst moment of a step, and what an offload puts into the machine's memory."""

    weights: int
    gradients: int
    optimizer: int
    """fp32 copy of the weights, and what the optimizer keeps of them."""
    average: int
    """Exponential moving average."""
    buffers: int
    """For reducing gradients."""
    frozen: int
    """Networks that are not trained."""
    activations: int
    workspace: int
    """Beside the activations, at the peak of forward and backward pass."""
    reserved: int
    """Context and libraries."""
    updating: int
    """The most that lives while the optimizer steps, when activations are gone and fp32 gradients are there."""
    host: int = 0
    """In the machine's memory, per worker."""
    disk: int = 0
    """On the node's disk, per worker."""

    PARTS = (
        "weights", "gradients", "optimizer", "average", "buffers", "frozen", "activations", "workspace", "reserved",
    )  # fmt: skip

    @property
    def total(self) -> int:
        """The greater of the two moments."""
        return max(sum(getattr(self, part) for part in self.PARTS), self.updating)


@dataclasses.dataclass(frozen=True, kw_only=True)
class States:
    """Bytes of one trained network on one worker, without its activations."""

    weights: float
    gradients: float
    optimizer: float
    average: float
    buffers: float
    stepping: float
    """Gradients while the optimizer steps: its own share, flat, in fp32 as well."""
    host: float = 0.0
    disk: float = 0.0


def states(
    network: Network, *, stage: int, world: int, weight_bytes: int, offload: DeepSpeedConfig, lazy: bool = False
) -> States:
    """The table above for one network.

    Args:
        weight_bytes: 2 or 4.
        offload: where DeepSpeed's settings put the optimizer and the weights.
        lazy: on a CPU, where a buffer takes memory only as far as it is used.
    """
    p, w, moments = network.parameters, weight_bytes, 4 * network.optimizer_numbers
    own = p / world
    zero = offload.extra.get("zero_optimization", {})
    bucket = int(zero.get("reduce_bucket_size", _BUCKET_ELEMENTS))
    bucket = min(bucket, p) if lazy else bucket
    average = 4 * (own if stage else p) if network.averaged else 0.0
    if stage == 0:
        return States(weights=w * p, gradients=w * p, optimizer=moments, average=average, buffers=0, stepping=w * p)
    weights, optimizer = float(w * p), 4 * own + moments / world
    away = {"none": 0.0, "cpu": 0.0, "nvme": 0.0}
    if stage == 3:
        held = w * own if offload.offload_parameters == "none" else 0.0
        away[offload.offload_parameters] += w * own - held
        weights = held + (w * min(p, int(zero.get("stage3_max_live_parameters", _LIVE_ELEMENTS))) if world > 1 else 0)
    if offload.offload_optimizer != "none":
        away[offload.offload_optimizer] += optimizer + average + 4 * own
        optimizer, average = 0.0, 0.0
    buffered = bool(zero.get("contiguous_gradients", True))
    return States(
        weights=weights,
        gradients=w * (p if stage == 1 else own) + w * network.staged_numbers / world,
        optimizer=optimizer,
        average=average,
        buffers=float(w * bucket if buffered else 0),
        stepping=w * own + (w + 4) * own,
        host=away["cpu"],
        disk=away["nvme"],
    )


def memory(
    workload: Workload, config: Train, device: Accelerator, *, stage: int, world: int, micro_batch: int, lazy: bool
) -> Memory:
    """Bytes of one worker with a ZeRO stage and a micro-batch."""
    w = weight_bytes(config.precision, stage)
    found = [
        states(one, stage=stage, world=world, weight_bytes=w, offload=config.deepspeed, lazy=lazy)
        for one in workload.networks
        if one.trained
    ]
    frozen = sum(one.bytes for one in workload.networks if not one.trained)
    activations = workload.activations.at(micro_batch)
    held = _sum(one.weights + one.optimizer + one.average for one in found) + frozen + device.reserved_bytes
    return Memory(
        weights=_sum(one.weights for one in found),
        gradients=_sum(one.gradients for one in found),
        optimizer=_sum(one.optimizer for one in found),
        average=_sum(one.average for one in found),
        buffers=_sum(one.buffers for one in found),
        frozen=frozen,
        activations=math.ceil(activations),
        workspace=math.ceil(max(workload.peak.at(micro_batch) - activations, 0)),
        reserved=device.reserved_bytes,
        updating=held + _sum(one.stepping for one in found),
        host=_sum(one.host for one in found),
        disk=_sum(one.disk for one in found),
    )


def largest_micro_batch(
    workload: Workload, config: Train, device: Accelerator, *, stage: int, world: int, headroom: float, lazy: bool
) -> int:
    """The most samples at a time that fit with `headroom`, a share of the memory, left free; 0 where none does."""

    def fits(micro_batch: int) -> bool:
        need = memory(workload, config, device, stage=stage, world=world, micro_batch=micro_batch, lazy=lazy).total
        return need <= usable(device, headroom)

    if not fits(1):
        return 0
    low, high = 1, 2
    while fits(high) and high < 1 << 20:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def usable(device: Accelerator, headroom: float) -> int:
    """Bytes that a plan may fill; what is left covers fragmentation."""
    return int(device.memory_bytes * (1 - headroom))


def weight_bytes(precision: str, stage: int) -> int:
    """Of one weight as the network computes with it. Stage 0 has no bf16 weights: autocast takes their place."""
    return 2 if precision == "bf16" and stage else 4


def checkpoint_bytes(networks: Iterable[Network]) -> int:
    """Of one checkpoint: fp32 weights, the optimizer's numbers and the average, each share once, whatever the ZeRO stage."""
    return sum(
        4 * (one.parameters * (2 if one.averaged else 1) + one.optimizer_numbers) for one in networks if one.trained
    )


def result_bytes(networks: Iterable[Network]) -> int:
    """Of what a run leaves: the averaged weights in fp32."""
    return sum(4 * one.parameters for one in networks if one.averaged)


def _sum(parts: Iterable[float]) -> int:
    return math.ceil(sum(parts))
