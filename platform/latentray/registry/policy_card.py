"""The model card of a policy's release."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from latentray.registry.report import EvaluationReport


def front(license: str) -> dict[str, Any]:
    """The metadata, in the hub's words."""
    return {
        "license": license,
        "pipeline_tag": "robotics",
        "library_name": "latentray",
        "tags": ["diffusion", "policy"],
    }


def about(settings: Mapping[str, Any]) -> str:
    """What it is told, and what it says."""
    net, policy = settings["denoiser"], settings["policy"]
    return (
        f"A policy that gives {net['action_steps']} actions of {net['in_channels']} numbers at once, of which the first "
        f"{policy['executed']} are executed before it is asked again. It is told the latest {net['observation_steps']} "
        f"observations of {', '.join(f'`{name}`' for name in policy['observations'])}, in the units of its training data."
    )


def measured(report: EvaluationReport) -> str:
    """How the figures came about."""
    return (
        f"Measured in {report.samples} scenes of the built-in environment that no demonstration was made in (seed "
        f"{report.seed}), sampler `{report.sampler.sampler}`, {report.sampler.steps} steps. Success is to reach the goal and to "
        "touch nothing on the way; figures of another number of executed actions are of another data set, and not compared."
    )


USE = (
    "Acting where it was trained: by latentray's endpoint (`POST /v1/actions`), or in Python with "
    "`latentray.inference.acting.ActionSampler.load(<this folder>)`."
)
LIMITS = (
    "- It imitates its demonstrations; of states that they do not hold it knows nothing.\n"
    "- Actions are bounded by the ranges of the training data, which `config.json` states.\n"
    "- Nothing checks an action for safety: add limits of force, speed and space before a robot moves by it."
)
