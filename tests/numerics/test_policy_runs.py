"""Actions through the whole: episodes are learnt, a killed run goes on, and the model is evaluated, driven and exported."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from jobs import sampling
from latentray.checkpoint import manifest, weights
from latentray.config import compose
from latentray.config.evaluate import Evaluate
from latentray.config.export import Export
from latentray.config.promote import Gate, PromoteConfig
from latentray.config.sample import Sample
from latentray.data import index, shards, synthetic_episodes
from latentray.errors import ArtifactError, ConfigError
from latentray.evaluation import policy_suite
from latentray.inference import policy_folder
from latentray.registry import promotion
from latentray.registry import report as reports
from latentray.training import consolidation

POLICY = [
    "denoiser=policy_tiny", "denoiser.channels=[16,16]", "objective=flow", "objective.timestep_spread=sobol",
    "stage.sampler=flow_euler", "stage.sampling_steps=3", "global_batch_size=8", "total_samples=48",
    "log_every_samples=8", "ema_half_life_samples=64", "precision=fp32", "optimizer.lr=0.002",
    "optimizer.warmup_samples=16", "cluster=none", "tracking=none", "cluster.device=cpu", "checkpoint_every_samples=16",
]  # fmt: skip
REGRESSION = [
    "objective=regression",
    "objective.timestep_spread=none",
    "stage.sampler=direct",
    "stage.sampling_steps=1",
]


def write_episodes(root: Path) -> str:
    for split, count in (("train", 24), ("validation", 4)):
        folder = root / f"built-{split}"
        folder.mkdir(parents=True)
        made = synthetic_episodes.episodes(count, 0, first=1000 * (split == "validation"))
        index.write([shards.write_shard(made, folder / shards.shard_name(0))], folder / index.NAME)
        manifest.publish(folder, str(root / "gate" / split), kind="dataset")
    return str(root / "gate")


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("policy")
    write_episodes(folder)
    return folder


def job(root: Path, name: str, *more: str, **also) -> dict:
    overrides = [*POLICY, *more, f"data={root / 'gate'}", f"run={name}", f"out={root / name}"]
    return {"name": name, "overrides": overrides, **also}


@pytest.fixture(scope="module")
def trained(root, run_jobs) -> Path:
    """The folder of two runs: `policy` and `regression`."""
    run_jobs(root, [job(root, "policy"), job(root, "regression", *REGRESSION)])
    return root


def exported(folder: Path) -> dict[str, torch.Tensor]:
    return weights.read(folder / "model" / "denoiser.safetensors")


def losses(folder: Path) -> list[float]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line["train/loss"] for line in lines if "train/loss" in line]


@pytest.mark.slow
def test_both_learn_and_tell_what_from(trained):
    digest = manifest.read(str(trained / "gate" / "train")).digest
    for name in ("policy", "regression"):
        found = losses(trained / name)
        assert len(set(found)) == 6 and all(0 < loss < 5 for loss in found)
        assert manifest.read(str(trained / name / "model")).inputs == {"dataset": digest}
        assert (trained / name / "report.html").exists()


@pytest.mark.slow
def test_the_model_keeps_the_ranges_of_the_data_it_learnt_from(trained):
    model = policy_folder.load(str(trained / "policy" / "model"))
    found = list(synthetic_episodes.demonstrations(_seeds()))
    actions = np.concatenate([one.actions_TA for one in found])
    state = np.concatenate([one.obs["state"] for one in found])
    for name, values in (("actions", actions), ("obs.state", state)):
        np.testing.assert_array_equal(model.ranges[name].low, values.min(axis=0))
        np.testing.assert_array_equal(model.ranges[name].high, values.max(axis=0))
    assert model.executed == 8 and model.observations == ("state",)


def _seeds() -> np.ndarray:
    return synthetic_episodes.mixed(0, np.arange(24))


@pytest.mark.slow
def test_it_is_evaluated_beside_a_baseline_and_promoted_by_its_report(trained, tmp_path):
    settings = [f"model={trained / 'policy' / 'model'}", f"baseline={trained / 'regression' / 'model'}"]
    config = compose.load(
        "evaluate", Evaluate, ["suite=policy", *settings, "episodes=6", "device=cpu", f"out={tmp_path / 'report'}"]
    )
    found = reports.load(policy_suite.evaluate(config))
    assert found.samples == 6 and found.sampler.sampler == "flow_euler"
    assert found.metrics["policy.expert_success"] == 1.0
    assert {"policy.success", "policy.success_standard_error", "policy.baseline_success"} <= found.metrics.keys()
    with Image.open(tmp_path / "report" / "trajectories.png") as sheet:
        assert sheet.width > 800 and sheet.text["executed"] == "8"
    told = manifest.read(str(tmp_path / "report")).inputs
    assert told == {
        "model": manifest.read(str(trained / "policy" / "model")).digest,
        "baseline": manifest.read(str(trained / "regression" / "model")).digest,
    }
    gate = Gate(metric="policy.success", min=0.0)
    config = PromoteConfig(
        model=str(trained / "policy" / "model"), report=str(tmp_path / "report"), registry=str(tmp_path), gates=[gate]
    )
    promotion.promote(config)
    (release,) = (tmp_path / "releases").iterdir()
    assert policy_folder.load(str(release)).executed == 8
    card = (release / "README.md").read_text()
    assert "16 actions of 2 numbers" in card and "/v1/actions" in card and "pictures" not in card


@pytest.mark.slow
def test_it_is_driven_in_the_shell(trained, tmp_path, capsys):
    settings = [f"release={trained / 'policy' / 'model'}", "episodes=4", "device=cpu", f"out={tmp_path}/ways.png"]
    sampling.draw(compose.load("sample", Sample, settings))
    assert "over 4 episodes" in capsys.readouterr().out
    with Image.open(tmp_path / "ways.png") as sheet:
        assert 0 <= json.loads(sheet.text["parameters"])["figures"]["policy.success"] <= 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "error", "says"),
    [
        (["prompt=forward"], ArtifactError, "gives actions"),
        (["episodes=2", "sampler=ddim"], ConfigError, "ddim"),
        (["episodes=2", "out=ways.webp"], ConfigError, "picture"),
    ],
)
def test_what_a_policy_cannot_do_is_refused_in_the_shell(trained, settings, error, says):
    overrides = [f"release={trained / 'policy' / 'model'}", "device=cpu", *settings]
    with pytest.raises(error, match=says):
        sampling.draw(compose.load("sample", Sample, overrides))


@pytest.mark.slow
def test_a_killed_run_ends_at_the_same_bits(trained, run_jobs, tmp_path):
    killed = job(trained, "killed")
    run_jobs(trained, [killed | {"die_at": 4}], expect=9)
    assert "at step 4" in run_jobs(trained, [killed])
    whole, resumed = exported(trained / "policy"), exported(trained / "killed")
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[name], resumed[name]) for name in whole)
    consolidation.export(Export(run=str(trained / "killed"), out=str(tmp_path / "weights")))
    assert weights.read(tmp_path / "weights" / "denoiser.safetensors").keys() == whole.keys()


@pytest.mark.slow
def test_two_workers_see_the_same_numbers(trained, run_jobs):
    run_jobs(trained, [job(trained, "two", "deepspeed=zero2")], world=2)
    assert losses(trained / "two") == pytest.approx(losses(trained / "policy"), rel=1e-5)
