"""Which pictures repeat an earlier one: the same bytes, or the same look.

Exact: equal first halves of sha256. Near: a 64-bit perceptual hash (the signs of low frequencies of a discrete cosine transform:
Zauner 2010, "Implementation and Benchmarking of Perceptual Image Hash Functions", section 3.2.1), close in Hamming distance,
and close mean colours, which the hash does not see. Only hashes reach the driver: 16 bytes a picture, or 12.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

Words = npt.NDArray[np.uint64]
Flags = npt.NDArray[np.bool_]

_SIDE = 32
_KEPT = 8
_FLAT = 2.0
"""A picture all of whose frequencies lie below is flat: rounding and the noise of compression must not tell two apart."""
_BITS = 64
_COLOUR_LEVELS = 6
"""How far mean colours may lie apart, of 255: recompression and resizing move them by one or two."""


def exact(digest_N16: npt.NDArray[np.uint8]) -> Flags:
    """(N,) True where an earlier row of the (N, 16) bytes of digests is equal."""
    return _repeated(*np.ascontiguousarray(digest_N16).view(np.uint64).T)


def near(hash_N: Words, colour_N3: npt.NDArray[np.uint8], distance: int) -> Flags:
    """(N,) True where an earlier picture has a hash within `distance` bits and a mean colour within some levels.

    Pigeonhole: hashes that differ in d bits are equal in one of d + 1 bands of bits at least. So only pictures that share a band
    are compared, which misses none; a band that m of them share costs m * m / 2 comparisons of words.
    """
    found = _repeated(hash_N, *colour_N3.T)
    distinct = np.flatnonzero(~found)
    for band in _bands(hash_N[distinct], distance + 1):
        order = np.argsort(band, kind="stable")
        rows = distinct[order]
        found[rows[_near_earlier(band[order], hash_N[rows], colour_N3[rows], distance)]] = True
    return found


def _near_earlier(band: Words, hash_N: Words, colour_N3: npt.NDArray[np.uint8], distance: int) -> Flags:
    """Rows sorted by band: True where an earlier row of the same band is near. For each k, all rows meet those k before."""
    found = np.zeros(len(band), bool)
    rows = np.arange(len(band))
    for k in range(1, len(band)):
        rows = rows[rows >= k]
        rows = rows[band[rows] == band[rows - k]]
        if not len(rows):
            break
        apart = np.bitwise_count(hash_N[rows] ^ hash_N[rows - k])
        colours = np.abs(colour_N3[rows].astype(np.int16) - colour_N3[rows - k]).max(axis=1)
        found[rows[(apart <= distance) & (colours <= _COLOUR_LEVELS)]] = True
    return found


def _bands(hash_N: Words, count: int) -> list[Words]:
    edges = [_BITS * i // count for i in range(count + 1)]
    return [(hash_N >> np.uint64(low)) & np.uint64((1 << (high - low)) - 1) for low, high in itertools.pairwise(edges)]


def _repeated(*columns: npt.NDArray[Any]) -> Flags:
    """(N,) True where an earlier row is equal in all columns, each (N,)."""
    order = np.lexsort(columns)  # stable: of equal rows the first stays first
    equal = np.ones(max(len(order) - 1, 0), bool)
    for column in columns:
        equal &= column[order][1:] == column[order][:-1]
    found = np.zeros(len(order), bool)
    found[order[1:][equal]] = True
    return found


def look(pixels_HWC: npt.NDArray[np.uint8]) -> tuple[int, npt.NDArray[np.uint8]]:
    """A picture's perceptual hash, an unsigned 64-bit integer, and its mean colour, uint8 (3,)."""
    small = Image.fromarray(pixels_HWC).resize((_SIDE, _SIDE), Image.Resampling.LANCZOS, reducing_gap=3.0)
    colour = np.rint(np.asarray(small, dtype=np.float64).mean(axis=(0, 1))).astype(np.uint8)
    gray = np.asarray(small.convert("L"), dtype=np.float64)
    basis = _cosines()
    low = basis @ gray @ basis.T
    bits = (low > (np.median(low) if np.abs(low).max() >= _FLAT else _FLAT)).ravel()
    return int.from_bytes(np.packbits(bits).tobytes(), "big"), colour


@functools.cache
def _cosines() -> npt.NDArray[np.float64]:
    """Rows 1 ... 8 of the orthonormal DCT-II of 32 points, (8, 32): without the mean, which brightness alone would move."""
    k = np.arange(1, _KEPT + 1)[:, None]
    n = np.arange(_SIDE)[None, :]
    return np.sqrt(2 / _SIDE) * np.cos(np.pi * k * (2 * n + 1) / (2 * _SIDE))
