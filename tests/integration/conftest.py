"""A training run under Ray Train as its own process, and a cluster with a dashboard, for tests that kill them."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import psutil
import pytest

from latentray.checkpoint import manifest
from latentray.config import compose
from latentray.config.train import Train
from latentray.training.feed import Feed

ROOT = Path(__file__).resolve().parents[2]
BATCH, STEPS, EVERY = 8, 240, 20


def load(path: str):
    """A module of another test folder, by its path below tests/."""
    spec = importlib.util.spec_from_file_location(f"shared_{Path(path).stem}", ROOT / "tests" / path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Job:
    """`python -m jobs.train` on a Ray cluster of its own, two workers."""

    def __init__(self, folder: Path, latents: str, settings: list[str]) -> None:
        self.folder, self.latents, self.settings = folder, latents, settings
        self.cache = str(folder / "cache")

    def overrides(self, name: str, *more: str) -> list[str]:
        run = [f"run={name}", f"out={self.folder / name}", f"latents={self.latents}"]
        size = [f"total_samples={STEPS * BATCH}", f"checkpoint_every_samples={EVERY * BATCH}", "cluster=ray"]
        workers = ["cluster.workers=2", "cluster.threads=1", "cluster.device=cpu", "cluster.max_failures=20"]
        return [*self.settings, *size, *workers, *run, *more]

    def environ(self) -> dict[str, str]:
        """Of every process of this job: by its cache folder it is found."""
        environ = os.environ | {"PYTHONPATH": "platform", "LATENTRAY_CACHE": self.cache, "OMP_NUM_THREADS": "1"}
        environ["RAY_worker_niceness"] = "0"  # else whatever runs beside the tests goes before the workers
        environ.pop("RAY_ADDRESS", None)
        return environ

    @contextlib.contextmanager
    def started(self, name: str, *more: str, env: Mapping[str, str] | None = None) -> Iterator[subprocess.Popen]:
        """The driver, in a process group of its own; what is left of it is ended."""
        temporary = tempfile.mkdtemp(prefix="lr-")
        environ = self.environ() | {"RAY_TMPDIR": temporary} | (dict(env) if env else {})
        command = [sys.executable, "-m", "jobs.train", *self.overrides(name, *more)]
        with open(self.log(name), "ab") as log:
            driver = subprocess.Popen(command, cwd=ROOT, env=environ, stdout=log, stderr=log, start_new_session=True)
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

    def noting(self, name: str) -> dict[str, str]:
        """Environment of workers that note which samples they read (`ledger/sitecustomize.py`)."""
        folder = self.folder / "ledgers" / name
        folder.mkdir(parents=True, exist_ok=True)
        path = [str(ROOT / "platform"), str(ROOT), str(ROOT / "tests/integration/ledger")]
        return {"PYTHONPATH": os.pathsep.join(path), "LATENTRAY_TEST_LEDGER": str(folder)}

    def ledger(self, name: str) -> dict[int, list[dict]]:
        """As `ledger_of`."""
        return ledger_of(self.folder / "ledgers" / name, name)

    def require_exact_ledger(self, name: str, steps: int, *more: str) -> dict[int, list[dict]]:
        """The steps that count read every sample of the global order once, at its place, and none else; the ledger."""
        order = Feed.open(compose.load("train", Train, self.overrides(name, *more))).order
        found = self.ledger(name)
        assert sorted(found) == list(range(steps))
        for step, ranks in found.items():
            assert len(ranks) == ranks[0]["world"]
            read = [tuple(one) for rank in ranks for one in rank["ids"]]
            assert read == [(one.epoch, one.index) for one in order.step(step).ids], step
        return found

    def log(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    def workers(self) -> list[psutil.Process]:
        return self._processes(lambda command: command.startswith("ray::RayTrainWorker"))

    def drivers(self) -> list[psutil.Process]:
        return self._processes(lambda command: re.match(r"\S*python\S* -m jobs\.train ", command) is not None)

    def _processes(self, is_one: Callable[[str], bool]) -> list[psutil.Process]:
        """This job's processes with such a command line."""
        found = []
        for process in psutil.process_iter(["cmdline"]):
            with contextlib.suppress(psutil.Error):
                command = " ".join(process.info["cmdline"] or ())
                if is_one(command) and process.environ().get("LATENTRAY_CACHE") == self.cache:
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

    def last_step(self, name: str) -> int:
        """The step that was logged last, 0 where there is none; cheap however long the run is."""
        path = self.folder / name / "metrics.jsonl"
        if not path.exists():
            return 0
        with path.open("rb") as file:
            file.seek(max(path.stat().st_size - 8192, 0))
            found = re.findall(rb'"samples": (\d+)', file.read())
        return int(found[-1]) // BATCH if found else 0

    def wait_for_step(self, name: str, step: int, driver: subprocess.Popen, seconds: float = 300) -> None:
        end = time.monotonic() + seconds
        while self.last_step(name) < step:
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
            return len(steps) >= count and self.last_step(name) > int(steps[-1])

        self.wait_for(name, goes_on, driver)
        return int(steps[-1])

    def digest(self, name: str) -> str:
        return manifest.read(str(self.folder / name / "model")).files["denoiser.safetensors"].sha256


def ledger_of(folder: Path, run: str) -> dict[int, list[dict]]:
    """Step -> what each rank noted of it, by rank, of the attempt that did the step last: the one that counts."""
    noted: dict[int, dict[str, list[dict]]] = {}
    for path in folder.glob("*.jsonl"):
        for line in map(json.loads, path.read_text().splitlines()):
            if line["run"] == run:
                noted.setdefault(line["step"], {}).setdefault(line["attempt"], []).append(line)
    newest = {step: max(by.values(), key=lambda lines: lines[0]["at"]) for step, by in noted.items()}
    return {step: sorted(lines, key=lambda line: line["rank"]) for step, lines in newest.items()}


@pytest.fixture(scope="session")
def ledgers() -> Callable[[Path, str], dict[int, list[dict]]]:
    """`ledger_of`, for tests without a Job."""
    return ledger_of


@pytest.fixture(scope="module")
def begun_job(tmp_path_factory) -> Iterator[Job]:
    """Its inputs are written, and nothing was trained."""
    tiny = load("numerics/tiny.py")
    folder = tmp_path_factory.mktemp("survival")
    with pytest.MonkeyPatch.context() as patch:
        inputs = tiny.build_all(folder / "inputs", patch)
    dropped = ("total_samples", "checkpoint_every", "cluster=", "global_batch_size")
    kept = [one for one in tiny.STAGE2 if not one.startswith(dropped)]
    made = Job(folder, inputs["latents"], [*kept, f"global_batch_size={BATCH}", "stage.sampling_steps=2"])
    yield made
    made.end_all()


@pytest.fixture(scope="module")
def job(begun_job: Job) -> Job:
    """With the run `calm`, which nothing happened to."""
    with begun_job.started("calm") as driver:
        assert driver.wait(600) == 0, begun_job.log("calm").read_text()[-5000:]
    return begun_job


@pytest.fixture(scope="module")
def head(job: Job) -> Iterator[str]:
    """The address of a one-node cluster for this job, with a dashboard, that lives longer than its drivers."""
    with _head_node(cpus=4, environ=job.environ()) as address:
        yield address
    job.end_all()


@pytest.fixture(scope="module")
def dashboard() -> Iterator[str]:
    """The address of a one-node cluster that takes jobs."""
    with _head_node(cpus=2, environ=dict(os.environ)) as address:
        yield address


@contextlib.contextmanager
def _head_node(*, cpus: int, environ: dict[str, str]) -> Iterator[str]:
    """A head node with a dashboard, within."""
    gcs, http, agent, agent_grpc, client = free_ports(5)
    folder = Path(tempfile.mkdtemp(prefix="lr-"))  # short: Ray's socket paths are limited to about 100 characters
    options = {
        "--node-ip-address": "127.0.0.1",
        "--port": gcs,
        "--dashboard-host": "127.0.0.1",
        "--dashboard-port": http,
        "--dashboard-agent-listen-port": agent,
        "--dashboard-agent-grpc-port": agent_grpc,
        "--ray-client-server-port": client,
        "--num-cpus": cpus,
        "--object-store-memory": 128 * 2**20,
        "--temp-dir": folder,
    }
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"]
    command += [f"{name}={value}" for name, value in options.items()]
    with open(folder / "head.log", "wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder, env=environ, start_new_session=True)
    address = f"http://127.0.0.1:{http}"
    try:
        deadline = time.monotonic() + 90
        while not _takes_jobs(address):
            assert process.poll() is None and time.monotonic() < deadline, (folder / "head.log").read_text()
            time.sleep(0.2)
        yield address
    finally:
        process.send_signal(signal.SIGTERM)  # --block: the head ends what it started
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens on now; all held at once, so that no two are the same."""
    held = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in held]
    for one in held:
        one.close()
    return ports


def _takes_jobs(address: str) -> bool:
    """True once the dashboard takes jobs, which is a moment after its port opens."""
    from ray.job_submission import JobSubmissionClient

    try:
        JobSubmissionClient(address).list_jobs()
    except (OSError, RuntimeError, ValueError):
        return False
    return True
