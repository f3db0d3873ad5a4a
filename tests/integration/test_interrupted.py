"""A driver that is told to end while Ray waits for room for its workers, and one whose workers are at work."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.cluster, pytest.mark.timeout(600)]

RESUME = "resume it with: python -m jobs.train"


@pytest.fixture(scope="module")
def one_cpu() -> Iterator[str]:
    """The address of a cluster with room for one worker."""
    from ray.cluster_utils import Cluster

    base = Path(os.path.realpath(tempfile.mkdtemp(prefix="lr-")))  # short: Ray's socket paths are limited
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", str(base))
        (base / "ray").mkdir()
        made = Cluster(shutdown_at_exit=True)
        made.add_node(num_cpus=1, object_store_memory=100 * 2**20, temp_dir=str(base), include_dashboard=False)
        try:
            yield made.address
        finally:
            made.shutdown()
            shutil.rmtree(base, ignore_errors=True)


def end(driver, number: int, within_s: float) -> tuple[int, float]:
    """Its exit code, and how long it took."""
    asked = time.monotonic()
    driver.send_signal(number)
    return driver.wait(within_s), time.monotonic() - asked


@pytest.mark.parametrize("settings", [[], ["cluster.min_workers=2", "cluster.workers=3"]], ids=["fixed", "elastic"])
def test_sigterm_ends_a_run_that_waits_for_its_workers(begun_job, one_cpu, settings, request) -> None:
    name = f"waits-{request.node.callspec.id}"
    with begun_job.started(name, f"cluster.address={one_cpu}", "global_batch_size=6", *settings) as driver:
        begun_job.wait_for(name, lambda log: "waiting for nodes: the workers want 2 CPUs" in log, driver)
        time.sleep(5)
        code, took = end(driver, signal.SIGTERM, 60)
    log = begun_job.log(name).read_text()
    print(f"\nSIGTERM to exit without workers ({name}): {took:.1f} s (wanted: 20)")
    assert code == 143, log[-5000:]
    assert "no worker is at work: there is nothing to save" in log and "as asked" in log
    assert RESUME in log.split("as asked")[-1] and "Traceback" not in log
    assert not list((begun_job.folder / name).glob("checkpoints/*"))


def test_ctrl_c_ends_a_run_at_once_with_the_command_that_resumes_it(begun_job, one_cpu) -> None:
    name, one = "interrupted", [f"cluster.address={one_cpu}", "cluster.workers=1", "total_samples=80000"]
    with begun_job.started(name, *one) as driver:
        begun_job.wait_for_step(name, 5, driver)
        code, took = end(driver, signal.SIGINT, 60)
    log = begun_job.log(name).read_text()
    print(f"\nCtrl-C to exit: {took:.1f} s")
    assert code == 130, log[-5000:]
    assert "The run was interrupted." in log and RESUME in log.split("interrupted.")[-1]
    assert "Traceback" not in log
