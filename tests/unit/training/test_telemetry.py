"""What a worker measures of its memory, and how what it logged outlives its node."""

import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

from latentray.checkpoint import store
from latentray.config import compose
from latentray.config.train import Train
from latentray.training.state import Worker
from latentray.training.telemetry import METRICS, Telemetry, peak_memory_bytes

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


@pytest.fixture
def logging(tmp_path, monkeypatch):
    """logging(out): what rank 0 of a run that lies there has logged one line with."""
    monkeypatch.setenv("LATENTRAY_CACHE", str(tmp_path / "cache"))
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    made = []

    def begin(out: str) -> Telemetry:
        config = compose.load("train", Train, ["tracking=none"])
        worker = Worker(config=config, run="r", out=out, rank=0, world=1, device=torch.device("cpu"), attempt="a")
        made.append(Telemetry(worker, facts={}, resumed_at=0))
        made[-1].flush(64, {"train/loss": 0.5})
        return made[-1]

    yield begin
    for one in made:
        one.close()
    dist.destroy_process_group()


def test_lines_lie_where_a_dead_node_does_not_take_them_along_before_a_checkpoint(tmp_path, logging, monkeypatch):
    """What NFS has not been sent yet goes with the node that wrote it."""
    settled = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (settled.append(os.readlink(f"/proc/self/fd/{file}")), real(file)))
    logging(str(tmp_path / "run")).upload()
    assert settled == [str(tmp_path / "run" / METRICS)]


def test_lines_are_in_the_bucket_before_a_checkpoint_and_what_is_half_written_is_not(moto_s3, tmp_path, logging):
    telemetry = logging(moto_s3.uri("run"))
    (tmp_path / "cache" / "runs" / "r" / "picture.part").write_bytes(b"half")
    telemetry.upload()
    assert b'"train/loss": 0.5' in store.read_bytes(moto_s3.uri("run", METRICS))
    assert not [name for name in store.list_files(moto_s3.uri("run")) if name.endswith(".part")]
