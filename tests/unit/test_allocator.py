"""Freed memory that is kept is not cleared again: counted in page faults, in a process of its own."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys, threading
from latentray import allocator
if sys.argv[1] == "kept":
    assert allocator.keep_freed_memory()
import torch
torch.set_num_threads(1)
def faults():
    for turn in range(50):
        if turn == 40:  # by then the heap has grown by all that it will: now and then by a tensor as late as the twelfth turn
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(8 << 20).mul(2.0)
    found.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
found = []
faults()
other = threading.Thread(target=faults)  # Ray Train's workers train in one
other.start()
other.join()
print(*found)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="there is nothing to set in another C library")
def test_memory_that_is_kept_is_not_asked_for_again() -> None:
    def faults(how: str) -> list[int]:
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, timeout=60, check=True
        )
        return [int(one) for one in done.stdout.split()]

    usual, kept = faults("usual"), faults("kept")
    assert min(usual) > 100_000
    assert max(kept) < 1000
