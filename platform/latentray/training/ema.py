"""Exponential moving average of the weights, over each rank's own fp32 partition: no gather, no second network.

beta = 0.5^(samples per step / half-life), so the average means the same at any batch size (Karras et al. 2024, EDM2).
Early on the average is that of what there is: beta is capped at (1 + n)/(10 + n) for the n-th update.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

from latentray.training import partitions
from latentray.training.engine import Engine
from latentray.training.partitions import Pieces, Snapshot

UPDATES = "ema_updates"
"""Name of the number of updates, among a checkpoint's scalars."""


class EMA:
    """The average of one engine's weights; every rank holds the part it optimises."""

    def __init__(self, engine: Engine, *, half_life_samples: int) -> None:
        self.engine = engine
        self.half_life_samples = half_life_samples
        self.updates = 0
        self.partitions: list[Tensor] = [engine.copy_of(p) for p in engine.master_partitions()]

    @torch.no_grad()
    def update(self, samples: int) -> None:
        """Move towards the weights; call it after each optimizer step, with the samples of its global batch."""
        self.updates += 1
        beta = min(0.5 ** (samples / self.half_life_samples), (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self.partitions, [p.detach() for p in self.engine.master_partitions()], 1 - beta)

    @contextlib.contextmanager
    def _swapped_in(self) -> Iterator[None]:
        masters = [p.data for p in self.engine.master_partitions()]
        kept = [self.engine.copy_of(p) for p in masters]
        for master, average in zip(masters, self.partitions, strict=True):
            master.copy_(average)
        try:
            yield
        finally:
            for master, before in zip(masters, kept, strict=True):
                master.copy_(before)

    @torch.no_grad()
    def full_state(self) -> dict[str, Tensor]:
        """The whole averaged fp32 state dict on the CPU. Collective: every rank must call it."""
        with self._swapped_in():
            return self.engine.full_state()

    def restore(self, pieces: Pieces) -> None:
        """Take the average over from a checkpoint of any world size and ZeRO stage."""
        self.updates = int(pieces.scalars[UPDATES])
        partitions.restore(pieces, partitions.EMA, self.engine.fragments(), self.partitions)

    def snapshot(self) -> Snapshot:
        """A copy of this rank's share of the engine, with the average."""
        made = self.engine.snapshot(self.partitions)
        return dataclasses.replace(made, scalars=made.scalars | {UPDATES: self.updates})
