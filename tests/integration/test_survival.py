"""A training run under Ray Train that is killed, frozen, stopped and resumed: it ends by itself, at the bits of a calm run."""

from __future__ import annotations

import os
import random
import signal
import statistics
import time

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.cluster, pytest.mark.timeout(1500)]

EVERY, STEPS = 20, 240
"""Steps between checkpoints, and in all, as the fixture sets them."""


def test_five_kills_cost_one_interval_each_and_no_sample(job) -> None:
    draw = random.Random(5)
    waits, lost = [], []
    with job.started("killed") as driver:
        for target in sorted(draw.sample(range(EVERY + 5, STEPS - 30), 5)):
            job.wait_for_step("killed", target, driver)
            draw.choice(job.workers()).kill()
            killed_at = time.monotonic()
            reached = job.steps("killed")[-1]
            resumed = job.wait_for_resume("killed", len(waits) + 1, driver)
            waits.append(time.monotonic() - killed_at)
            lost.append(max(reached - resumed, 0))  # a checkpoint may be ahead of the lines that were written
            assert lost[-1] <= 2 * EVERY, "one interval, and what was being written"
        assert driver.wait(900) == 0, job.log("killed").read_text()[-5000:]
    print(
        f"\nkill to next step: median {statistics.median(waits):.1f} s of {[round(one, 1) for one in waits]} (wanted: 30); "
        f"steps done again: {lost} at a checkpoint each {EVERY}"
    )
    assert job.digest("killed") == job.digest("calm")
    assert job.steps("killed") == list(range(1, STEPS + 1)), "every step is logged once"
    assert statistics.median(waits) < 120


def test_a_frozen_worker_is_named_and_training_runs_again(job) -> None:
    with job.started("frozen") as driver:
        job.wait_for_step("frozen", EVERY + 5, driver)
        victim = job.workers()[-1]
        victim.suspend()
        frozen = time.monotonic()
        job.wait_for("frozen", lambda log: "gave no sign of life" in log, driver)
        named = time.monotonic() - frozen
        assert f"process {victim.pid}" in job.log("frozen").read_text()
        job.wait_for_resume("frozen", 1, driver)
        again = time.monotonic() - frozen
        print(f"\nfrozen: named after {named:.1f} s (wanted: 20), running again after {again:.1f} s (wanted: 60)")
        assert driver.wait(900) == 0
    assert job.digest("frozen") == job.digest("calm")


def test_a_killed_driver_and_a_stopped_run_go_on_under_their_name(job) -> None:
    with job.started("driven") as driver:
        job.wait_for_step("driven", EVERY + 5, driver)
        driver.kill()
        driver.wait(30)
    rays = [path for path in (job.folder / "driven" / "ray").rglob("*") if path.is_file()]
    assert rays, "Ray's own snapshot is there"
    for path in rays:  # cut short, as a machine that loses its power leaves it
        os.truncate(path, path.stat().st_size // 2)
    with job.started("driven") as driver:
        job.wait_for_step("driven", 3 * EVERY + 5, driver)
        asked = time.monotonic()
        driver.send_signal(signal.SIGTERM)
        assert driver.wait(120) == 143
        print(f"\nSIGTERM to exit: {time.monotonic() - asked:.1f} s (wanted: 20)")
    log = job.log("driven").read_text()
    assert "as asked" in log and "resume it with: python -m jobs.train" in log
    reached = max(job.steps("driven"))
    with job.started("driven") as driver:
        assert driver.wait(900) == 0, job.log("driven").read_text()[-5000:]
    assert f"at step {reached}" in job.log("driven").read_text()
    assert job.digest("driven") == job.digest("calm")
