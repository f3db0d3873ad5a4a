"""Counter-based random draws that belong to the sample.

Every draw is a pure function of (seed, purpose, epoch, data set, sample), never of rank, worker or step: the same run on
1, 2 or 3 workers sees the same numbers, and a resumed run equals an uninterrupted one. Nothing else in latentray draws
random numbers for training or sampling.

The generator is splitmix64's finaliser (Steele, Lea & Flood 2014, "Fast splittable pseudorandom number generators")
over key + counter, in int64 tensor arithmetic that wraps around, so it gives the same bits on every device.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence

import torch

from latentray.records import SampleId

_GOLDEN = 0x9E3779B97F4A7C15
_MASK64 = (1 << 64) - 1


class Purpose(enum.IntEnum):
    """What a draw is for; each purpose is a stream of its own."""

    NOISE = 1
    TIMESTEP = 2
    POSTERIOR = 3
    CROP = 4
    FLIP = 5
    CAPTION = 6
    CAPTION_DROPOUT = 7
    INITIAL_LATENT = 8
    SAMPLER_NOISE = 9
    ORDER = 10
    SPLIT = 11
    DRAWING = 12
    WEIGHTS = 13
    OFFSET_NOISE = 14
    TIMESTEP_SHIFT = 15
    BUCKET_TURNS = 16
    SLOT_TURNS = 17
    TAGS = 18
    ENCODER_DROPOUT = 19
    MASK = 20
    CODEBOOK = 21


def _signed(value: int) -> int:
    value &= _MASK64
    return value - (1 << 64) if value >> 63 else value


_M1, _M2 = _signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB)


def mix(*words: int) -> int:
    """A 64-bit hash of integers (splitmix64 chained), as an unsigned Python int."""
    state = 0
    for word in words:
        state = (state + _GOLDEN + (word & _MASK64)) & _MASK64
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK64
        state ^= state >> 31
    return state


def keys_of(
    seed: int, purpose: Purpose, ids: Sequence[SampleId], *, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """One int64 key per sample, shape (B,)."""
    words = [_signed(mix(seed, purpose, i.epoch, i.dataset, i.index)) for i in ids]
    return torch.tensor(words, dtype=torch.int64, device=device)


def keys_from_seeds(seeds: Sequence[int], purpose: Purpose, counter: int = 0) -> torch.Tensor:
    """One int64 key per request seed, shape (B,); `counter` numbers the draws of one request (its table rows)."""
    return torch.tensor([_signed(mix(seed, purpose, counter)) for seed in seeds], dtype=torch.int64)


def _shift_right(x: torch.Tensor, bits: int) -> torch.Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)  # torch's >> on int64 copies the sign; a hash needs zeros


def bits(keys_B: torch.Tensor, n: int, *, offset: int = 0) -> torch.Tensor:
    """(B, n) int64 of uniformly distributed bits: counters offset ... offset+n-1 of each key."""
    counter = torch.arange(offset + 1, offset + n + 1, dtype=torch.int64, device=keys_B.device)
    x = keys_B[:, None] + counter[None] * _signed(_GOLDEN)
    x = (x ^ _shift_right(x, 30)) * _M1
    x = (x ^ _shift_right(x, 27)) * _M2
    return x ^ _shift_right(x, 31)


def uniform(keys_B: torch.Tensor, shape: Sequence[int] = (), *, offset: int = 0) -> torch.Tensor:
    """(B, *shape) float32 in [0, 1): 24 bits of mantissa."""
    n = math.prod(shape)
    u = _shift_right(bits(keys_B, n, offset=offset), 40).to(torch.float32) * 2.0**-24
    return u.reshape(-1, *shape)


def normal(keys_B: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """(B, *shape) float32 standard normal, by Box-Muller."""
    n = math.prod(shape)
    half = (n + 1) // 2
    u1 = (uniform(keys_B, (half,)) + 2.0**-25).log().mul_(-2).sqrt_()  # half a step up: log(0) never happens
    u2 = uniform(keys_B, (half,), offset=half) * (2 * math.pi)
    return torch.cat([u1 * u2.cos(), u1 * u2.sin()], dim=1)[:, :n].reshape(-1, *shape)
