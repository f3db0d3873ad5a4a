"""What a worker measures of its memory."""

import subprocess
import sys

import torch

from latentray.training.telemetry import peak_memory_bytes

_CHILD = """
import torch
from latentray.training.telemetry import peak_memory_bytes
before = peak_memory_bytes(torch.device("cpu"))
held = torch.ones(512 << 18)  # 512 MiB, more than the imports ever held
between = peak_memory_bytes(torch.device("cpu"))
del held
print(between - before, peak_memory_bytes(torch.device("cpu")) - between)
"""


def test_the_peak_of_a_process_grows_by_what_it_held_and_stays():
    done = subprocess.run([sys.executable, "-c", _CHILD], capture_output=True, text=True, check=True, timeout=60)
    grown, after = map(int, done.stdout.split())
    assert 256 << 20 <= grown <= 520 << 20
    assert abs(after) < 4 << 20  # the kernel counts pages per core, and adds up now and then
    assert peak_memory_bytes(torch.device("cpu")) > 50 << 20
