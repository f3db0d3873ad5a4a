"""What one worker knows of its run."""

from __future__ import annotations

import dataclasses

import torch

from latentray.config.train import Train


@dataclasses.dataclass(frozen=True, kw_only=True)
class Worker:
    """This worker's place in the run, and where the run lies."""

    config: Train
    run: str
    out: str
    """The run's folder, a path or URI."""
    rank: int
    world: int
    device: torch.device
    attempt: str
    """Differs each time the worker group starts; part of every checkpoint's prefix, so that attempts never mix."""

    @property
    def leads(self) -> bool:
        return self.rank == 0
