"""The gate environment: its dynamics in closed form, an expert that arrives by either side, and records that repeat."""

import json

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from latentray.data import episodes, synthetic_episodes
from latentray.data.synthetic_episodes import GAP, MOST_STEPS, RADIUS, STEP, WALL, Scenes


def scene(**changes) -> Scenes:
    """One episode: start (0.1, 0.5), gap at 0.5, so the disc lies at (0.35, 0.5)."""
    values = {"start_B2": [[0.1, 0.5]], "gap_B": [0.5], "goal_B2": [[0.9, 0.5]], "side_B": [1.0]} | changes
    return Scenes(**{name: np.array(value, np.float64) for name, value in values.items()})


def after(position, action, where: Scenes | None = None) -> list[float]:
    return synthetic_episodes.step(where or scene(), np.array([position]), np.array([action]))[0].tolist()


def test_a_free_step_is_the_clipped_velocity():
    assert after([0.8, 0.2], [0.5, -1.0]) == pytest.approx([0.8 + 0.5 * STEP, 0.2 - STEP])
    assert after([0.8, 0.2], [7.0, -9.0]) == pytest.approx([0.8 + STEP, 0.2 - STEP])
    assert after([0.98, 0.01], [1.0, -1.0]) == pytest.approx([1.0, 0.0])


@pytest.mark.parametrize(("x", "along", "left_at"), [(WALL - 0.01, 1.0, WALL - 1e-3), (WALL + 0.01, -1.0, WALL + 1e-3)])
def test_the_wall_stops_x_and_lets_y_slide_from_either_side(x, along, left_at):
    assert after([x, 0.75], [along, 0.4]) == pytest.approx([left_at, 0.75 + 0.4 * STEP])


@pytest.mark.parametrize(("offset", "passes"), [(0.0, True), (GAP - 1e-6, True), (GAP + 1e-6, False)])
def test_the_gap_is_where_the_way_crosses_the_wall_not_where_it_ends(offset, passes):
    """Half of the step is before the wall: the crossing is half of the way in y too."""
    start = [WALL - STEP / 2, 0.5 + offset - STEP / 2]
    assert (after(start, [1.0, 1.0])[0] > WALL) == passes


def test_the_disc_pushes_out_along_its_radius():
    x, y = after([0.35 - 0.6 * RADIUS - STEP, 0.5 - 0.8 * RADIUS * 0.9], [1.0, 0.0])
    assert np.hypot(x - 0.35, y - 0.5) == pytest.approx(RADIUS)
    assert np.arctan2(y - 0.5, x - 0.35) == pytest.approx(np.arctan2(-0.72, -0.6))
    assert after([0.35 - STEP, 0.5], [1.0, 0.0]) == pytest.approx([0.35 - RADIUS, 0.5])


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**63),
    x=st.floats(0, 1),
    y=st.floats(0, 1),
    action=st.tuples(st.floats(-2, 2), st.floats(-2, 2)),
)
def test_no_step_leaves_the_square_enters_the_disc_or_crosses_the_wall(seed, x, y, action):
    where = synthetic_episodes.scenes([seed])
    if np.hypot(*(np.array([x, y]) - where.obstacle_B2[0])) < RADIUS:
        return
    new_x, new_y = after([x, y], action, where)
    assert 0 <= new_x <= 1 and 0 <= new_y <= 1
    assert np.hypot(*(np.array([new_x, new_y]) - where.obstacle_B2[0])) >= RADIUS - 1e-9
    if (x < WALL) != (new_x < WALL):
        assert abs(y + (WALL - x) / (new_x - x) * (new_y - y) - where.gap_B[0]) <= GAP + 1e-9


def test_scenes_are_solvable_and_the_disc_is_midway():
    many = synthetic_episodes.scenes(np.arange(2000))
    assert (many.start_B2[:, 0] < WALL - 0.4).all() and (many.goal_B2[:, 0] > WALL + 0.2).all()
    np.testing.assert_allclose(many.obstacle_B2 - many.start_B2, many.gate_B2 - many.obstacle_B2, atol=1e-12)
    assert abs(many.side_B.mean()) < 0.1


def test_the_expert_arrives():
    seeds = np.arange(500)
    outcome = synthetic_episodes.rollout(synthetic_episodes.expert(synthetic_episodes.scenes(seeds)), seeds)
    assert outcome.success >= 0.99
    assert outcome.steps_B.max() < MOST_STEPS


def test_the_expert_takes_both_sides_and_never_touches_the_disc():
    sides = []
    for episode in synthetic_episodes.demonstrations(np.arange(100)):
        x, y, gap, _, _, disc_x, disc_y = episode.obs["state"].astype(np.float64).T
        assert np.hypot(x - disc_x, y - disc_y).min() > RADIUS + 0.01
        beside = (WALL - disc_x) * (y - disc_y) - (gap - disc_y) * (x - disc_x)  # > 0: left of the way to the gap
        beside = np.where(x < WALL, beside, 0)
        sides.append(np.sign(beside[np.abs(beside).argmax()]))
        assert sides[-1] == episode.meta["side"]
    assert 0.3 < np.mean(np.array(sides) > 0) < 0.7


def test_the_mean_of_both_sides_runs_into_the_disc():
    """Why a policy of one mode fails here: at the start the two demonstrations cancel out across the way."""
    seeds = np.arange(200)

    def mean(obs):
        state = obs["state"][:, -1]
        both = [synthetic_episodes.expert_actions(state, np.full(len(state), side)) for side in (-1.0, 1.0)]
        return (sum(both) / 2)[:, None]

    assert synthetic_episodes.rollout(mean, seeds).success < 0.5


def test_doing_nothing_fails_and_takes_all_steps():
    outcome = synthetic_episodes.rollout(lambda obs: np.zeros((len(obs["state"]), 8, 2)), [1, 2, 3])
    assert outcome.success == 0
    assert outcome.steps_B.tolist() == [MOST_STEPS] * 3


def test_a_policy_sees_the_latest_observations_and_all_its_actions_are_executed():
    seen = []

    def policy(obs):
        seen.append(obs["state"])
        return np.broadcast_to(np.array([0.0, 0.2]), (2, 4, 2))

    synthetic_episodes.rollout(policy, [5, 6], observations=3)
    assert len(seen) == MOST_STEPS // 4
    assert seen[0].shape == (2, 3, 7)
    assert (seen[0] == seen[0][:, :1]).all()
    rise = 0.2 * STEP
    np.testing.assert_allclose(seen[1][:, :, 1] - seen[0][:, :1, 1], [[2 * rise, 3 * rise, 4 * rise]] * 2, atol=1e-6)


def test_an_episode_does_not_depend_on_the_batch_it_runs_in():
    together = list(synthetic_episodes.episodes(300, 7))  # more than one batch
    assert together[260:263] == list(synthetic_episodes.episodes(3, 7, first=260))
    assert together[5] != next(synthetic_episodes.episodes(1, 8, first=5))
    assert len({sample.columns["sha256"] for sample in together}) == 300


def test_replaying_the_actions_of_a_record_gives_its_observations_and_reaches_the_goal():
    sample = next(synthetic_episodes.episodes(1, 3))
    tensors = safetensors.numpy.load(sample.members["episode.safetensors"])
    about = json.loads(sample.members["json"])
    where = synthetic_episodes.scenes([int(about["source"].removeprefix("gate/"))])
    position = where.start_B2
    for state, action in zip(tensors["obs.state"], tensors["actions"], strict=True):
        np.testing.assert_array_equal(synthetic_episodes.state(where, position)[0], state)
        position = synthetic_episodes.step(where, position, action[None])
    assert synthetic_episodes.reached(where, position).all()
    assert about["reached"] and about["steps"] == len(tensors["actions"])


def test_a_picture_shows_agent_goal_wall_gap_and_disc():
    where = scene(gap_B=[0.7], goal_B2=[[0.9, 0.2]])
    pixels = synthetic_episodes.picture(where, np.array([[0.1, 0.9]]))[0]
    assert pixels.shape == (32, 32, 3) and pixels.dtype == np.uint8

    def at(x, y):
        return pixels[31 - int(y * 32), int(x * 32)].tolist()

    assert at(0.1, 0.9) == [220, 40, 40]
    assert at(0.9, 0.2) == [40, 170, 60]
    assert at(WALL, 0.3) == [90] * 3
    assert at(WALL, 0.7) == [245] * 3
    assert at(*where.obstacle_B2[0]) == [150] * 3


def test_records_may_hold_pictures():
    sample = next(synthetic_episodes.episodes(1, 0, pictures=True))
    read = episodes.check(safetensors.numpy.load(sample.members["episode.safetensors"]))
    assert read.obs["picture"].shape == (read.steps, 32, 32, 3)
    assert read.obs["state"].shape == (read.steps, 7)
