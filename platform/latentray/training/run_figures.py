"""What the lines of `metrics.jsonl` say of a whole run: medians, totals over its attempts, and where its time went."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from latentray.reporting.curves import series
from latentray.tracking import names

Records = Sequence[Mapping[str, Any]]
"""The lines of `metrics.jsonl`, as `curves.parse` reads them."""


def last(records: Records, name: str) -> float | None:
    """The last finite value of a metric."""
    values = series(records, name)[1]
    return float(values[-1]) if len(values) else None


def most(records: Records, name: str) -> float | None:
    """The largest finite value of a metric."""
    values = series(records, name)[1]
    return float(values.max()) if len(values) else None


def median(records: Records, name: str) -> float | None:
    """The median of a metric's finite values."""
    values = series(records, name)[1]
    return statistics.median(values.tolist()) if len(values) else None


def over_attempts(records: Records, name: str) -> float | None:
    """A count that begins anew with each attempt, summed over the attempts."""
    highest: dict[Any, float] = {}
    for record in records:
        value = last([record], name)
        if value is not None:
            attempt = record.get(names.RUN_RESTARTS, 0)
            highest[attempt] = max(highest.get(attempt, 0.0), value)
    return sum(highest.values()) if highest else None


def seconds(records: Records) -> float | None:
    """Wall time from the run's first step to its last one that was logged, the time between its attempts included."""
    steps = [record for record in records if names.TRAIN_SAMPLES_PER_SECOND in record]  # and not what the export adds
    timed = [record for record in steps if isinstance(record.get("time"), int | float)]
    if not timed:
        return None
    rate = last(timed[:1], names.TRAIN_SAMPLES_PER_SECOND)
    before_first = float(timed[0]["samples"]) / rate if rate else 0.0  # a line stands at the end of what it tells of
    return float(timed[-1]["time"]) - float(timed[0]["time"]) + before_first


def time_shares(records: Records) -> dict[str, float]:
    """Share of the run's time that went into steps that count (`steps`), and that was lost to each cause."""
    goodput = last(records, names.RUN_GOODPUT)
    if goodput is None:
        return {}
    prefix = names.lost_to("")
    causes = dict.fromkeys(name for record in records for name in record if name.startswith(prefix))
    lost = {cause.removeprefix(prefix): last(records, cause) or 0.0 for cause in causes}
    return {"steps": goodput} | lost


def actual(records: Records, *, finished: bool) -> dict[str, float]:
    """What a run took, in the words of a plan (`planning.plan.beside`): hours only of a run that came to its end."""
    elapsed = seconds(records)
    found = {
        "samples_per_second": median(records, names.TRAIN_SAMPLES_PER_SECOND),
        "peak_memory_bytes": most(records, names.TRAIN_PEAK_MEMORY_BYTES),
        "hours": elapsed / 3600 if elapsed is not None and finished else None,
    }
    return {name: value for name, value in found.items() if value is not None}
