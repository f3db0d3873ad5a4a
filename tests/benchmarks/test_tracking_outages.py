"""What a step takes longer while W&B's server is out of order: nobody listens, it answers 500, it answers nothing.

Steps of some 25 ms and of half a second, each logged, in a process for each way and turn; the 95th percentile beside that of a
process of the same turn that tracks nothing. W&B's own process sends and retries meanwhile.
"""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
LENGTHS = {"25 ms": (5, 150, 2), "half a second": (5, 40, 45)}
"""Turns, steps, and products of a step."""
ROOT = Path(__file__).resolve().parents[2]
WAYS = ("not tracked", "nobody listens", "error", "stall")
PROGRAM = """
import json, sys, time
from pathlib import Path
import torch
from latentray import tracking
from latentray.config.tracking import TrackingConfig
from latentray.tracking import names

torch.set_num_threads(1)
way, folder, steps, products = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
began = time.monotonic()
mode = "disabled" if way == "not tracked" else "online"
tracker = tracking.open(TrackingConfig(mode=mode, finish_seconds=0.5), "run1", folder, {"seed": 0})
opened, took, x = time.monotonic() - began, [], torch.randn(1024, 1024)
for step in range(1, steps + 1):
    since = time.perf_counter()
    for _ in range(products):
        x = (x @ x).tanh()
    tracker.log(96 * step, {names.TRAIN_LOSS: float(x[0, 0]), names.TRAIN_SAMPLES_PER_SECOND: 96.0})
    took.append(time.perf_counter() - since)
print(json.dumps({"opened": opened, "took": took}), flush=True)
tracker.finish()
"""


def _fake_wandb():
    path = ROOT / "tests" / "unit" / "tracking" / "fake_wandb.py"
    spec = importlib.util.spec_from_file_location("fake_wandb_of_benchmarks", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _measured(way: str, folder: Path, steps: int, products: int) -> dict:
    with _fake_wandb().running(way if way in ("error", "stall") else "serve") as server, socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}" if way == "nobody listens" else server.url
        environ = os.environ | {
            "WANDB_BASE_URL": url, "WANDB_API_KEY": "k" * 40, "NETRC": str(folder / "netrc"), "no_proxy": "127.0.0.1",
            "PYTHONPATH": str(ROOT / "platform"), "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        environ.pop("WANDB_MODE", None)
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, way, str(folder), str(steps), str(products)], env=environ, capture_output=True,
            text=True, timeout=120, check=True,
        )  # fmt: skip
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))


@pytest.mark.parametrize("length", list(LENGTHS))
def test_steps_while_the_server_is_out_of_order(tmp_path: Path, length: str) -> None:
    turns, steps, products = LENGTHS[length]
    found: dict[str, list[dict]] = {way: [] for way in WAYS}
    for turn in range(turns):
        for way in WAYS:
            folder = tmp_path / f"{way}-{turn}"
            folder.mkdir()
            found[way].append(_measured(way, folder, steps, products))
    p95 = {way: [float(np.percentile(one["took"], 95)) for one in many] for way, many in found.items()}
    for way in WAYS:
        ratio = statistics.median(ours / plain for ours, plain in zip(p95[way], p95["not tracked"], strict=True))
        opened = max(one["opened"] for one in found[way])
        print(
            f"\n{way:15s} p95 of a step {1e3 * statistics.median(p95[way]):.1f} ms, {ratio:.3f}x; opened in {opened:.1f} s"
        )
        assert opened < 30
        assert ratio < 3
