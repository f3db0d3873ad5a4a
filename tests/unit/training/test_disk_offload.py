"""ZeRO-3 with parameters on a disk learns what it learns without; needs libaio, and minutes for DeepSpeed's compiler."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.libaio, pytest.mark.timeout(1800)]
ROOT = Path(__file__).resolve().parents[3]
PROGRAM = Path(__file__).with_name("disk_offload.py")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_parameters_on_a_disk_change_no_bit(precision: str, tmp_path: Path) -> None:
    environ = os.environ | {"PYTHONPATH": str(ROOT / "platform"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(PROGRAM), precision,
         str(tmp_path)],
        env=environ, capture_output=True, text=True, timeout=1500, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    for rank in (0, 1):
        found = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert found["none"] == found["cpu"] == found["nvme"] == found["both"]
        assert len(set(found["none"]["losses"])) == 5
        assert found["on_disk"] > 0
