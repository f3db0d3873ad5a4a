"""Steps that would harm the weights are dropped, on all ranks alike: losses and gradients that are no numbers, and spikes.

The mean loss over all ranks is compared where it is computed: a factor of 1, or of NaN, goes into the backward pass, and
DeepSpeed drops a step whose gradients are no numbers, whatever made them so. The device is not waited for.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from latentray.config.faults import FaultsConfig
from latentray.training import policies
from latentray.training.engine import Engine

_LOSS, _STOP, _FAILED, _ASK = range(4)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Heard:
    """What all ranks know after a step, alike."""

    applied: bool
    """The step was taken."""
    stop: bool
    """A rank was asked to stop."""
    failed: bool
    """A rank could not write its last checkpoint."""
    ask: bool
    """It is time to ask whether a node will be taken away."""


class Guard:
    """Judges each micro-batch's loss; what ranks have to tell each other rides along in the same reduction."""

    def __init__(self, main: Engine, others: list[Engine], faults: FaultsConfig, *, world: int) -> None:
        self.main, self.faults, self.world = main, faults, world
        self._losses: collections.deque[float] = collections.deque(maxlen=faults.spike_window)
        self._limit = math.inf
        self._tell = [0.0, 0.0, 0.0]
        self._heard: list[Tensor] = []
        self._factor: Tensor | None = None
        main.veto = self._judge
        for engine in others:
            engine.veto = self._same

    def tell(self, *, stop: bool, failed: bool, ask: bool) -> None:
        """What this rank says with the next step; of each, it holds where one rank says it."""
        self._tell = [float(stop), float(failed), float(ask)]

    def _judge(self, loss: Tensor) -> Tensor:
        told = loss.detach().float().reshape(1)
        told = torch.cat([told / self.world, told.new_tensor(self._tell)])
        dist.all_reduce(told)
        self._heard.append(told)
        self._factor = torch.where(told[_LOSS] <= self._limit, 1.0, math.nan)
        return loss * self._factor

    def _same(self, loss: Tensor) -> Tensor:
        return loss if self._factor is None else loss * self._factor

    def to_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps, so that a resumed run drops the steps that one without a break drops. Alike on all ranks."""
        return {"losses": list(self._losses)}

    def restore(self, kept: Mapping[str, Any]) -> None:
        """Judge as the guard of that checkpoint did; one from before such were kept has nothing to say."""
        self._losses = collections.deque(kept.get("losses", ()), maxlen=self.faults.spike_window)
        self._limit = policies.spike_limit(self._losses, self.faults)

    def after_step(self) -> Heard:
        """What became of the step, and what was told with it."""
        heard = torch.stack(self._heard).tolist()
        self._heard.clear()
        applied = self.main.applied
        if applied:
            self._losses.append(sum(one[_LOSS] for one in heard) / len(heard))
            self._limit = policies.spike_limit(self._losses, self.faults)
        stop, failed, ask = (any(one[what] for one in heard) for what in (_STOP, _FAILED, _ASK))
        return Heard(applied=applied, stop=stop, failed=failed, ask=ask)
