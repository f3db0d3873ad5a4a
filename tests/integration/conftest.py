"""A training run under Ray Train as its own process, for tests that kill it."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from latentray.checkpoint import manifest

ROOT = Path(__file__).resolve().parents[2]
BATCH, STEPS, EVERY = 8, 240, 20


def _tiny():
    spec = importlib.util.spec_from_file_location("tiny_survival", ROOT / "tests/numerics/tiny.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Job:
    """`python -m jobs.train` on a Ray cluster of its own, two workers."""

    def __init__(self, folder: Path, latents: str, settings: list[str]) -> None:
        self.folder, self.latents, self.settings = folder, latents, settings
        self.cache = str(folder / "cache")

    def command(self, name: str, *more: str) -> list[str]:
        run = [f"run={name}", f"out={self.folder / name}", f"latents={self.latents}"]
        size = [f"total_samples={STEPS * BATCH}", f"checkpoint_every_samples={EVERY * BATCH}", "cluster=ray"]
        workers = ["cluster.workers=2", "cluster.threads=1", "cluster.device=cpu", "cluster.max_failures=20"]
        return [sys.executable, "-m", "jobs.train", *self.settings, *size, *workers, *run, *more]

    @contextlib.contextmanager
    def started(self, name: str, *more: str) -> Iterator[subprocess.Popen]:
        """The driver, in a process group of its own; what is left of it is ended."""
        temporary = tempfile.mkdtemp(prefix="lr-")
        environ = os.environ | {
            "PYTHONPATH": "platform", "LATENTRAY_CACHE": self.cache, "RAY_TMPDIR": temporary, "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        environ.pop("RAY_ADDRESS", None)
        with open(self.log(name), "ab") as log:
            driver = subprocess.Popen(
                self.command(name, *more), cwd=ROOT, env=environ, stdout=log, stderr=log, start_new_session=True
            )
        try:
            yield driver
        finally:
            self.end_all()
            shutil.rmtree(temporary, ignore_errors=True)

    def end_all(self) -> None:
        """Every process that has this job's cache folder in its environment: driver, Ray's daemons, workers."""
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.pid != os.getpid() and process.environ().get("LATENTRAY_CACHE") == self.cache:
                    process.kill()

    def log(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    def workers(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter(["cmdline"]):
            with contextlib.suppress(psutil.Error):
                if not " ".join(process.info["cmdline"] or ()).startswith("ray::RayTrainWorker"):
                    continue
                if process.environ().get("LATENTRAY_CACHE") == self.cache:
                    found.append(process)
        return found

    def steps(self, name: str) -> list[int]:
        """The steps in metrics.jsonl, in the order they were logged."""
        path = self.folder / name / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        found = []
        for line in lines:
            with contextlib.suppress(ValueError):
                one = json.loads(line)
                if "train/learning_rate" in one:
                    found.append(one["samples"] // BATCH)
        return found

    def wait_for_step(self, name: str, step: int, driver: subprocess.Popen, seconds: float = 300) -> None:
        end = time.monotonic() + seconds
        while not (done := self.steps(name)) or done[-1] < step:
            assert driver.poll() is None and time.monotonic() < end, self.log(name).read_text()[-5000:]
            time.sleep(0.2)

    def wait_for(self, name: str, holds: Callable[[str], bool], driver: subprocess.Popen, seconds: float = 300) -> None:
        end = time.monotonic() + seconds
        while not holds(log := self.log(name).read_text()):
            assert driver.poll() is None and time.monotonic() < end, log[-5000:]
            time.sleep(0.1)

    def wait_for_resume(self, name: str, count: int, driver: subprocess.Popen) -> int:
        """Until the run was resumed so often and has done a step since; the step it resumed at."""
        steps: list[str] = []

        def goes_on(log: str) -> bool:
            steps[:] = re.findall(r"resumed from \S+ at step (\d+)", log)
            return len(steps) >= count and self.steps(name)[-1] > int(steps[-1])

        self.wait_for(name, goes_on, driver)
        return int(steps[-1])

    def digest(self, name: str) -> str:
        return manifest.read(str(self.folder / name / "model")).files["denoiser.safetensors"].sha256


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> Iterator[Job]:
    tiny = _tiny()
    folder = tmp_path_factory.mktemp("survival")
    with pytest.MonkeyPatch.context() as patch:
        inputs = tiny.build_all(folder / "inputs", patch)
    dropped = ("total_samples", "checkpoint_every", "cluster=", "global_batch_size")
    kept = [one for one in tiny.STAGE2 if not one.startswith(dropped)]
    made = Job(folder, inputs["latents"], [*kept, f"global_batch_size={BATCH}", "stage.sampling_steps=2"])
    with made.started("calm") as driver:
        assert driver.wait(600) == 0, made.log("calm").read_text()[-5000:]
    yield made
    made.end_all()
