"""Receding-horizon execution in the built-in environment: what is asked when, what counts, and how ways are told apart."""

import dataclasses
import types

import numpy as np
import pytest

from latentray.data import synthetic_episodes as gate
from latentray.errors import ConfigError
from latentray.evaluation import rollouts
from latentray.evaluation.rollouts import Settings


class Expert:
    """Stands where an ActionSampler does: plans of the scripted expert, on the side that each request's seed says."""

    def __init__(self, *, side=None, action_steps=16):
        config = types.SimpleNamespace(action_steps=action_steps, observation_steps=2, in_channels=2)
        self.model = types.SimpleNamespace(config=config, widths={"state": 7}, executed=8)
        self.defaults = types.SimpleNamespace(sampler="flow_euler", steps=10)
        self.side, self.asked = side, []

    def act(self, requests):
        self.asked.append(requests)
        state = np.stack([one.observations["state"][-1] for one in requests])
        side = np.full(len(requests), self.side or 1.0)
        actions = []
        for _ in range(self.model.config.action_steps):
            actions.append(gate.expert_actions(state, side))
            state = state.copy()
            state[:, :2] = np.clip(state[:, :2] + gate.STEP * actions[-1], 0, 1)
        return list(np.stack(actions, axis=1))


SETTINGS = Settings(sampler="flow_euler", steps=10, executed=8)


def test_an_expert_that_plans_ahead_succeeds():
    seeds = rollouts.scene_seeds(0, 50)
    outcome = rollouts.run(Expert(), SETTINGS, seeds)
    assert outcome.success >= 0.98
    figures = rollouts.figures(outcome, seeds)
    assert figures["policy.success"] == outcome.success and figures["policy.rarer_way_share"] == 0


@pytest.mark.parametrize("executed", [1, 5, 8])
def test_it_is_asked_again_after_so_many_actions_with_the_latest_observations(executed):
    model, seeds = Expert(), rollouts.scene_seeds(1, 3)
    outcome = rollouts.run(model, dataclasses.replace(SETTINGS, executed=executed), seeds)
    assert len(model.asked) == -(-outcome.steps_B.max() // executed)
    for plan, requests in enumerate(model.asked[:2]):
        for row, one in enumerate(requests):
            seen = one.observations["state"][:, :2]
            at = plan * executed
            np.testing.assert_allclose(seen, outcome.path_BT2[row, [max(at - 1, 0), at]], atol=1e-6)


def test_each_plan_of_each_scene_draws_noise_of_its_own_and_the_same_again():
    first, again, seeds = Expert(), Expert(), rollouts.scene_seeds(2, 4)
    for model in (first, again):
        rollouts.run(model, SETTINGS, seeds)
    drawn = [one.seed for requests in first.asked for one in requests]
    assert len(set(drawn)) == len(drawn)
    assert drawn == [one.seed for requests in again.asked for one in requests]


def test_scenes_are_none_of_those_that_were_demonstrated():
    shown = {int(one.meta["source"].split("/")[1]) for one in gate.demonstrations(gate.mixed(0, np.arange(500)))}
    assert not shown & set(rollouts.scene_seeds(0, 500).tolist())
    assert len(set(rollouts.scene_seeds(0, 500).tolist())) == 500


@pytest.mark.parametrize("side", [1.0, -1.0])
def test_the_side_of_a_way_is_seen_from_its_start(side):
    seeds = rollouts.scene_seeds(3, 40)
    found = rollouts.offsets(rollouts.run(Expert(side=side), SETTINGS, seeds), seeds)
    assert (np.sign(found) == side).all()
    assert (np.abs(found) > gate.RADIUS).all()


def test_a_way_that_slides_along_the_disc_reaches_the_goal_and_is_no_success():
    seeds = rollouts.scene_seeds(4, 60)
    straight = Expert()
    aim = straight.act

    def into_the_disc(requests):
        plans = aim(requests)
        for one, actions in zip(requests, plans, strict=True):
            x, y, gap, _, _, _, _ = one.observations["state"][-1]
            if x < gate.WALL - 0.02:
                way = np.array([gate.WALL + gate.STEP - x, gap - y + 0.02])
                actions[:] = way / np.linalg.norm(way)
        return plans

    straight.act = into_the_disc
    outcome = rollouts.run(straight, dataclasses.replace(SETTINGS, executed=1), seeds)
    assert outcome.reached_B.mean() > 0.5
    assert outcome.touched_B.all() and outcome.success == 0


def test_the_standard_error_is_a_binomials():
    assert rollouts.standard_error(0.5, 100) == pytest.approx(0.05)
    draws = np.random.default_rng(0).binomial(100, 0.8, 200_000) / 100
    assert rollouts.standard_error(0.8, 100) == pytest.approx(draws.std(), rel=0.01)


def test_a_sheet_drives_the_same_scenes_for_each_policy_several_times():
    panels = rollouts.sheet({"left": (Expert(side=1.0), SETTINGS), "right": (Expert(side=-1.0), SETTINGS)}, seed=5)
    half = len(panels) // 2
    for one, other in zip(panels[:half], panels[half:], strict=True):
        assert (one.wall, one.disc, one.goal) == (other.wall, other.disc, other.goal)
        assert len(one.paths) == len(one.succeeded) > 4
        assert one.title.startswith("left: ") and other.title.startswith("right: ")
        assert not np.allclose(one.paths[0][:8], other.paths[0][:8])


@pytest.mark.parametrize("executed", [0, 17])
def test_more_actions_than_there_are_cannot_be_executed(executed):
    with pytest.raises(ConfigError) as caught:
        rollouts.run(Expert(), dataclasses.replace(SETTINGS, executed=executed), rollouts.scene_seeds(0, 2))
    assert caught.value.where == "executed"


def test_a_policy_of_another_robot_is_refused():
    model = Expert()
    model.model.widths = {"joints": 7}
    with pytest.raises(ConfigError, match="joints"):
        rollouts.run(model, SETTINGS, rollouts.scene_seeds(0, 2))
