"""Keyed pseudo-random bijections of [0, n), computed per position: no permutation array exists anywhere."""

from __future__ import annotations

import math
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Words: TypeAlias = npt.NDArray[np.uint64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_SMALL = 256
"""Below so many values a network of few rounds is too regular."""


@np.errstate(over="ignore")  # uint64 arithmetic wraps around
def chi(u: npt.ArrayLike, n: int, key: int | Words) -> Words:
    """A bijection of [0, n) for each key, elementwise: (K,) -> uint64 (K,); `key` is one for all, or one per element.

    An alternating Feistel network on Z_a x Z_b with a = ceil(sqrt n), a b >= n (Black & Rogaway 2002, "Ciphers with
    arbitrary finite domains"), rounds by splitmix64; values that leave [0, n) walk the cycle until they are back.
    """
    x = np.array(u, dtype=np.uint64)
    if n == 1:
        return x
    a = math.isqrt(n - 1) + 1
    b = -(-n // a)
    keys = np.asarray(key, dtype=np.uint64)
    rounds = 10 if n < _SMALL else 6
    x = _feistel(x, a, b, keys, rounds)
    while (outside := x >= n).any():
        x[outside] = _feistel(x[outside], a, b, keys[outside] if keys.ndim else keys, rounds)
    return x


@np.errstate(over="ignore")
def mixed(*words: npt.ArrayLike) -> Words:
    """A 64-bit hash of integers, elementwise: what `randomness.mix` is for single ones."""
    state = np.zeros(np.broadcast_shapes(*(np.shape(word) for word in words)), dtype=np.uint64)
    for word in words:
        state = _finalised(state + _GOLDEN + np.asarray(word).astype(np.uint64))
    return state


def _feistel(x: Words, a: int, b: int, keys: Words, rounds: int) -> Words:
    size_a, size_b = np.uint64(a), np.uint64(b)
    left: Words = x // size_b
    right: Words = x % size_b
    for number in range(rounds):
        key = mixed(keys, number)
        if number % 2 == 0:
            left = (left + _finalised(right * _GOLDEN + key) % size_a) % size_a
        else:
            right = (right + _finalised(left * _GOLDEN + key) % size_b) % size_b
    return left * size_b + right


def _finalised(x: Words) -> Words:
    """splitmix64's finaliser."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
