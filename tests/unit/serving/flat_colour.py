"""A stand-in with TextToImage's interface: draws one flat colour from the seed, and counts what it was asked."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import numpy as np

TOKENS = 8
"""Words its tokenizer takes."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Defaults:
    sampler: str = "ddim"
    steps: int = 10
    guidance_scale: float = 3.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Drawn:
    pixels_HWC: np.ndarray
    truncated: bool


class FlatColour:
    """Red and green come from the seed, blue from the number of requests in the call when the prompt is `batch size`.

    The prompt `fail` raises; the prompt `slow` takes half a second.
    """

    defaults = Defaults()
    size = 64
    downsampling = 8
    samplers = ("ddim", "dpmpp_2m", "euler")
    max_steps = 50
    frames = 0
    fps = 0.0
    takes_like = False
    takes_mask = False
    makes_larger = 0
    labels = (None, ())

    def __init__(self) -> None:
        self.calls: list[int] = []
        self.asked: list = []

    @classmethod
    def load(cls, uri: str, *, device: str = "auto", offload: bool = False, compile: bool = False) -> FlatColour:
        if (Path(uri) / "broken").exists():
            raise RuntimeError("these weights do not fit")
        return cls()

    def sample(self, requests) -> list[Drawn]:
        assert len({(r.height, r.width, r.frames) for r in requests}) == 1, "one size per call"
        self.calls.append(len(requests))
        self.asked += requests
        if any(r.prompt == "fail" for r in requests):
            raise RuntimeError("out of memory")
        if any(r.prompt == "slow" for r in requests):
            time.sleep(0.5)
        return [self._draw(r, len(requests)) for r in requests]

    def _draw(self, r, batch: int) -> Drawn:
        blue = batch if r.prompt == "batch size" else 0
        pixels = np.empty((r.height, r.width, 3), np.uint8)
        pixels[:] = (r.seed % 251, (r.seed >> 8) % 251, blue)
        if r.frames:  # each frame brighter than the one before
            pixels = np.stack([np.minimum(pixels.astype(int) + 20 * t, 255).astype(np.uint8) for t in range(r.frames)])
        return Drawn(pixels_HWC=pixels, truncated=len(r.prompt.split()) > TOKENS)
