"""Tensors on a disk: equal, without a name, refused where there is no room; and what an engine then holds in memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from latentray.errors import EnvironmentRefused
from latentray.training.mapped import LEAST_BYTES, Disk

ROOT = Path(__file__).resolve().parents[3]
PROGRAM = Path(__file__).with_name("mapped_memory.py")


def test_a_copy_is_equal_and_its_file_has_no_name(tmp_path: Path) -> None:
    disk, value = Disk(tmp_path), torch.randn(3, LEAST_BYTES // 4)
    copy = disk.copy(value.t())
    assert torch.equal(copy, value.t())
    assert copy.untyped_storage().data_ptr() != value.untyped_storage().data_ptr()
    assert disk.holds(copy)
    assert disk.holds(copy[1:])
    assert not disk.holds(value)
    assert list(tmp_path.iterdir()) == []
    value.fill_(7)
    assert not (copy == 7).any()


def test_small_tensors_stay_in_memory(tmp_path: Path) -> None:
    small = Disk(tmp_path).copy(torch.arange(5.0))
    assert small.untyped_storage().filename is None
    assert small.tolist() == [0, 1, 2, 3, 4]
    assert Disk(tmp_path).zeros_like(torch.empty(0, 3)).shape == (0, 3)


def test_a_disk_without_room_is_refused_before_it_is_used(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentRefused, match="4e\\+06 GB") as told:
        Disk(tmp_path).zeros_like(torch.empty(1).expand(10**15))
    assert str(tmp_path) in told.value.where
    assert list(tmp_path.iterdir()) == []


def test_the_state_of_the_optimizer_leaves_the_memory(tmp_path: Path) -> None:
    """Of 16 M parameters: the weights in fp32, two moments, gradients, average, and what a checkpoint copies."""
    environ = os.environ | {"PYTHONPATH": str(ROOT / "platform"), "OMP_NUM_THREADS": "1"}
    found = {}
    for where in ("cpu", "nvme"):
        done = subprocess.run(
            [sys.executable, str(PROGRAM), where, str(tmp_path)], env=environ, capture_output=True, text=True, timeout=300,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        found[where] = json.loads(done.stdout.splitlines()[-1])
    assert found["cpu"]["loss"] == found["nvme"]["loss"]
    trained, saved = (found["cpu"][key] - found["nvme"][key] for key in ("trained", "saved"))
    fp32 = 4 * found["cpu"]["parameters"]
    assert trained == pytest.approx(5 * fp32, rel=0.15)
    assert saved == pytest.approx(9 * fp32, rel=0.15)
