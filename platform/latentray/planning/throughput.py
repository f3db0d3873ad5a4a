"""Samples per second: from FLOPs and a share of the peak that is assumed, or from what was measured. Pure but for `measured`."""

from __future__ import annotations

import statistics
from collections.abc import Mapping

from latentray.checkpoint import store
from latentray.errors import ConfigError, InputMissing
from latentray.planning.accelerators import Accelerator
from latentray.reporting import curves
from latentray.tracking import names


def seconds_at_peak(flops: Mapping[str, float], device: Accelerator) -> float:
    """The least time one device needs for one sample."""
    return flops.get("bf16", 0.0) / device.bf16_flops + flops.get("fp32", 0.0) / device.fp32_flops


def samples_per_second(flops: Mapping[str, float], device: Accelerator, *, gpus: int, utilisation: float) -> float:
    """Of all devices together, at a share of their peak (model FLOPs utilisation)."""
    return gpus * utilisation / seconds_at_peak(flops, device)


def utilisation(flops: Mapping[str, float], device: Accelerator, *, gpus: int, samples_per_second: float) -> float:
    """The inverse: which share of the peak a throughput is."""
    return samples_per_second * seconds_at_peak(flops, device) / gpus


def measured(given: str) -> float:
    """Samples per second: a number, or the median of a run's `metrics.jsonl` without its first record, the warm-up.

    Raises ConfigError for a number that is not positive, InputMissing for a file that is not there or holds no throughput.
    """
    try:
        rate = float(given)
    except ValueError:
        rate = _median(given)
    if not rate > 0:
        raise ConfigError(f"{given} samples per second?", where="measured", mend="Give a positive number or a file.")
    return rate


def _median(uri: str) -> float:
    where = uri if uri.endswith(".jsonl") else store.join(uri, "metrics.jsonl")
    _, values = curves.series(curves.parse(store.read_bytes(where).decode()), names.TRAIN_SAMPLES_PER_SECOND)
    if len(values) == 0:
        raise InputMissing(
            f"The file holds no {names.TRAIN_SAMPLES_PER_SECOND}.",
            where=where,
            mend="Give a training run's metrics.jsonl.",
        )
    return statistics.median(values[1:] if len(values) > 1 else values)
