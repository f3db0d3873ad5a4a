"""Where the parts of a model lie while they have nothing to do: on the device, or in the machine's memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn


class Placement:
    """Brings a model's parts to the device. With `offload` each is there for its turn alone: text encoders, then denoiser,
    then autoencoder. A turn costs the transfer of its weights; the device needs memory for the largest part alone."""

    def __init__(self, device: torch.device, *, offload: bool) -> None:
        self.device, self.offload = device, offload
        self._rests = torch.device("cpu") if offload else device

    def place(self, *parts: nn.Module) -> None:
        """Put parts where they rest."""
        for part in parts:
            part.to(self._rests)

    @contextlib.contextmanager
    def at_work(self, *parts: nn.Module) -> Iterator[None]:
        """Parts are on the device within."""
        if not self.offload:
            yield
            return
        for part in parts:
            part.to(self.device)
        try:
            yield
        finally:
            for part in parts:
                part.to(self._rests)
