"""A quarter of an hour of everything at once (`make chaos`): kills, a freeze, a damaged shard, W&B silent, and no hand.

`python -m jobs.submit job=train retries=...` sends the run to a cluster of its own and is left alone. At seeded random steps
three workers and the driver are killed, a worker is stopped, a shard is damaged on its disk, and W&B's server does not
answer for two minutes. MINUTES in the environment makes it shorter.
"""

from __future__ import annotations

import collections
import contextlib
import datetime
import importlib.util
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from latentray.data.shards import IndexedShards
from latentray.tracking import names

pytestmark = [pytest.mark.chaos, pytest.mark.cluster, pytest.mark.timeout(3600)]

ROOT = Path(__file__).resolve().parents[2]
MINUTES = float(os.environ.get("MINUTES", "15"))
OUTAGE_S = 120.0
BATCH = 8
"""As the fixture sets it."""
LOGS = 8
"""Steps between two lines of metrics: the steps are of milliseconds."""
CHECKPOINT_S = 10.0
"""About so long between checkpoints."""
WANTED, AIM = 0.75, 0.85


def fake_wandb():
    path = ROOT / "tests/unit/tracking/fake_wandb.py"
    spec = importlib.util.spec_from_file_location("fake_wandb", path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Chaos:
    """What befalls a run, when, and what was done: the plan is drawn before anything starts."""

    def __init__(self, job, server, latents: Path, steps: int, *, seed: int) -> None:
        self.job, self.server, self.latents = job, server, latents
        self.draw = random.Random(seed)
        kinds = ["worker"] * 3 + ["driver", "freeze", "damage"]
        plan = [(self.draw.uniform(0.05, 0.9), kind) for kind in kinds]
        plan.append((self.draw.uniform(0.05, 0.9 - OUTAGE_S / (60 * MINUTES)), "W&B out"))
        self.plan = sorted((int(share * steps), kind) for share, kind in plan)
        self.back_at = math.inf
        self.done: list[tuple[float, str]] = []
        self.damaged_at = 0.0

    def go_on(self, step: int) -> None:
        """Do what is due once that step is done; a process that is to be hit must be there."""
        if self.plan and step >= self.plan[0][0] and getattr(self, _DEEDS[self.plan[0][1]])():
            self._note(self.plan.pop(0)[1])
        if time.time() >= self.back_at:
            self.speak()
            self._note("W&B back")

    def _note(self, kind: str) -> None:
        self.done.append((time.time(), kind))
        print(f"{datetime.datetime.now():%H:%M:%S} {kind}", flush=True)

    def kill_worker(self) -> bool:
        return self._signal(self.job.workers(), signal.SIGKILL)

    def freeze_worker(self) -> bool:
        return self._signal(self.job.workers(), signal.SIGSTOP)

    def kill_driver(self) -> bool:
        return self._signal(self.job.drivers(), signal.SIGKILL)

    def _signal(self, processes: list, number: int) -> bool:
        if processes:
            self.draw.choice(processes).send_signal(number)
        return bool(processes)

    def damage(self) -> bool:
        """Bytes in the middle of a shard turn over, in the file that workers may be reading."""
        shard = self.draw.choice(sorted((self.latents / "train").glob("*.tar")))
        with shard.open("r+b") as file:
            file.seek(shard.stat().st_size // 2)
            piece = file.read(1024)
            file.seek(-len(piece), os.SEEK_CUR)
            file.write(bytes(byte ^ 0xFF for byte in piece))
        self.damaged_at = time.time()
        return True

    def silence(self) -> bool:
        self.server.released.clear()
        self.server.mode, self.back_at = "stall", time.time() + OUTAGE_S
        return True

    def speak(self) -> None:
        self.server.mode, self.back_at = "serve", math.inf
        self.server.released.set()


_DEEDS = {
    "worker": "kill_worker",
    "driver": "kill_driver",
    "freeze": "freeze_worker",
    "damage": "damage",
    "W&B out": "silence",
}


@contextlib.contextmanager
def submitted(job, address: str, wandb: str, *more: str) -> Iterator[subprocess.Popen]:
    """`jobs.submit` as a user calls it, once."""
    env = job.noting("chaos") | {
        "WANDB_BASE_URL": wandb,
        "WANDB_API_KEY": "k" * 40,
        "WANDB_MODE": "online",
        "no_proxy": "127.0.0.1",
    }
    own = ["job=train", "retries=5", f"address={address}", f"python={sys.executable}"]
    own += [f"+env.{name}={value}" for name, value in env.items()]
    theirs = job.overrides("chaos", "cluster.address=auto", *more)
    with open(job.log("chaos"), "ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "jobs.submit", *own, "--", *theirs],
            cwd=ROOT, env=os.environ | {"PYTHONUNBUFFERED": "1"}, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def logged(job, name: str) -> list[dict]:
    path = job.folder / name / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_a_quarter_of_an_hour_of_faults(job, head: str, tmp_path: Path) -> None:
    rates = [line[names.TRAIN_SAMPLES_PER_SECOND] for line in logged(job, "calm") if names.TRAIN_LEARNING_RATE in line]
    rate = statistics.median(rates[20:])
    steps = int(rate * MINUTES * 60 * 0.9) // (BATCH * LOGS) * LOGS
    every = max(int(CHECKPOINT_S * rate) // BATCH, 1)
    latents = tmp_path / "latents"
    shutil.copytree(job.latents, latents)
    job.latents = str(latents)
    more = [f"total_samples={steps * BATCH}", f"checkpoint_every_samples={every * BATCH}", "cluster.max_failures=50"]
    more += [f"log_every_samples={LOGS * BATCH}", "damage.policy=skip", "damage.max_bad_fraction=0.2"]
    more += ["tracking=wandb", "tracking.mode=online"]
    print(f"\n{steps} steps of {BATCH} samples at {rate:.0f} samples/s, a checkpoint each {every}")
    with fake_wandb().running() as server, submitted(job, head, server.url, *more) as process:
        chaos = Chaos(job, server, latents, steps, seed=11)
        while process.poll() is None:
            chaos.go_on(job.last_step("chaos"))
            time.sleep(0.5)
        assert process.returncode == 0, job.log("chaos").read_text()[-5000:]
        assert not chaos.plan, f"it ended before {chaos.plan}"
        wandb_lines = collections.Counter(server.steps)
    lines = [line for line in logged(job, "chaos") if names.TRAIN_LEARNING_RATE in line]
    tell(lines, chaos, job.log("chaos").read_text())

    assert [line["samples"] // BATCH for line in lines] == list(range(LOGS, steps + 1, LOGS)), (
        "every line stands there once"
    )
    ledger = job.require_exact_ledger("chaos", steps, *more)
    assert lost_to_damage(ledger, chaos) == lines[-1][names.DATA_DAMAGED_SAMPLES] > 0
    unsent = len(lines) - len(wandb_lines)
    print(f"W&B has {len(wandb_lines)} of {len(lines)} lines, {wandb_lines.total() - len(wandb_lines)} of them again")
    assert not unsent or "wandb sync" in job.log("chaos").read_text()
    goodput = lines[-1][names.RUN_GOODPUT]
    print(f"goodput {goodput:.3f} (wanted: {WANTED}, aim: {AIM})")
    if MINUTES >= 15:
        assert goodput >= WANTED


def lost_to_damage(ledger: dict[int, list[dict]], chaos: Chaos) -> int:
    """Samples of the steps that count that were lost, each by its name, and none before the shard was damaged."""
    data = IndexedShards.open(str(chaos.latents / "train"), kind="latents")
    lost = 0
    for ranks in ledger.values():
        for rank in ranks:
            assert not rank["damaged"] or rank["at"] > chaos.damaged_at
            assert set(rank["damaged"]) <= {data.key(index) for _, index in rank["ids"]}
            lost += len(rank["damaged"])
    return lost


def tell(lines: list[dict], chaos: Chaos, log: str) -> None:
    """What it cost, and how long each fault kept the run from its next step."""
    first, last = lines[0]["time"], lines[-1]
    lost = {key.rsplit("/", 1)[1]: round(value, 4) for key, value in last.items() if key.startswith("run/lost_to/")}
    restarts = re.findall(r"resumed from \S+ at step (\d+)", log)
    print(f"{last['time'] - first:.0f} s from the first step; {len(restarts)} restarts, at steps {', '.join(restarts)}")
    print(f"lost to {lost}")
    times = [line["time"] for line in lines]
    for at, kind in chaos.done:
        waits = [b - a for a, b in itertools.pairwise(times) if at - 30 < b < at + 120]
        print(f"  {kind} after {at - first:.0f} s: the longest wait for a step then {max(waits, default=0.0):.1f} s")
