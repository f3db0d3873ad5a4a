"""What the C library does with memory that is freed: on a CPU, giving it back and asking anew takes longer than computing."""

from __future__ import annotations

import ctypes

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX, _ARENA_MAX = -1, -2, -4, -8
"""Of glibc's malloc.h."""
_SETTINGS = {_MMAP_MAX: 0, _TRIM_THRESHOLD: 2**31 - 1, _TOP_PAD: 64 << 20, _ARENA_MAX: 1}


def keep_freed_memory() -> bool:
    """Have this process keep the memory that its tensors free, for the next ones; whether it does (glibc can, others not).

    By default glibc maps each block beyond some size anew and returns it when freed, so that the kernel clears every page of it
    again: 27 ms where a copy into 32 MB takes 10. The process never shrinks then, so this is for workers that do the same again
    and again: training, encoding, serving.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    kept = [mallopt(key, value) for key, value in _SETTINGS.items()]
    return all(kept)
