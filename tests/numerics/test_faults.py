"""Runs of two workers that meet faults, each beside one that met none: what is lost, and what the numbers are then."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from latentray.checkpoint import manifest, store, weights

BATCH = 8
RUNS = Path(__file__).with_name("runs.py")


class Faults:
    """Runs jobs of `runs.py` under torchrun and finds what they left."""

    def __init__(self, root: Path, settings: list[str]) -> None:
        self.root, self.settings = root, settings

    def job(self, name: str, steps: int, *overrides: str, **more) -> dict:
        given = [f"total_samples={steps * BATCH}", f"checkpoint_every_samples={3 * BATCH}", *overrides]
        return {"name": name, "overrides": [*self.settings, *given, f"run={name}", f"out={self.root / name}"], **more}

    def run(self, *jobs: dict, expect: int | None = 0, restarts: int = 0, timeout: float = 600) -> str:
        (self.root / "jobs.json").write_text(json.dumps(jobs))
        launcher = [
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            f"--max-restarts={restarts}",
        ]
        done = subprocess.run(
            [sys.executable, *launcher, str(RUNS), str(self.root / "jobs.json"), "0"],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout, check=False, env=os.environ,
        )  # fmt: skip
        assert expect is None or done.returncode == expect, done.stdout[-6000:]
        return done.stdout

    def state(self, name: str) -> list[str]:
        """What each rank held at the end: sha256 of weights, moments and random state."""
        return [(self.root / name / f"state-{rank}.txt").read_text() for rank in range(2)]

    def raw(self, name: str) -> dict[str, torch.Tensor]:
        return weights.read(self.root / name / "raw.safetensors")

    def lines(self, name: str) -> list[dict]:
        found = (self.root / name / "metrics.jsonl").read_text().splitlines()
        return [line for line in map(json.loads, found) if "train/learning_rate" in line]

    def checkpoints(self, name: str) -> list[str]:
        return sorted(store.list_folders(str(self.root / name / "checkpoints")))


@pytest.fixture(scope="module")
def faults(inputs, tmp_path_factory) -> Faults:
    from tiny import STAGE2

    kept = [one for one in STAGE2 if not one.startswith(("total_samples", "checkpoint_every"))]
    return Faults(tmp_path_factory.mktemp("faults"), [*kept, f"latents={inputs['latents']}", "keep_checkpoints=2"])


@pytest.fixture(scope="module")
def met(faults: Faults) -> str:
    """All runs that end by themselves, one after the other in two processes; what they said."""
    few = ("faults.drops_in_a_row=4", "faults.max_rollbacks=2")
    return faults.run(
        faults.job("calm", 12),
        faults.job("nan", 12, inject={"nan_at": 5}),
        faults.job("spike", 12, "faults.spike_window=8", inject={"spike_at": 9}),
        faults.job("infinite", 60, "faults.drops_in_a_row=16", inject={"infinite": [7, 57]}),
        faults.job("hopeless", 30, *few, inject={"infinite": [7, 30]}),
        faults.job("broken", 12, inject={"broken_weights_at": 9}),
        faults.job("full", 12, inject={"full_disk": [2, 8]}),
        faults.job("fuller", 30, "faults.failed_checkpoints=2", inject={"full_disk": [2, 30]}),
        faults.job("preempted", 12, "keep_checkpoints=9", inject={"preempted_from": 7}),
        faults.job("stopped", 12, inject={"terminated_at": 4}),
        faults.job("stopped", 12),
        faults.job("soon", 12, "faults.spike_window=8", inject={"spike_at": 7}),
        faults.job("soon-stopped", 12, "faults.spike_window=8", inject={"terminated_at": 5}),
        faults.job("soon-stopped", 12, "faults.spike_window=8", inject={"spike_at": 7}),
    )


def dropped(line: dict) -> int:
    return int(line["train/dropped_steps"])


def test_a_batch_that_is_no_number_on_one_rank_is_dropped_on_all(faults, met):
    lines = faults.lines("nan")
    assert [dropped(line) for line in lines] == [0] * 5 + [1] * 7
    assert ["train/loss" in line for line in lines] == [True] * 5 + [False] + [True] * 6
    assert all(torch.isfinite(value).all() for value in faults.raw("nan").values())
    calm = [line["train/loss"] for line in faults.lines("calm")]
    assert [line.get("train/loss") for line in lines][:5] == calm[:5], "before the fault nothing differs"


def test_a_loss_of_ten_thousand_times_is_dropped(faults, met):
    lines = faults.lines("spike")
    assert [dropped(line) for line in lines] == [0] * 9 + [1] * 3
    assert max(line["train/loss"] for line in lines if "train/loss" in line) < 100


def test_a_spike_soon_after_a_break_is_dropped_as_without_one(faults, met):
    """The guard has seen one loss since then, and judges by those that the checkpoint kept."""
    assert [dropped(line) for line in faults.lines("soon")] == [0] * 7 + [1] * 5
    assert [dropped(line) for line in faults.lines("soon-stopped")] == [0] * 7 + [1] * 5
    assert faults.state("soon-stopped") == faults.state("soon")


def test_fifty_infinite_gradients_in_a_row_are_survived_by_going_back(faults, met):
    last = faults.lines("infinite")[-1]
    assert last["train/dropped_steps"] == 50 and last["train/rollbacks"] == 3
    assert "16 steps in a row were dropped: back to the weights of" in met
    assert all(torch.isfinite(value).all() for value in faults.raw("infinite").values())
    assert manifest.find(str(faults.root / "infinite" / "model")) is not None


def test_a_run_that_does_not_recover_ends_with_its_cause(faults, met):
    assert "hopeless ended: TrainingFailed" in met
    assert "the run went back 2 times before" in met
    assert manifest.find(str(faults.root / "hopeless" / "model")) is None


def test_weights_that_are_no_numbers_are_never_saved(faults, met):
    assert "the weights were no numbers any more: back to the weights of" in met
    assert faults.lines("broken")[-1]["train/rollbacks"] == 1
    assert [name.split("-")[0] for name in faults.checkpoints("broken")] == ["000000006", "000000012"]
    for name in faults.checkpoints("broken"):
        folder = faults.root / "broken" / "checkpoints" / name
        for path in folder.rglob("*.safetensors"):
            assert all(torch.isfinite(tensor).all() for tensor in weights.read(path).values()), path


def test_a_full_disk_costs_checkpoints_and_not_the_run(faults, met):
    assert "checkpoint failed (1 in a row): [Errno 28] No space left on device" in met
    assert [name.split("-")[0] for name in faults.checkpoints("full")] == ["000000009", "000000012"]
    assert faults.state("full") == faults.state("calm"), "the numbers do not know of the disk"
    assert "fuller ended: StorageFailed: 3 checkpoints in a row could not be written" in met


def test_sigterm_leaves_a_checkpoint_and_the_run_goes_on_bit_equal(faults, met):
    assert "stopped at 40 samples, as asked" in met
    assert "stopped ended: Stopped" in met and "resumed from" in met and "at step 5" in met
    assert faults.state("stopped") == faults.state("calm")


def test_a_node_that_will_be_taken_back_costs_one_checkpoint(faults, met):
    assert [name.split("-")[0] for name in faults.checkpoints("preempted")] == [f"{n:09d}" for n in (3, 6, 8, 9, 12)]
    assert faults.state("preempted") == faults.state("calm")


PLACES = (
    "before the upload", "between the ranks", "before the manifest", "in the manifest", "after the manifest", "in the retention",
)  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.slow
def test_a_job_killed_while_it_saves_goes_on_from_the_newest_valid_checkpoint(faults, met, place):
    name = place.replace(" ", "-")
    job = faults.job(name, 12, "keep_checkpoints=1")
    faults.run(job | {"inject": {"dies_while_saving": {"place": place, "step": 6}}}, expect=1)
    output = faults.run(job)
    sealed = place in ("after the manifest", "in the retention")
    assert f"at step {6 if sealed else 3}" in output
    assert faults.state(name) == faults.state("calm")
    kept = faults.checkpoints(name)
    assert [one.split("-")[0] for one in kept] == ["000000012"], "no orphans after the next clean-up"


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.slow
def test_a_frozen_rank_is_named_and_the_run_goes_on(faults, met, rank):
    """Rank 0 too, which serves the signs of life."""
    name = f"frozen-{rank}"
    job = faults.job(name, 12, "faults.silent_s=8", "faults.step_timeout_s=60")
    began = time.monotonic()
    first = faults.run(job | {"inject": {"frozen_at": {"step": 7, "rank": rank}}}, expect=1)
    print(f"\nrank {rank} frozen: the attempt began and ended within {time.monotonic() - began:.0f} s")
    assert f"hang: rank {rank}" in first and "at step 7 gave no sign of life" in first
    stacks = list((faults.root / name / "stacks").glob(f"*-rank_{1 - rank:05d}.txt"))
    assert stacks and "_step" in stacks[0].read_text(), "who waited, and where"
    faults.run(job)
    assert faults.state(name) == faults.state("calm")
