"""What a run can be put on: memory, peak arithmetic and a price to begin with, from the makers' data sheets."""

from __future__ import annotations

import dataclasses
import os
import time

import torch

from latentray.errors import ConfigError

MIB = 1 << 20
_RESERVED = 2048 * MIB


@dataclasses.dataclass(frozen=True, kw_only=True)
class Accelerator:
    """One device of a kind."""

    memory_bytes: int
    """As its driver reports it."""
    bf16_flops: float
    """Peak of dense bf16 products with fp32 sums, per second."""
    fp32_flops: float
    """Peak of products of fp32 tensors: TF32 on tensor cores, which convolutions take by default."""
    price_per_hour: float
    """An order of size of what clouds ask, in dollars; `price_per_gpu_hour` gives your own."""
    reserved_bytes: int = _RESERVED
    """Held by the CUDA context, NCCL's channels and the libraries' workspaces before the first tensor."""


ACCELERATORS: dict[str, Accelerator] = {
    "h100": Accelerator(memory_bytes=81_559 * MIB, bf16_flops=989.4e12, fp32_flops=494.7e12, price_per_hour=2.5),
    "h200": Accelerator(memory_bytes=143_771 * MIB, bf16_flops=989.4e12, fp32_flops=494.7e12, price_per_hour=3.5),
    "a100-80": Accelerator(memory_bytes=81_920 * MIB, bf16_flops=312e12, fp32_flops=156e12, price_per_hour=1.6),
    "a100-40": Accelerator(memory_bytes=40_960 * MIB, bf16_flops=312e12, fp32_flops=156e12, price_per_hour=1.2),
    "l40s": Accelerator(memory_bytes=46_068 * MIB, bf16_flops=362e12, fp32_flops=183e12, price_per_hour=1.0),
    "rtx4090": Accelerator(memory_bytes=24_564 * MIB, bf16_flops=165.2e12, fp32_flops=82.6e12, price_per_hour=0.4),
}
"""SXM modules where there is a choice. `cpu` is this machine, measured: see `find`."""

NAMES = (*ACCELERATORS, "cpu")


def find(name: str, *, workers: int = 1) -> Accelerator:
    """The accelerator of a name; for `cpu` this machine's share of one of `workers`, its peak measured in 0.2 s."""
    if name == "cpu":
        return Accelerator(
            memory_bytes=machine_memory() // workers,
            bf16_flops=_products_per_second(torch.bfloat16),
            fp32_flops=_products_per_second(torch.float32),
            price_per_hour=0.0,
            reserved_bytes=512 * MIB,  # the interpreter with torch and DeepSpeed
        )
    if name not in ACCELERATORS:
        raise ConfigError(f"There is no GPU {name!r}.", where="gpu", mend=f"Known: {', '.join(NAMES)}.")
    return ACCELERATORS[name]


def machine_memory() -> int:
    """Bytes of memory of this machine, or of its container where that has less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        with open("/sys/fs/cgroup/memory.max", encoding="ascii") as file:
            return min(total, int(file.read()))
    except (OSError, ValueError):  # no cgroup v2, or "max"
        return total


def _products_per_second(dtype: torch.dtype, *, side: int = 768, tries: int = 5) -> float:
    """The best of a few square products in the threads torch has now, in FLOP/s (a multiply and an add are two)."""
    a = torch.ones(side, side, dtype=dtype)
    a @ a
    spent = []
    for _ in range(tries):
        began = time.perf_counter()
        a @ a
        spent.append(time.perf_counter() - began)
    return 2 * side**3 / min(spent)
