"""What a training run will take, before anything is paid for; and afterwards, beside what it took."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from latentray.config.plan import PlanConfig
from latentray.planning import accelerators, cost, memory, throughput, workload
from latentray.planning.accelerators import Accelerator
from latentray.planning.memory import Memory
from latentray.planning.workload import Network, Workload
from latentray.reporting.progress import duration

_TOO_OFTEN = 0.05
"""Share of the time in checkpoints from which on a plan warns."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StagePlan:
    """One ZeRO stage."""

    stage: int
    memory: Memory
    """With the run's micro-batch."""
    fits: bool
    largest_micro_batch: int
    """0 where not even one sample fits."""
    largest_checkpointed: int | None
    """The same with denoiser.checkpoint_activations=true; None in stage 1, which has no such setting."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """Throughput and what follows from it."""

    samples_per_second: float
    """Of all workers together."""
    utilisation: float
    """Share of the devices' peak."""
    hours: float
    cost: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoints:
    """What checkpoints take, and how often they should be written."""

    bytes: int
    """Of one."""
    kept_bytes: int
    """Of those kept, and the one being written."""
    result_bytes: int
    write_s: float
    interval_s: float
    """Between two of them as configured; the whole run where there are none."""
    best_interval_s: float
    lost_share: float
    """Of the time, as configured: written checkpoints, and work that failures undo."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """A run's plan; sizes are per worker, samples per second those of all."""

    gpu: str
    gpus: int
    price_per_gpu_hour: float
    device_bytes: int
    usable_bytes: int
    precision: str
    zero_stage: int
    micro_batch: int
    accumulation: int
    total_samples: int
    networks: tuple[Network, ...]
    flops_per_sample: dict[str, float]
    stages: tuple[StagePlan, ...]
    assumed: Estimate
    measured: Estimate | None
    checkpoints: Checkpoints
    warnings: tuple[str, ...]

    @property
    def own_stage(self) -> StagePlan:
        """That of the run's ZeRO stage."""
        return self.stages[self.zero_stage]

    def to_json(self) -> dict[str, Any]:
        found = dataclasses.asdict(self)
        for one, stage in zip(found["stages"], self.stages, strict=True):
            one["memory"]["total"] = stage.memory.total
        return found


def plan(config: PlanConfig) -> Plan:
    """Plan a run. Raises ConfigError or InputMissing for a `measured` that cannot be read."""
    return of_workload(config, *workloads(config))


def workloads(config: PlanConfig) -> tuple[Workload, Workload | None]:
    """What a step takes: as configured, and with checkpointed activations (None in stage 1)."""

    def measure(one: PlanConfig) -> Workload:
        return workload.measure(
            one, gpu=config.gpu != "cpu", text_tokens=config.text_tokens, clip_frames=config.clip_frames
        )

    taken = measure(config)
    if config.stage.name == "autoencoder":
        return taken, None
    if config.denoiser.checkpoint_activations:
        return taken, taken
    denoiser = dataclasses.replace(config.denoiser, checkpoint_activations=True)
    return taken, measure(dataclasses.replace(config, denoiser=denoiser))


def of_workload(config: PlanConfig, taken: Workload, checkpointed: Workload | None) -> Plan:
    """The plan that follows from what a step takes."""
    device = accelerators.find(config.gpu, workers=config.workers)
    micro, accumulation = config.micro_and_accumulation(config.workers)
    price = device.price_per_hour if config.price_per_gpu_hour is None else config.price_per_gpu_hour
    rate = throughput.samples_per_second(taken.flops, device, gpus=config.workers, utilisation=config.mfu)
    assumed = _estimate(config, taken, device, price, rate)
    measured = None
    if config.measured is not None:
        measured = _estimate(config, taken, device, price, throughput.measured(config.measured))
    made = Plan(
        gpu=config.gpu,
        gpus=config.workers,
        price_per_gpu_hour=price,
        device_bytes=device.memory_bytes,
        usable_bytes=memory.usable(device, config.headroom),
        precision=config.precision,
        zero_stage=config.deepspeed.zero_stage,
        micro_batch=micro,
        accumulation=accumulation,
        total_samples=config.total_samples,
        networks=taken.networks,
        flops_per_sample=taken.flops,
        stages=tuple(_stage(config, device, stage, micro, taken, checkpointed) for stage in memory.STAGES),
        assumed=assumed,
        measured=measured,
        checkpoints=_checkpoints(config, taken, (measured or assumed).samples_per_second),
        warnings=(),
    )
    return dataclasses.replace(made, warnings=tuple(_warnings(made, config)))


def _stage(
    config: PlanConfig, device: Accelerator, stage: int, micro: int, taken: Workload, checkpointed: Workload | None
) -> StagePlan:
    lazy = config.gpu == "cpu"
    need = memory.memory(taken, config, device, stage=stage, world=config.workers, micro_batch=micro, lazy=lazy)

    def largest(work: Workload) -> int:
        return memory.largest_micro_batch(
            work, config, device, stage=stage, world=config.workers, headroom=config.headroom, lazy=lazy
        )

    return StagePlan(
        stage=stage,
        memory=need,
        fits=need.total <= memory.usable(device, config.headroom),
        largest_micro_batch=largest(taken),
        largest_checkpointed=None if checkpointed is None else largest(checkpointed),
    )


def _estimate(config: PlanConfig, taken: Workload, device: Accelerator, price: float, rate: float) -> Estimate:
    hours = config.total_samples / rate / 3600
    return Estimate(
        samples_per_second=rate,
        utilisation=throughput.utilisation(taken.flops, device, gpus=config.workers, samples_per_second=rate),
        hours=hours,
        cost=cost.price(hours, config.workers, price),
    )


def _checkpoints(config: PlanConfig, taken: Workload, rate: float) -> Checkpoints:
    size = memory.checkpoint_bytes(taken.networks)
    write_s = size / (config.storage_gb_per_s * 1e9)
    between = cost.between_failures_s(config.gpu_hours_between_failures, config.workers)
    every = min(config.checkpoint_every_samples or config.total_samples, config.total_samples)
    return Checkpoints(
        bytes=size,
        kept_bytes=size * (config.keep_checkpoints + 1) if config.checkpoint_every_samples else 0,
        result_bytes=memory.result_bytes(taken.networks),
        write_s=write_s,
        interval_s=every / rate,
        best_interval_s=cost.best_interval(write_s, between),
        lost_share=cost.lost_share(every / rate, write_s if config.checkpoint_every_samples else 0.0, between),
    )


def _warnings(made: Plan, config: PlanConfig) -> list[str]:
    found = []
    own = made.own_stage
    if not own.fits:
        found.append(
            f"It does not fit: {_gib(own.memory.total)} of {_gib(made.usable_bytes)} with a micro-batch of "
            f"{made.micro_batch}. {_mend(made, config)}"
        )
    saved = made.checkpoints
    if saved.interval_s > saved.best_interval_s:
        every = max(int(saved.best_interval_s * (made.measured or made.assumed).samples_per_second), 1)
        begins = "No checkpoint is written" if not config.checkpoint_every_samples else "A checkpoint is written"
        found.append(
            f"{begins} for {duration(saved.interval_s)}; with a failure each "
            f"{duration(cost.between_failures_s(config.gpu_hours_between_failures, made.gpus))} the least time is lost "
            f"with one each {duration(saved.best_interval_s)}: checkpoint_every_samples={every}."
        )
    elif saved.write_s > _TOO_OFTEN * saved.interval_s:
        found.append(
            f"Writing a checkpoint takes {duration(saved.write_s)}, and one comes each {duration(saved.interval_s)}: "
            f"raise checkpoint_every_samples, or storage_gb_per_s if the storage is faster."
        )
    if made.measured is not None and made.measured.utilisation > 1:
        found.append(
            f"The measured throughput is {made.measured.utilisation:.0%} of these GPUs' peak: was it measured with this "
            "configuration, on such GPUs?"
        )
    if config.online.enabled:
        found.append("The text encoder's own memory and time are not counted; captions seen once are remembered.")
    return found


def _mend(made: Plan, config: PlanConfig) -> str:
    """What to set so that the run fits, the smallest change first."""
    own, share = made.own_stage, config.global_batch_size // made.gpus
    if own.largest_micro_batch:
        fitting = max(m for m in range(1, own.largest_micro_batch + 1) if share % m == 0)
        return f"Set micro_batch_size={fitting}."
    if own.largest_checkpointed:
        return "Set denoiser.checkpoint_activations=true and a smaller micro_batch_size."
    for one in made.stages[made.zero_stage + 1 :]:
        if one.largest_micro_batch or one.largest_checkpointed:
            return f"Set deepspeed.zero_stage={one.stage} and a smaller micro_batch_size."
    return "Take more GPUs with ZeRO stage 3, larger ones, or deepspeed.offload_optimizer=cpu."


def _gib(count: int) -> str:
    return f"{count / 2**30:,.1f} GiB"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """One quantity, planned and actual."""

    name: str
    planned: float
    actual: float

    @property
    def ratio(self) -> float:
        """Actual over planned."""
        return self.actual / self.planned


def beside(planned: Plan | Mapping[str, Any], actual: Mapping[str, float]) -> list[Comparison]:
    """Set a plan (or its JSON) beside what a run took; what was not measured, or not planned, is left out.

    Args:
        actual: of `samples_per_second`, `peak_memory_bytes` (of a worker), `hours` and `checkpoint_bytes`.
    """
    made = planned.to_json() if isinstance(planned, Plan) else planned
    expected = made["measured"] or made["assumed"]
    foreseen = {
        "samples_per_second": expected["samples_per_second"],
        "peak_memory_bytes": made["stages"][made["zero_stage"]]["memory"]["total"],
        "hours": expected["hours"],
        "checkpoint_bytes": made["checkpoints"]["bytes"],
    }
    return [
        Comparison(name=name, planned=float(value), actual=float(actual[name]))
        for name, value in foreseen.items()
        if name in actual and value > 0
    ]
