"""A run on nodes that come and go: it begins with few workers, grows, goes on with fewer where one dies, and takes a notice
of a node's end; it finishes by itself, with every sample read once and the losses of a run whose size never changed."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from latentray.tracking import names

pytestmark = [pytest.mark.slow, pytest.mark.cluster, pytest.mark.timeout(900)]

STEPS, BATCH, CALM = 1500, 8, 240
NOTICE_S = 25
SETTINGS = [
    f"total_samples={STEPS * BATCH}", f"checkpoint_every_samples={40 * BATCH}", "cluster.min_workers=1",
    "cluster.resize_every_s=3", "cluster.max_failures=1",
]  # fmt: skip


@pytest.fixture
def cluster(job, monkeypatch) -> Iterator:
    """A head that runs no workers, and nodes of one CPU each that a test adds and takes away."""
    from ray.cluster_utils import Cluster

    base = Path(os.path.realpath(tempfile.mkdtemp(prefix="lr-")))  # short: Ray's socket paths are limited
    monkeypatch.setenv("RAY_TMPDIR", str(base))  # Cluster notes its address there
    (base / "ray").mkdir()
    for name, value in (job.environ() | job.noting("elastic")).items():
        monkeypatch.setenv(name, value)
    made = Cluster(shutdown_at_exit=True)
    made.add_node(num_cpus=0, object_store_memory=100 * 2**20, temp_dir=str(base), include_dashboard=False)
    try:
        yield made
    finally:
        made.shutdown()
        shutil.rmtree(base, ignore_errors=True)


def add_node(cluster):
    return cluster.add_node(num_cpus=1, object_store_memory=100 * 2**20)


def drain(cluster, node, seconds: int) -> None:
    """What a cloud's termination handler does when it is told that a node will be taken back."""
    command = ["drain-node", f"--address={cluster.gcs_address}", f"--node-id={node.node_id}"]
    command += ["--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=taken back"]
    command.append(f"--deadline-remaining-seconds={seconds}")
    subprocess.run([sys.executable, "-m", "ray.scripts.scripts", *command], check=True, capture_output=True, timeout=60)


def logged(job, name: str) -> list[dict]:
    lines = map(json.loads, (job.folder / name / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if names.TRAIN_LEARNING_RATE in line]


def wait_for_world(job, world: int, driver: subprocess.Popen) -> float:
    """Until an attempt of so many workers that began later did 20 steps; how long it took."""
    began, since = time.monotonic(), time.time()
    folder = job.folder / "ledgers" / "elastic"

    def steps_since() -> int:
        newest = max(folder.glob("*.jsonl"), key=lambda path: path.stat().st_mtime, default=None)
        lines = [json.loads(one) for one in newest.read_text().splitlines()] if newest else []
        return len(lines) if lines and lines[0]["at"] > since and lines[0]["world"] == world else 0

    while steps_since() < 20:
        assert driver.poll() is None and time.monotonic() - began < 180, job.log("elastic").read_text()[-6000:]
        time.sleep(0.3)
    return time.monotonic() - began


def test_nodes_come_and_go_and_the_run_ends_by_itself(job, cluster) -> None:
    add_node(cluster)
    took: dict[str, float] = {}
    more = [*SETTINGS, f"cluster.address={cluster.address}"]
    with job.started("elastic", *more, env=job.noting("elastic")) as driver:
        took["begins with 1"] = wait_for_world(job, 1, driver)
        second = add_node(cluster)
        took["grows to 2"] = wait_for_world(job, 2, driver)
        cluster.remove_node(second, allow_graceful=False)
        took["a node is killed: 1"] = wait_for_world(job, 1, driver)
        third = add_node(cluster)
        took["grows to 2 again"] = wait_for_world(job, 2, driver)
        drain(cluster, third, NOTICE_S)
        drained = time.monotonic()
        job.wait_for("elastic", lambda log: "will be taken away: a checkpoint" in log, driver)
        took["notice to checkpoint"] = time.monotonic() - drained
        took["a node is taken back: 1"] = wait_for_world(job, 1, driver)
        cluster.remove_node(third, allow_graceful=False)
        assert driver.wait(600) == 0, job.log("elastic").read_text()[-6000:]
    print("\n" + "; ".join(f"{what} after {seconds:.0f} s" for what, seconds in took.items()))
    assert took["notice to checkpoint"] < NOTICE_S

    lines = logged(job, "elastic")
    assert [line["samples"] // BATCH for line in lines] == list(range(1, STEPS + 1)), "every step is logged once"
    ledger = job.require_exact_ledger("elastic", STEPS, *more)
    assert {ranks[0]["world"] for ranks in ledger.values()} == {1, 2}
    just_in_time = int(re.findall(r"a checkpoint is written at (\d+) samples", job.log("elastic").read_text())[0])
    resumed = [int(step) for step in re.findall(r"resumed from \S+ at step (\d+)", job.log("elastic").read_text())]
    assert len(resumed) == 4 and resumed[-1] >= just_in_time // BATCH
    pairs = list(zip(logged(job, "calm"), lines, strict=False))
    apart = [abs(a[names.TRAIN_LOSS] - b[names.TRAIN_LOSS]) for a, b in pairs]
    print(f"losses of {len(apart)} steps differ by {max(apart):.1e} at most from those of two workers (wanted: 1e-5)")
    assert len(apart) == CALM and max(apart) < 1e-5
