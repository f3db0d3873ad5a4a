"""What `jobs.plan` says of the quickstart's second stage, and what the run then takes: within 30 %, on this machine's cores."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from latentray.checkpoint import manifest, store
from latentray.config import compose
from latentray.config.plan import PlanConfig
from latentray.planning import plan
from latentray.reporting import curves
from latentray.training import run_figures

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ROOT = Path(__file__).resolve().parents[2]
BATCH, PROBE, STEPS = 32, 40, 160
WITHIN = 0.3


def tiny():
    spec = importlib.util.spec_from_file_location("tiny_plan", ROOT / "tests/numerics/tiny.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def train(out: Path, overrides: list[str]) -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "jobs.train"]
    done = subprocess.run(
        [sys.executable, *launcher, *overrides, f"run={out.name}", f"out={out}"],
        cwd=ROOT, env=os.environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-5000:]


def test_the_plan_of_the_quickstarts_denoiser_holds_within_30_percent(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        inputs = tiny().build_all(tmp_path / "inputs", patch)
    settings = ["experiment=shapes_diffusion", f"latents={inputs['latents']}", "denoiser.context_width=16", "size=64"]
    settings += ["tracking=none", "cluster=none", f"log_every_samples={10 * BATCH}", "stage.sampling_steps=2"]
    probe = [*settings, f"total_samples={PROBE * BATCH}", "checkpoint_every_samples=0"]
    train(tmp_path / "probe", probe)
    whole = [*settings, f"total_samples={STEPS * BATCH}", f"checkpoint_every_samples={STEPS // 2 * BATCH}"]
    made = plan.plan(
        compose.load(
            "plan", PlanConfig, [*whole, "gpu=cpu", "gpus=2", f"measured={tmp_path / 'probe'}", "text_tokens=12"]
        )
    )
    train(tmp_path / "run", whole)
    records = curves.parse((tmp_path / "run" / "metrics.jsonl").read_text())
    taken = run_figures.actual(records, finished=True)
    newest = sorted(store.list_folders(str(tmp_path / "run" / "checkpoints")))[-1]
    saved = manifest.read(str(tmp_path / "run" / "checkpoints" / newest))
    taken["checkpoint_bytes"] = float(sum(entry.size for entry in saved.files.values()))
    found = {one.name: one for one in plan.beside(json.loads(json.dumps(made.to_json())), taken)}
    for one in found.values():
        print(f"\n{one.name}: planned {one.planned:.4g}, actual {one.actual:.4g}, {one.ratio:.2f}x", end="")
    assert set(found) == {"samples_per_second", "peak_memory_bytes", "hours", "checkpoint_bytes"}
    assert {name: one.ratio for name, one in found.items() if abs(one.ratio - 1) > WITHIN} == {}
