"""What precomputing latents will take, from a few batches measured: hours, bytes, cost, and whether storing them pays."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from latentray.data.latent_encoder import Encoder
from latentray.data.latent_parts import Job, read_part
from latentray.data.latent_plan import Part
from latentray.data.latent_shards import record_bytes
from latentray.reporting.progress import duration

_BATCHES, _MOST_BATCHES = 3, 8
"""Parts that are measured: where all are of one shape, and where there are many."""
_UNITS = ("bytes", "kB", "MB", "GB", "TB", "PB")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    """One unit's share of a few batches; its records in several stores count as one."""

    decode_seconds: float
    """Of one core: read, check, decode, cut."""
    encode_seconds: float
    """Of one encoder: pictures and captions."""
    bytes: float
    """In the store."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a job would take. Hours are of the clock, with all encoders busy; costs are in the currency of the prices."""

    samples: int
    records: int
    copied: int
    """Records that an older store holds."""
    bytes: int
    hours: float
    encoders: int
    decode_cores: float
    """Cores that keep the encoders busy."""
    cost: float
    """Encoding, and storage."""
    online_hours: float
    """Encoder hours that stage 2 would spend if it encoded as it goes, a picture each time it is seen."""
    online_cost: float
    break_even_epochs: float
    """From so many epochs on, storing is cheaper."""
    storing_is_cheaper: bool

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def lines(self) -> list[str]:
        """For a reader."""
        verdict = "storing latents is cheaper" if self.storing_is_cheaper else "encoding as stage 2 goes is cheaper"
        return [
            f"{self.samples:,} samples give {self.records:,} records, {in_bytes(self.bytes)}; "
            f"{self.copied:,} of them are copied from older latents.",
            f"Once started {in_time(self.hours * 3600)} with {self.encoders} encoders, "
            f"which {figure(self.decode_cores)} cores keep busy; cost {figure(self.cost)}.",
            f"Encoding as stage 2 goes: {in_time(self.online_hours * 3600)} of one encoder, cost {figure(self.online_cost)}.",
            f"From {figure(self.break_even_epochs)} epochs on storing pays: here, {verdict}.",
        ]


def in_bytes(count: float) -> str:
    """Bytes for a reader: `512 bytes`, `1.40 MB`, `23.4 TB`."""
    power = 0
    while round(count) >= 1000 and power < len(_UNITS) - 1:
        count, power = count / 1000, power + 1
    return f"{figure(count)} {_UNITS[power]}" if power else f"{count:.0f} bytes"


def in_time(seconds: float) -> str:
    """As `duration`, but for less than a second too: `40 ms`."""
    return f"{figure(seconds * 1000)} ms" if 0 < seconds < 0.95 else duration(seconds)


def figure(value: float) -> str:
    """Three digits at least, whatever the size: `0`, `0.00123`, `4.50`, `12,345`."""
    if value == 0:
        return "0"
    digits = max(2 - math.floor(math.log10(abs(value))), 0)
    return f"{value:,.{digits}f}"


def estimate(
    measured: Measured,
    *,
    samples: int,
    records: int,
    copied: int,
    encoders: int,
    epochs: float,
    price_per_hour: float,
    storage_price: float,
) -> Estimate:
    """The arithmetic. Without a price per hour, hours are compared and storage is taken as free.

    Args:
        samples: pictures in the data set.
        records: records that the store will hold; `copied` of them cost no encoding.
        encoders: how many work at a time.
        epochs: how often stage 2 will see each picture.
        price_per_hour: of one encoder.
        storage_price: of 10^12 bytes for as long as they are kept.
    """
    stored_hours = (records - copied) * measured.encode_seconds / 3600
    epoch_hours = samples * measured.encode_seconds / 3600
    storage = records * measured.bytes / 1e12 * storage_price
    price = price_per_hour or 1.0
    spent = stored_hours * price + (storage if price_per_hour else 0.0)
    return Estimate(
        samples=samples,
        records=records,
        copied=copied,
        bytes=round(records * measured.bytes),
        hours=stored_hours / encoders,
        encoders=encoders,
        decode_cores=encoders * measured.decode_seconds / measured.encode_seconds,
        cost=stored_hours * price_per_hour + storage,
        online_hours=epoch_hours * epochs,
        online_cost=epoch_hours * epochs * price_per_hour,
        break_even_epochs=spent / (epoch_hours * price) if epoch_hours else 0.0,
        storing_is_cheaper=spent < epoch_hours * epochs * price,
    )


def measure(job: Job, parts: Sequence[Part]) -> Measured:
    """Read and encode a few parts, spread over shapes and data, in this process. The first is not timed: it warms up."""
    several = len({part.bucket for part in parts})
    ordered = sorted(parts, key=lambda part: part.bucket)  # evenly spaced ones then meet each shape by its share
    wanted = min(_BATCHES + several - 1, _MOST_BATCHES)
    chosen = [ordered[i] for i in np.unique(np.linspace(0, len(parts) - 1, wanted + 1).round().astype(int))]
    encoder = Encoder(job)
    encoder.encode(read_part(job, chosen[0]))
    reading = encoding = size = 0.0
    units = 0
    for part in chosen[1:] or chosen:
        began = time.perf_counter()
        parcel = read_part(job, part)
        read = time.perf_counter()
        encoded = encoder.encode(parcel)
        encoding += time.perf_counter() - read
        reading += read - began
        size += record_bytes(job, encoded)
        units += len(part.units)
    return Measured(decode_seconds=reading / units, encode_seconds=encoding / units, bytes=size / units)
