"""What a worker measures of its steps, and who is told: the tracker, on rank 0."""

from __future__ import annotations

import contextlib
import resource
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from latentray import tracking
from latentray.checkpoint import store
from latentray.config import compose
from latentray.tracking import names
from latentray.training.export import Exported
from latentray.training.state import Worker

METRICS = "metrics.jsonl"
RUN = "run.json"
"""What a run is, written by each attempt when it begins: `run`, `stage`, `config`, `facts`, `inputs`, `workers`, `device`."""


class Telemetry:
    """Collects the metrics of the steps between two flushes; logs their means over all ranks.

    A metric is a number, or two: a sum and what it is a sum over, such as samples of a kind that not every micro-batch has.
    """

    def __init__(
        self,
        worker: Worker,
        *,
        facts: dict[str, object],
        resumed_at: int,
        inputs: Mapping[str, str] | None = None,
    ) -> None:
        self.worker = worker
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._waited = self._busy = 0.0
        self._since, self._samples = time.perf_counter(), resumed_at
        self.tracker: tracking.Tracker | None = None
        self._folder: Path | None = None
        if worker.leads:
            self._folder = self._local_folder()
            resolved = compose.to_dict(worker.config) | {"run": worker.run, "out": worker.out, "facts": facts}
            store.write_json(store.join(worker.out, RUN), _about(worker, facts, inputs or {}))
            self.tracker = tracking.open(
                worker.config.tracking, worker.run, self._folder, resolved, resumed_at=resumed_at or None
            )

    def _local_folder(self) -> Path:
        """Where the tracker writes: the run's own folder where it is local, else this node's cache of it."""
        if not store.is_remote(self.worker.out):
            return store.local_path(self.worker.out)
        folder = store.cache_dir() / "runs" / self.worker.run
        folder.mkdir(parents=True, exist_ok=True)
        where = store.join(self.worker.out, METRICS)
        if store.exists(where):
            (folder / METRICS).write_bytes(store.read_bytes(where))
        return folder

    def step(self, micro_batches: list[dict[str, Tensor]], *, data_wait: float, seconds: float) -> None:
        """Take in one step, without metrics where it was dropped; tensors stay on their device until the next flush."""
        for metrics in micro_batches:
            for name, value in metrics.items():
                self._sums[name] = self._sums.get(name, torch.zeros_like(value, dtype=torch.float32)) + value.float()
                self._counts[name] = self._counts.get(name, 0) + 1
        self._waited += data_wait
        self._busy += seconds

    def flush(self, samples: int, about: Mapping[str, float]) -> dict[str, float]:
        """Means since the last flush, over all ranks, and what else there is to say; logged on rank 0. Collective."""
        order = sorted(self._sums)
        logged: dict[str, float] = {}
        if order:  # none where every step was dropped
            pairs = torch.stack([_sum_and_count(self._sums[name], self._counts[name]) for name in order])
            dist.all_reduce(pairs)
            totals, counts = pairs.unbind(1)
            means = zip(order, (totals / counts).tolist(), counts.tolist(), strict=True)
            logged = {name: mean for name, mean, count in means if count}
        now = time.perf_counter()
        logged |= about
        peak = torch.tensor([peak_memory_bytes(self.worker.device)], dtype=torch.int64, device=self.worker.device)
        dist.all_reduce(peak, dist.ReduceOp.MAX)
        logged[names.TRAIN_PEAK_MEMORY_BYTES] = int(peak)
        logged[names.TRAIN_SAMPLES_PER_SECOND] = (samples - self._samples) / max(now - self._since, 1e-9)
        logged[names.TRAIN_DATA_WAIT_SHARE] = self._waited / max(self._busy, 1e-9)
        self._sums, self._counts, self._waited, self._busy = {}, {}, 0.0, 0.0
        self._since, self._samples = now, samples
        if self.tracker is not None:
            self.tracker.log(samples, logged)
        return logged

    def exported(self, exported: Exported, *, samples: int) -> None:
        """Record the artifact that the run made, its figures and its pictures."""
        if self.tracker is None:
            return
        self.tracker.log(samples, exported.metrics)
        for name, path in exported.pictures.items():
            self.tracker.image(samples, name, path)
        self.tracker.artifact(
            f"{self.worker.run}-{exported.kind}",
            exported.kind,
            exported.uri,
            exported.digest,
            exported.inputs,
            exported.meta,
        )

    def upload(self) -> None:
        """Bring what the tracker wrote to where another node finds it, since the worker that resumes may be there."""
        if self._folder is None:
            return
        if not store.is_remote(self.worker.out):
            store.settle(self._folder / METRICS)  # of NFS a node that dies takes along what it had not sent
            return
        for path in sorted(self._folder.rglob("*")):
            name = path.relative_to(self._folder).as_posix()
            if name.startswith("wandb/") or path.suffix == ".part":  # `wandb sync` reads its own folder on this node
                continue
            if path.is_file():
                store.upload(path, store.join(self.worker.out, name))

    def close(self) -> None:
        if self.tracker is None:
            return
        self.tracker.finish()
        if self.tracker.sync_command:
            print(f"W&B was offline; upload the run later with: {self.tracker.sync_command}", flush=True)
        self.upload()


def _sum_and_count(total: Tensor, count: int) -> Tensor:
    """(2,): of a metric that is one number its mean and 1, so that each rank counts alike."""
    return total if total.ndim else torch.stack([total / count, torch.ones_like(total)])


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory that this process ever held: what PyTorch allocated of its GPU, or the process's own on CPUs."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(
        OSError
    ):  # Linux; `getrusage` would count what the process that started this one held, too
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _about(worker: Worker, facts: Mapping[str, object], inputs: Mapping[str, str]) -> dict[str, object]:
    gpu = worker.device.type == "cuda"
    return {
        "run": worker.run,
        "stage": worker.config.stage.name,
        "config": compose.to_dict(worker.config),
        "facts": dict(facts),
        "inputs": dict(inputs),
        "workers": worker.world,
        "device": torch.cuda.get_device_name(worker.device) if gpu else "CPU",
    }
