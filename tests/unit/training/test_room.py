"""Room on disks before a run begins, and a folder that not all ranks see."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from latentray import build
from latentray.config import compose
from latentray.config.train import Train
from latentray.errors import EnvironmentRefused
from latentray.training import room
from latentray.training.state import Worker


def load(tiny, *overrides: str, stage: int = 2) -> Train:
    settings = tiny.STAGE2 if stage == 2 else tiny.STAGE1
    return compose.load("train", Train, [*settings, "checkpoint_every_samples=8", "keep_checkpoints=5", *overrides])


def test_what_a_run_needs_grows_with_its_checkpoints(tiny):
    config = load(tiny)
    without = dataclasses.replace(config, checkpoint_every_samples=0)
    one = room.checkpoint_bytes(config)
    assert one == 16 * build.parameter_count(build.denoiser(config.denoiser))
    assert room.bytes_needed(config) - room.bytes_needed(without) == 7 * one


def test_a_checkpoint_of_stage_1_has_the_discriminator_in_it(tiny):
    with_one, without = load(tiny, stage=1), load(tiny, "stage.discriminator.weight=0", stage=1)
    assert room.checkpoint_bytes(without) == 16 * build.parameter_count(build.autoencoder(without.autoencoder))
    # Of 8 channels and 1 layer: 4 x 4 convolutions 3-8, 8-16 (and its norm), 16-1.
    weights = (48 * 8 + 8) + 128 * 16 + 2 * 16 + (256 + 1)
    assert room.checkpoint_bytes(with_one) - room.checkpoint_bytes(without) == 12 * weights


def full(monkeypatch, folder: Path) -> None:
    """No room below a folder, and 1 TB elsewhere."""

    def usage(path) -> types.SimpleNamespace:
        return types.SimpleNamespace(free=0 if Path(path).is_relative_to(folder) else 10**12)

    monkeypatch.setattr(shutil, "disk_usage", usage)


@pytest.mark.parametrize("out", ["s3://bucket/run", "run"])
def test_where_checkpoints_are_staged_there_must_be_room_for_one(tiny, tmp_path, monkeypatch, out):
    staging = tmp_path / "staging"
    staging.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(staging))
    full(monkeypatch, staging)
    out = out if "://" in out else str(tmp_path / out)
    with pytest.raises(EnvironmentRefused, match="too full") as caught:
        room.require(load(tiny), out)
    assert caught.value.where == str(staging) and "TMPDIR" in caught.value.mend
    room.require(load(tiny, "checkpoint_every_samples=0"), out)
    room.require(load(tiny, "cluster=ray", "cluster.address=auto"), out)  # the workers look on their own nodes


def worker(tiny, rank: int, world: int, out: str) -> Worker:
    return Worker(
        config=load(tiny), run="r", out=out, rank=rank, world=world, device=torch.device("cpu"), attempt="now"
    )


def test_a_worker_without_room_names_its_node(tiny, tmp_path, monkeypatch):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        room.require_on_workers(worker(tiny, 0, 1, "s3://bucket/run"))
        full(monkeypatch, tmp_path)
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
        monkeypatch.setattr("socket.gethostname", lambda: "node-7")
        with pytest.raises(EnvironmentRefused, match="node-7: The disk is too full: 0 MiB free, about") as caught:
            room.require_on_workers(worker(tiny, 0, 1, "s3://bucket/run"))
        assert "on every node" in caught.value.mend
    finally:
        dist.destroy_process_group()


RANK = """
import json, sys
from pathlib import Path
import torch
import torch.distributed as dist
from latentray.config import compose
from latentray.config.train import Train
from latentray.errors import EnvironmentRefused
from latentray.training import room
from latentray.training.state import Worker

rank, base, settings = int(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
dist.init_process_group("gloo", init_method=f"file://{base}/store", rank=rank, world_size=2)
config = compose.load("train", Train, [*settings, "checkpoint_every_samples=8"])
try:
    room.require_on_workers(
        Worker(config=config, run="r", out="run", rank=rank, world=2, device=torch.device("cpu"), attempt="now")
    )
    print("begun")
except EnvironmentRefused as error:
    print(error.what, error.mend)
dist.destroy_process_group()
"""
"""A rank of two, whose run's folder is relative to where it is started."""


@pytest.mark.parametrize("is_shared", [True, False])
def test_a_folder_on_one_nodes_disk_is_told_on_all_ranks_before_a_step(tiny, tmp_path, is_shared):
    ranks = []
    for rank in range(2):
        home = tmp_path / ("home" if is_shared else f"home-{rank}")
        home.mkdir(exist_ok=True)
        command = [sys.executable, "-c", RANK, str(rank), str(tmp_path), json.dumps(tiny.STAGE2)]
        ranks.append(subprocess.Popen(command, cwd=home, stdout=subprocess.PIPE, text=True))
    told = [rank.communicate(timeout=120)[0].strip() for rank in ranks]
    if is_shared:
        assert told == ["begun", "begun"]
    else:
        assert told[0] == told[1], "each rank ends with it"
        assert "Rank 1, on " in told[0] and "does not see the run's folder of rank 0" in told[0] and "s3" in told[0]
    assert not list(tmp_path.glob("home*/run/.seen-*"))
