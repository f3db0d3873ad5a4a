"""Hours, money, and how often a checkpoint pays. Pure."""

from __future__ import annotations

import math


def best_interval(checkpoint_s: float, between_failures_s: float) -> float:
    """Seconds of work between checkpoints that lose the least time (Daly 2006, equation 37; Young 1974 is its first term).

    Args:
        checkpoint_s: how long writing one takes.
        between_failures_s: mean time between failures of the whole run.
    """
    if checkpoint_s >= 2 * between_failures_s:
        return between_failures_s
    ratio = checkpoint_s / (2 * between_failures_s)
    young = math.sqrt(2 * checkpoint_s * between_failures_s)
    return young * (1 + math.sqrt(ratio) / 3 + ratio / 9) - checkpoint_s


def lost_share(interval_s: float, checkpoint_s: float, between_failures_s: float) -> float:
    """Share of the time that goes into checkpoints and into work done twice (Young 1974): C/T + T/(2 M)."""
    return checkpoint_s / interval_s + interval_s / (2 * between_failures_s)


def between_failures_s(gpu_hours: float, gpus: int) -> float:
    """Seconds between failures of a run, from the hours one GPU works between failures."""
    return gpu_hours * 3600 / gpus


def price(hours: float, gpus: int, per_gpu_hour: float) -> float:
    return hours * gpus * per_gpu_hour
