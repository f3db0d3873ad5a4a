"""What a policy is told and says, in the network's units: the ranges that vectors are normalised by, and what was seen as one
tensor. Training and acting both go through here.

Suffixes: T steps of an episode, D numbers of a vector; To is the horizon of observation.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

ACTIONS = "actions"
OBS = "obs."
_NOISE = 1e-6
"""A range this small, relative to its values, is rounding: stretching it to [-1, 1] would show noise to the network."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Range:
    """Least and greatest value of each dimension, (D,) float32: it maps onto [-1, 1]."""

    low: np.ndarray
    high: np.ndarray

    @classmethod
    def of(cls, values_TD: np.ndarray) -> Range:
        return cls(low=values_TD.min(axis=0), high=values_TD.max(axis=0))

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Range:
        return cls(low=np.array(value["low"], np.float32), high=np.array(value["high"], np.float32))

    def to_json(self) -> dict[str, list[float]]:
        """Plain numbers, without loss."""
        return {"low": self.low.tolist(), "high": self.high.tolist()}

    def merged(self, other: Range) -> Range:
        """Of both together: exact, so parts may be merged in any order."""
        return Range(low=np.minimum(self.low, other.low), high=np.maximum(self.high, other.high))

    def normalised(self, values: np.ndarray) -> np.ndarray:
        """2 (x - low) / (high - low) - 1, float32 (..., D); a constant dimension becomes x - middle, which is 0."""
        middle, half = self._middle_and_half()
        return ((np.asarray(values, np.float64) - middle) / half).astype(np.float32)

    def restored(self, values: np.ndarray) -> np.ndarray:
        """The inverse of `normalised`."""
        middle, half = self._middle_and_half()
        return (np.asarray(values, np.float64) * half + middle).astype(np.float32)

    def _middle_and_half(self) -> tuple[np.ndarray, np.ndarray]:
        low, high = self.low.astype(np.float64), self.high.astype(np.float64)
        half = (high - low) / 2
        constant = half <= _NOISE * np.maximum(np.abs(low), np.abs(high))
        return (low + high) / 2, np.where(constant, 1.0, half)


def together(names: Sequence[str], observations: Mapping[str, np.ndarray]) -> np.ndarray:
    """Vectors (..., D) of these names, side by side in their order, float32."""
    return np.concatenate([np.asarray(observations[name], np.float32) for name in names], axis=-1)
