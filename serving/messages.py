"""What travels between the ingress and the sampler: plain values, so that the ingress needs no torch."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class Picture:
    """One drawn picture."""

    pixels_HWC: np.ndarray
    """uint8 RGB."""
    truncated: bool
    """The prompt was longer than the tokenizer takes."""
    release_id: str
    """Release that drew it: a promotion may happen after a request was admitted, even between two of its pictures."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """What the ingress needs to know of the loaded release: its names, bounds and defaults."""

    release_id: str
    release: str
    """URI."""
    created: int
    """Unix time of the release, seconds."""
    size: int
    """Native height and width, pixels."""
    downsampling: int
    """Heights and widths are multiples of it."""
    samplers: tuple[str, ...]
    max_steps: int
    sampler: str
    """Default sampler."""
    steps: int
    """Default number of steps."""
    guidance_scale: float
    """Default guidance scale."""
    refused: tuple[str, str] | None = None
    """Id of a release that was to replace this one and could not, and why."""

    def public(self) -> dict[str, Any]:
        """What `GET /v1/models` tells clients besides OpenAI's fields."""
        return {
            "release": self.release_id,
            "size": f"{self.size}x{self.size}",
            "size_multiple_of": self.downsampling,
            "samplers": list(self.samplers),
            "max_steps": self.max_steps,
            "defaults": {
                "sampler": self.sampler,
                "num_inference_steps": self.steps,
                "guidance_scale": self.guidance_scale,
            },
        }
