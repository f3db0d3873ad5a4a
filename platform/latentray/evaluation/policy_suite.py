"""`python -m jobs.evaluate suite=policy`: a policy in the built-in environment, beside the scripted expert and a baseline."""

from __future__ import annotations

import json
import math

import numpy as np
from rich.console import Console
from rich.table import Table

from latentray.checkpoint import manifest, store
from latentray.config import compose
from latentray.config.evaluate import Evaluate
from latentray.data import synthetic_episodes as gate
from latentray.evaluation import rollouts
from latentray.evaluation.rollouts import Settings
from latentray.inference.acting import ActionSampler
from latentray.registry.report import EvaluationReport, FeatureNetworkId, SamplerSettings
from latentray.reporting import pictures, trajectories

_NO_NETWORK = FeatureNetworkId(name="none", digest="none", resize="none")


def evaluate(config: Evaluate) -> str:
    """Drive the policy through scenes that no demonstration was made in, write the report artifact, and return its URI.

    Raises InputMissing, ArtifactError or DigestMismatch where a model cannot be used or is no policy, ConfigError for settings
    that do not fit it and for a policy of another robot.
    """
    model_uri = store.absolute(config.model or "")
    out = store.absolute(config.out) if config.out else store.join(model_uri.rsplit("/", 1)[0], "report")
    model = ActionSampler.load(model_uri, device=config.device)
    settings = settings_of(config, model)
    seeds = rollouts.scene_seeds(config.seed, config.episodes)
    figures = rollouts.figures(rollouts.run(model, settings, seeds), seeds)
    expert = gate.rollout(gate.expert(gate.scenes(seeds)), seeds)
    figures["policy.expert_success"] = expert.success
    shown: dict[str, tuple[ActionSampler, Settings]] = {"policy": (model, settings)}
    inputs = {"model": model.model.digest}
    if config.baseline:
        other = ActionSampler.load(store.absolute(config.baseline), device=config.device)
        shown["baseline"] = (other, Settings(**vars(rollouts.defaults(other)) | {"executed": settings.executed}))
        inputs["baseline"] = other.model.digest
        figures |= _beside(figures, rollouts.figures(rollouts.run(*shown["baseline"], seeds), seeds))
    report = EvaluationReport(
        model=model.model.digest,
        dataset=store.digest_of({"environment": "gate", "seed": config.seed, "executed": settings.executed}),
        feature_network=_NO_NETWORK,
        samples=config.episodes,
        seed=config.seed,
        sampler=SamplerSettings(sampler=settings.sampler, steps=settings.steps, guidance_scale=1.0),
        metrics=figures,
    )
    sheet = trajectories.picture(rollouts.sheet(shown, seed=config.seed))
    with store.staging() as folder:
        (folder / "report.json").write_text(json.dumps(report.to_json(), indent=2) + "\n")
        pictures.save_png(np.asarray(sheet), folder / "trajectories.png", {"executed": str(settings.executed)})
        manifest.publish(folder, out, kind="report", inputs=inputs, config=compose.to_dict(config), replace=True)
    _print(report, out)
    print(f"Next: python -m jobs.promote model={model_uri} report={out} gates=policy", flush=True)
    return out


def settings_of(config: Evaluate, model: ActionSampler) -> Settings:
    """The model's own settings, but for those that are given."""
    own = rollouts.defaults(model)
    return Settings(
        sampler=config.sampler or own.sampler,
        steps=own.steps if config.steps is None else config.steps,
        executed=own.executed if config.executed is None else config.executed,
    )


def _beside(policy: dict[str, float], baseline: dict[str, float]) -> dict[str, float]:
    """The baseline's success, and how many standard errors of their difference the policy is ahead of it."""
    found = {
        f"policy.baseline_{name}": baseline[f"policy.{name}"]
        for name in ("success", "success_standard_error", "reached")
    }
    error = math.hypot(policy["policy.success_standard_error"], found["policy.baseline_success_standard_error"])
    ahead = policy["policy.success"] - found["policy.baseline_success"]
    return found | {"policy.ahead_of_baseline": ahead / error if error else math.copysign(math.inf, ahead)}


def _print(report: EvaluationReport, out: str) -> None:
    table = Table("metric", "value", title=f"{report.samples} episodes, {report.sampler.sampler}")
    for name, value in sorted(report.metrics.items()):
        table.add_row(name, f"{value:.4f}")
    Console().print(table)
    print(f"Report: {out}", flush=True)
