"""Why a policy is a diffusion model: of demonstrations that pass an obstacle on either side, a regression learns the mean."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from latentray.checkpoint import manifest
from latentray.config import compose
from latentray.config.evaluate import Evaluate
from latentray.data import index, shards, synthetic_episodes
from latentray.evaluation import policy_suite
from latentray.registry import report as reports

ROOT = Path(__file__).resolve().parents[2]
REGRESSION = [
    "objective=regression",
    "objective.timestep_spread=none",
    "stage.sampler=direct",
    "stage.sampling_steps=1",
]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_two_minutes_of_training_put_it_more_than_two_standard_errors_ahead_of_a_regression(tmp_path):
    """The same network, data, steps and optimizer (`experiment=policy_gate`: 100 s on 2 free cores each), 100 episodes."""
    folder = tmp_path / "built"
    folder.mkdir()
    index.write(
        [shards.write_shard(synthetic_episodes.episodes(2000, 0), folder / shards.shard_name(0))], folder / index.NAME
    )
    manifest.publish(folder, str(tmp_path / "gate" / "train"), kind="dataset")
    for name, more in (("policy", []), ("regression", REGRESSION)):
        settings = ["experiment=policy_gate", f"data={tmp_path / 'gate'}", "cluster=none", "cluster.threads=2"]
        settings += ["cluster.device=cpu", "tracking=none", f"run={name}", f"out={tmp_path / name}", *more]
        done = subprocess.run(
            [sys.executable, "-m", "jobs.train", *settings],
            cwd=ROOT, env=os.environ | {"PYTHONPATH": "platform"}, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    overrides = [f"model={tmp_path}/policy/model", f"baseline={tmp_path}/regression/model", f"out={tmp_path}/report"]
    config = compose.load("evaluate", Evaluate, ["suite=policy", *overrides, "episodes=100", "device=cpu"])
    figures = reports.load(policy_suite.evaluate(config)).metrics
    assert figures["policy.ahead_of_baseline"] > 2, figures
    assert figures["policy.rarer_way_share"] > 0.2, "it knows both ways"
