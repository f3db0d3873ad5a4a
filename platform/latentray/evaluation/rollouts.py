"""A policy in the built-in environment: receding-horizon execution, its success, and the ways it went.

Chi et al. 2023, section II: of the actions predicted together some are executed, then it is asked again.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import numpy as np

from latentray.data import synthetic_episodes as gate
from latentray.data.synthetic_episodes import Outcome, Policy
from latentray.errors import ConfigError
from latentray.inference.acting import ActionRequest, ActionSampler
from latentray.randomness import Purpose, mix
from latentray.reporting import trajectories

_SHOWN, _TIMES = 4, 16
"""Scenes on a sheet, and how often each is driven through."""
_OBSERVED = {"state": len(gate.STATE)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """How a policy's actions are drawn, and how many of them are executed before it is asked again."""

    sampler: str
    steps: int
    executed: int


def scene_seeds(seed: int, episodes: int) -> np.ndarray:
    """Seeds of scenes, int64 (episodes,): a hash, so that they are none of those that demonstrations were made in."""
    return np.array([mix(seed, Purpose.DRAWING, number) >> 1 for number in range(episodes)], np.int64)


def defaults(model: ActionSampler) -> Settings:
    """What the model itself asks for."""
    return Settings(sampler=model.defaults.sampler, steps=model.defaults.steps, executed=model.model.executed)


def require_gate(model: ActionSampler) -> None:
    """Raise ConfigError unless the model acts in the built-in environment: two numbers, told its state alone."""
    if model.model.widths != _OBSERVED or model.model.config.in_channels != 2:
        raise ConfigError(
            f"The policy is told {model.model.widths} and gives {model.model.config.in_channels} numbers; the built-in "
            f"environment shows {_OBSERVED} and takes 2.",
            where="model",
            mend="Give a policy that was trained on source=gate.",
        )


def drive(model: ActionSampler, settings: Settings, seeds: np.ndarray) -> Policy:
    """The model as a policy for the scenes of these seeds; each plan of each scene draws noise of its own.

    Raises ConfigError for settings that do not fit the model.
    """
    most = model.model.config.action_steps
    if not 1 <= settings.executed <= most:
        raise ConfigError(
            f"{settings.executed} of {most} actions cannot be executed.", where="executed", mend=f"Choose 1 to {most}."
        )
    plans = 0

    def policy(observations: Mapping[str, np.ndarray]) -> np.ndarray:
        nonlocal plans
        requests = [
            ActionRequest(
                observations={name: values[row] for name, values in observations.items()},
                seed=mix(int(seed), plans),
                sampler=settings.sampler,
                steps=settings.steps,
            )
            for row, seed in enumerate(seeds)
        ]
        plans += 1
        return np.stack(model.act(requests))[:, : settings.executed]

    return policy


def run(model: ActionSampler, settings: Settings, seeds: np.ndarray, *, draws: np.ndarray | None = None) -> Outcome:
    """The model in the scenes of these seeds, all at once. Raises ConfigError as `require_gate` and `drive`.

    Args:
        draws: seeds of the actions' noise, where a scene is to be driven through in several ways; null takes the scenes'.
    """
    require_gate(model)
    policy = drive(model, settings, seeds if draws is None else draws)
    return gate.rollout(policy, seeds, observations=model.model.config.observation_steps)


def standard_error(share: float, count: int) -> float:
    """Of a share of `count` independent episodes: sqrt(p (1 - p) / n)."""
    return math.sqrt(share * (1 - share) / count)


def figures(outcome: Outcome, seeds: np.ndarray) -> dict[str, float]:
    """What a report says of one policy's episodes, by metric."""
    count = len(outcome.reached_B)
    return {
        "policy.success": outcome.success,
        "policy.success_standard_error": standard_error(outcome.success, count),
        "policy.reached": float(outcome.reached_B.mean()),
        "policy.touched": float(outcome.touched_B.mean()),
        "policy.steps": float(outcome.steps_B.mean()),
        "policy.rarer_way_share": float(min((left := offsets(outcome, seeds) > 0).mean(), 1 - left.mean())),
    }


def offsets(outcome: Outcome, seeds: np.ndarray) -> np.ndarray:
    """(B,) where each way passed beside the disc: how far left of the straight line to the gap it was at its farthest."""
    scene = gate.scenes(seeds)
    way_B2 = scene.gate_B2 - scene.start_B2
    way_B2 = way_B2 / np.linalg.norm(way_B2, axis=1, keepdims=True)
    from_start = outcome.path_BT2 - scene.start_B2[:, None]
    left_BT = way_B2[:, None, 0] * from_start[:, :, 1] - way_B2[:, None, 1] * from_start[:, :, 0]
    left_BT = np.where(outcome.path_BT2[:, :, 0] < gate.WALL, left_BT, 0.0)
    farthest = np.abs(left_BT).argmax(axis=1)
    return np.take_along_axis(left_BT, farthest[:, None], axis=1)[:, 0]


def sheet(policies: Mapping[str, tuple[ActionSampler, Settings]], *, seed: int) -> list[trajectories.Panel]:
    """The same scenes for each policy, each driven through several times; one row for each policy."""
    seeds = scene_seeds(seed, _SHOWN)
    repeated = np.repeat(seeds, _TIMES)
    draws = np.array([mix(seed, Purpose.SAMPLER_NOISE, number) >> 1 for number in range(len(repeated))], np.int64)
    scene = gate.scenes(seeds)
    panels = []
    for name, (model, settings) in policies.items():
        outcome = run(model, settings, repeated, draws=draws)
        for column in range(_SHOWN):
            rows = slice(column * _TIMES, (column + 1) * _TIMES)
            succeeded = outcome.succeeded_B[rows]
            panels.append(
                trajectories.Panel(
                    title=f"{name}: {int(succeeded.sum())} of {_TIMES}",
                    wall=(gate.WALL, float(scene.gap_B[column]), gate.GAP),
                    disc=(*scene.obstacle_B2[column].tolist(), gate.RADIUS),
                    goal=(*scene.goal_B2[column].tolist(), gate.REACHED),
                    paths=[
                        path[: steps + 1]
                        for path, steps in zip(outcome.path_BT2[rows], outcome.steps_B[rows], strict=True)
                    ],
                    succeeded=succeeded.tolist(),
                )
            )
    return panels
