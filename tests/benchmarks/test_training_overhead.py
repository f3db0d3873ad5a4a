"""What Ray Train adds to a step, and what checkpoints take of a run: two workers, metrics every step.

On a machine that is otherwise idle only. Linux shares busy cores out by session (autogroup): each of Ray's workers is one of
its own, torchrun's are one together, so that whatever else runs takes more from torchrun.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from latentray.tracking import names

pytestmark = [pytest.mark.slow, pytest.mark.cluster, pytest.mark.timeout(1800)]

ROOT = Path(__file__).resolve().parents[2]
BATCH, LEAST_S = 96, 0.5
BLOCK, PAIRS = 5, 8
"""Steps that one of the two does while the other waits, and how often; the first pair warms up."""
CHECKPOINT_EVERY, CHECKPOINTS = 100, 2
NET = ["denoiser.channels=[160,160]", "denoiser.groups=16", "denoiser.head_dim=32"]


def tiny():
    spec = importlib.util.spec_from_file_location("tiny_overhead", ROOT / "tests/numerics/tiny.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> list[str]:
    module = tiny()
    with pytest.MonkeyPatch.context() as patch:
        inputs = module.build_all(tmp_path_factory.mktemp("inputs"), patch)
    own = (
        "total_samples",
        "checkpoint_every",
        "cluster=",
        "cluster.device",
        "global_batch",
        "denoiser.c",
        "denoiser.g",
    )
    kept = [one for one in module.STAGE2 if not one.startswith((*own, "denoiser.h", "log_every"))]
    kept += [*NET, "denoiser.context_width=16", f"latents={inputs['latents']}", f"global_batch_size={BATCH}"]
    return [*kept, f"log_every_samples={BATCH}", "stage.sampling_steps=2", "cluster.device=cpu", "cluster.threads=1"]


@contextlib.contextmanager
def started(how: str, overrides: list[str], out: Path, **env: str) -> Iterator[subprocess.Popen]:
    """A run of two workers under Ray Train or torchrun."""
    launcher = {
        "ray": ["-m", "jobs.train", "cluster=ray", "cluster.workers=2"],
        "torchrun": [
            "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "jobs.train", "cluster=none",
        ],
    }[how]  # fmt: skip
    temporary = tempfile.mkdtemp(prefix="lr-")  # short: Ray's socket paths are limited
    # Ray runs its workers at a lower priority than everything else: beside one another the two must have the same.
    environ = os.environ | {"RAY_TMPDIR": temporary, "RAY_worker_niceness": "0"} | env
    environ.pop("RAY_ADDRESS", None)
    log = out.with_suffix(".log")
    with log.open("wb") as file:
        run = subprocess.Popen(
            [sys.executable, *launcher, *overrides, f"run={out.name}", f"out={out}"],
            cwd=ROOT, env=environ, stdout=file, stderr=file, start_new_session=True,
        )  # fmt: skip
    try:
        yield run
    finally:
        if run.poll() is None:
            run.terminate()
            run.wait(60)
        shutil.rmtree(temporary, ignore_errors=True)


def blocks(path: Path) -> list[list[float]]:
    """Seconds of the steps of each block; what passed while the other had its turn is left out."""
    found: dict[int, list[float]] = {}
    lines = [(int(number), float(at)) for number, at in map(str.split, path.read_text().splitlines())]
    for (number, begin), (following, end) in itertools.pairwise(lines):
        if following == number + 1:
            found.setdefault(number // BLOCK, []).append(end - begin)
    return [found[number] for number in sorted(found)]


def test_a_step_under_ray_train_costs_no_more_than_under_torchrun(settings: list[str], tmp_path: Path) -> None:
    turns = tmp_path / "turns"
    turns.mkdir()
    path = os.pathsep.join([str(ROOT / "platform"), str(ROOT), str(Path(__file__).parent / "turns")])
    more = [*settings, f"total_samples={(PAIRS * BLOCK + 1) * BATCH}", "checkpoint_every_samples=0"]
    env = {"PYTHONPATH": path, "LATENTRAY_TEST_TURNS": str(turns), "LATENTRAY_TEST_BLOCK": str(BLOCK)}
    env["LATENTRAY_TEST_BLOCKS"] = str(PAIRS)
    with contextlib.ExitStack() as runs:
        both = {
            how: runs.enter_context(started(how, more, tmp_path / how, **env, LATENTRAY_TEST_TURN=turn))
            for turn, how in (("0", "torchrun"), ("1", "ray"))
        }
        for how, run in both.items():
            assert run.wait(900) == 0, (tmp_path / f"{how}.log").read_text()[-5000:]
    plain, ray = (blocks(turns / f"{turn}.txt")[1:PAIRS] for turn in (0, 1))
    pairs = [statistics.median(b) / statistics.median(a) for a, b in zip(plain, ray, strict=True)]
    step = statistics.median(itertools.chain(*plain))
    print(f"\na step under torchrun {step:.2f} s, under Ray Train {statistics.median(pairs):.3f}x of it (wanted: 1.02), "
          f"median of {len(pairs)} pairs of {BLOCK} steps: {', '.join(f'{one:.3f}' for one in pairs)}")  # fmt: skip
    assert step >= LEAST_S and len(pairs) >= 5
    assert statistics.median(pairs) < 1.5


def test_checkpoints_take_little_of_a_runs_time(settings: list[str], tmp_path: Path) -> None:
    steps = CHECKPOINT_EVERY * CHECKPOINTS + CHECKPOINT_EVERY // 2
    more = [f"total_samples={steps * BATCH}", f"checkpoint_every_samples={CHECKPOINT_EVERY * BATCH}"]
    with started("ray", [*settings, *more], tmp_path / "saving") as run:
        assert run.wait(900) == 0, (tmp_path / "saving.log").read_text()[-5000:]
    lines = [json.loads(one) for one in (tmp_path / "saving" / "metrics.jsonl").read_text().splitlines()]
    lines = [one for one in lines if names.TRAIN_LEARNING_RATE in one]
    took = [b["time"] - a["time"] for a, b in itertools.pairwise(lines)]
    step, whole = statistics.median(took), sum(took)
    stalled = lines[-1][names.CHECKPOINT_STALL_SECONDS]
    share = lines[-1][names.lost_to("checkpoints")]
    near = [
        seconds - step
        for number, seconds in enumerate(took, start=2)
        if 0 < number - number // CHECKPOINT_EVERY * CHECKPOINT_EVERY <= 10 and number > CHECKPOINT_EVERY
    ]
    print(
        f"\n{len(lines)} steps of {step:.2f} s, a checkpoint each {CHECKPOINT_EVERY}: the loop stood still for {stalled:.2f} s "
        f"of {whole:.0f} s, {share:.2%} (wanted: 2%); with what the ten steps after each took longer {sum(near) / whole:.2%}"
    )
    assert step >= LEAST_S
    assert share < 0.1
