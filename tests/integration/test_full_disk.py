"""A run whose disk is full: a file system of its own, of few megabytes, in place of the run's folder. Mounting it takes root."""

from __future__ import annotations

import contextlib
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.cluster, pytest.mark.timeout(900)]

STEPS = 240
"""As the fixture sets them."""


@contextlib.contextmanager
def disk(folder: Path, megabytes: int) -> Iterator[Path]:
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder: Path) -> Path:
    """Another one's file that takes what is left."""
    filler = folder / "filler"
    with contextlib.suppress(OSError), filler.open("ab", buffering=0) as file:
        for size in (1 << 20, 1):
            with contextlib.suppress(OSError):
                while file.write(b"x" * size):
                    pass
    return filler


def failures(log: str) -> int:
    return max(
        (int(one) for one in re.findall(r"checkpoint failed \((\d+) in a row\): .*No space left", log)), default=0
    )


def test_a_disk_of_30_mb_is_refused_before_a_worker_starts(job) -> None:
    with disk(job.folder / "small", 30) as folder, job.started("small") as driver:
        assert driver.wait(120) == 2
        assert not list(folder.iterdir())
    log = job.log("small").read_text()
    assert "The disk is too full: 30 MiB free, about" in log and "out=<path or s3 URI>" in log
    assert "Traceback" not in log and "worker group" not in log


def test_a_disk_that_fills_up_costs_checkpoints_and_neither_steps_nor_lines(job) -> None:
    with disk(job.folder / "filled", 90) as folder, job.started("filled", "faults.failed_checkpoints=20") as driver:
        job.wait_for("filled", lambda _: bool(list(folder.glob("checkpoints/*/manifest.json"))), driver)
        filler = fill(folder)
        job.wait_for("filled", lambda log: failures(log) >= 2, driver)
        filler.unlink()
        assert driver.wait(600) == 0, job.log("filled").read_text()[-6000:]
        assert job.digest("filled") == job.digest("calm"), "the numbers do not know of the disk"
        assert job.steps("filled") == list(range(1, STEPS + 1)), "every step is logged once"
        newest = max(path.parent.name for path in folder.glob("checkpoints/*/manifest.json"))
        assert newest.startswith(f"{STEPS:09d}"), "it tried again, and wrote the next ones"


def test_a_disk_that_stays_full_ends_the_run_which_goes_on_when_there_is_room(job) -> None:
    with disk(job.folder / "stuffed", 90) as folder:
        with job.started("stuffed", "faults.failed_checkpoints=1") as driver:
            job.wait_for("stuffed", lambda _: bool(list(folder.glob("checkpoints/*/manifest.json"))), driver)
            filler = fill(folder)
            assert driver.wait(300) == 2, job.log("stuffed").read_text()[-6000:]
        log = job.log("stuffed").read_text()
        assert "2 checkpoints in a row could not be written." in log and "mend:  Mend the storage" in log
        assert "Traceback" not in log.split("error: ")[-1]
        filler.unlink()
        with job.started("stuffed") as driver:
            assert driver.wait(600) == 0, job.log("stuffed").read_text()[-6000:]
        assert "resumed from" in job.log("stuffed").read_text()
        assert job.digest("stuffed") == job.digest("calm")
        assert job.steps("stuffed") == list(range(1, STEPS + 1))
