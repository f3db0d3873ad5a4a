"""The *gate* environment: a point passes an obstacle on either side, then a gap in a wall, and reaches a goal.

The unit square, x to the right and y up. A wall stands at x = 0.6, with a gap of half width 0.1 around y = g. A disc of
radius 0.1 lies midway between the start and the gap, so that its two sides are equally good: the expert takes either, and
a policy that averages its demonstrations runs into the disc. An action is a velocity; step t is

    p' = clip(p + 0.05 clip(a, -1, 1), 0, 1)
    at the wall    where p' is behind it and the line from p crosses it outside the gap, x' stays 0.001 before it
    at the disc    where |p' - c| < r, p' becomes c + r (p' - c) / |p' - c|

An episode ends with |p - goal| <= 0.05 (reached) or after 64 steps; it succeeds where the goal is reached and neither wall
nor disc ever stood in the way. All is elementwise over a batch B of episodes, and in
correctly rounded operations only, so that an episode does not depend on the batch it runs in.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from latentray.data import episodes as records
from latentray.data import shards
from latentray.data.permutation import mixed
from latentray.randomness import Purpose

STEP = 0.05
WALL, GAP = 0.6, 0.1
RADIUS = 0.1
REACHED = 0.05
MOST_STEPS = 64
SIZE = 32
"""Height and width of the picture, in pixels."""
STATE = ("x", "y", "gap_y", "goal_x", "goal_y", "obstacle_x", "obstacle_y")
"""Entries of the observation `state`."""

_EPISODES = 2
"""The stream of draws beside those of pictures and clips."""
_BEFORE_WALL = 1e-3
_CLEARANCE = 0.06
"""How far from the disc the expert passes."""
_BATCH = 256

Policy = Callable[[Mapping[str, np.ndarray]], np.ndarray]
"""Observations, name -> (B, To, ...), to actions (B, Ta, 2): all Ta are executed before it is asked again."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scenes:
    """What does not change during B episodes, float64."""

    start_B2: np.ndarray
    gap_B: np.ndarray
    goal_B2: np.ndarray
    side_B: np.ndarray
    """On which side the expert passes the obstacle: +1 left of the way to the gap, -1 right of it."""

    @property
    def gate_B2(self) -> np.ndarray:
        """The middle of the gap."""
        return np.stack([np.full_like(self.gap_B, WALL), self.gap_B], axis=1)

    @property
    def obstacle_B2(self) -> np.ndarray:
        """The middle of the disc."""
        return (self.start_B2 + self.gate_B2) / 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of B episodes."""

    reached_B: np.ndarray
    touched_B: np.ndarray
    """Where wall or disc stood in the way."""
    steps_B: np.ndarray
    """Steps to the goal; MOST_STEPS where it was not reached."""
    path_BT2: np.ndarray
    """Positions, from the start on, of MOST_STEPS + 1 moments; they stay at the goal."""

    @property
    def succeeded_B(self) -> np.ndarray:
        """Where the goal was reached without touching anything."""
        return self.reached_B & ~self.touched_B

    @property
    def success(self) -> float:
        """Share of the episodes that succeeded."""
        return float(self.succeeded_B.mean())


def scenes(seeds: npt.ArrayLike) -> Scenes:
    """The scenes of these seeds (integers), each drawn by itself."""
    keys = mixed(np.asarray(seeds), int(Purpose.DRAWING), _EPISODES)
    u = [(mixed(keys, number) >> np.uint64(11)).astype(np.float64) * 2.0**-53 for number in range(6)]
    return Scenes(
        start_B2=np.stack([0.05 + 0.1 * u[0], 0.2 + 0.6 * u[1]], axis=1),
        gap_B=0.3 + 0.4 * u[2],
        goal_B2=np.stack([0.85 + 0.1 * u[3], 0.1 + 0.8 * u[4]], axis=1),
        side_B=np.where(u[5] < 0.5, -1.0, 1.0),
    )


def step(scene: Scenes, position_B2: np.ndarray, action_B2: np.ndarray) -> np.ndarray:
    """The positions after one step, float64 (B, 2)."""
    return move(scene, position_B2, action_B2)[0]


def move(scene: Scenes, position_B2: np.ndarray, action_B2: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The positions after one step, float64 (B, 2), and where wall or disc stood in its way, bool (B,)."""
    x, y = position_B2[:, 0], position_B2[:, 1]
    to_B2 = np.clip(position_B2 + STEP * np.clip(action_B2.astype(np.float64), -1, 1), 0, 1)
    new_x, new_y = to_B2[:, 0], to_B2[:, 1]
    crosses = (x < WALL) != (new_x < WALL)
    share = (WALL - x) / np.where(crosses, new_x - x, 1.0)
    blocked = crosses & (np.abs(y + share * (new_y - y) - scene.gap_B) > GAP)
    new_x = np.where(blocked, np.where(x < WALL, WALL - _BEFORE_WALL, WALL + _BEFORE_WALL), new_x)
    from_x, from_y = new_x - scene.obstacle_B2[:, 0], new_y - scene.obstacle_B2[:, 1]
    distance = _norm(from_x, from_y)
    inside = distance < RADIUS
    stretch = RADIUS / np.where(inside & (distance > 0), distance, RADIUS)
    from_x = np.where(inside & (distance == 0), -RADIUS, from_x)  # from the very middle: back towards the left
    pushed_B2 = scene.obstacle_B2 + np.stack([from_x * stretch, from_y * stretch], axis=1)
    return np.where(inside[:, None], pushed_B2, np.stack([new_x, new_y], axis=1)), blocked | inside


def reached(scene: Scenes, position_B2: np.ndarray) -> np.ndarray:
    """Where the goal is reached, bool (B,)."""
    return _norm(*(position_B2 - scene.goal_B2).T) <= REACHED


def state(scene: Scenes, position_B2: np.ndarray) -> np.ndarray:
    """The observation `state`: float32 (B, 7), entries as STATE names them."""
    parts = [position_B2, scene.gap_B[:, None], scene.goal_B2, scene.obstacle_B2]
    return np.concatenate(parts, axis=1).astype(np.float32)


def picture(scene: Scenes, position_B2: np.ndarray) -> np.ndarray:
    """The observation `picture`: uint8 (B, 32, 32, 3), y up; wall and disc gray, goal green, agent red."""
    centre = (np.arange(SIZE) + 0.5) / SIZE
    x_HW, y_HW = np.meshgrid(centre, centre[::-1])
    pixels = np.full((len(position_B2), SIZE, SIZE, 3), 245, np.uint8)

    def within(middle_B2: np.ndarray, radius: float) -> np.ndarray:
        return _norm(x_HW - middle_B2[:, 0, None, None], y_HW - middle_B2[:, 1, None, None]) <= radius

    wall_HW = np.abs(x_HW - WALL) <= 0.5 / SIZE + 1e-9
    pixels[wall_HW & (np.abs(y_HW - scene.gap_B[:, None, None]) > GAP)] = 90
    pixels[within(scene.obstacle_B2, RADIUS)] = 150
    pixels[within(scene.goal_B2, REACHED)] = (40, 170, 60)
    pixels[within(position_B2, 0.04)] = (220, 40, 40)
    return pixels


def expert_actions(state_BD: np.ndarray, side_B: np.ndarray) -> np.ndarray:
    """The expert: float32 (B, 2), of length 1 at most. It heads for the first of these that is not behind it:

    the point beside the disc, at right angles to the way to the gap; a point just behind the gap; the goal.
    """
    x, y, gap, goal_x, goal_y, disc_x, disc_y = state_BD.astype(np.float64).T
    way_x, way_y = WALL - disc_x, gap - disc_y
    length = _norm(way_x, way_y)
    way_x, way_y = way_x / length, way_y / length
    progress = (x - disc_x) * way_x + (y - disc_y) * way_y
    beside = side_B * (RADIUS + _CLEARANCE)
    past_disc, past_wall = progress > -STEP / 4, x > WALL
    to_x = np.where(past_wall, goal_x, np.where(past_disc, WALL + STEP, disc_x - beside * way_y)) - x
    to_y = np.where(past_wall, goal_y, np.where(past_disc, gap, disc_y + beside * way_x)) - y
    scale = 1 / np.maximum(_norm(to_x, to_y), STEP)
    return np.stack([to_x * scale, to_y * scale], axis=1).astype(np.float32)


def expert(scene: Scenes) -> Policy:
    """The expert as a policy for these scenes: one action at a time."""
    return lambda obs: expert_actions(obs["state"][:, -1], scene.side_B)[:, None]


def rollout(policy: Policy, seeds: npt.ArrayLike, *, observations: int = 1, pictures: bool = False) -> Outcome:
    """Run a policy in the scenes of these seeds; before the first step, the first observation repeats.

    Args:
        observations: To, how many of the latest observations the policy sees.
        pictures: show it `picture` beside `state`.
    """
    scene = scenes(seeds)
    position_B2 = scene.start_B2
    history = [_observe(scene, position_B2, pictures)] * observations
    steps_B, touched_B = np.full(len(position_B2), MOST_STEPS), np.zeros(len(position_B2), bool)
    done_B = reached(scene, position_B2)
    path = [position_B2]
    number = 0
    while number < MOST_STEPS and not done_B.all():
        actions_BT2 = policy({name: np.stack([seen[name] for seen in history], axis=1) for name in history[0]})
        for action_B2 in np.moveaxis(np.asarray(actions_BT2), 1, 0)[: MOST_STEPS - number]:
            number += 1
            moved_B2, stopped_B = move(scene, position_B2, action_B2)
            position_B2 = np.where(done_B[:, None], position_B2, moved_B2)
            touched_B |= stopped_B & ~done_B
            path.append(position_B2)
            arrived_B = reached(scene, position_B2) & ~done_B
            steps_B[arrived_B] = number
            done_B |= arrived_B
            history = [*history[1:], _observe(scene, position_B2, pictures)]
    path += [position_B2] * (MOST_STEPS + 1 - len(path))
    return Outcome(reached_B=done_B, touched_B=touched_B, steps_B=steps_B, path_BT2=np.stack(path, axis=1))


def demonstrations(seeds: Sequence[int] | np.ndarray, *, pictures: bool = False) -> Iterator[records.Episode]:
    """The expert's episodes in the scenes of these seeds, up to the goal, in their order."""
    for first in range(0, len(seeds), _BATCH):
        scene = scenes(seeds[first : first + _BATCH])
        position_B2, seen, actions, arrived = scene.start_B2, [], [], []
        for _ in range(MOST_STEPS):
            seen.append(_observe(scene, position_B2, pictures))
            actions.append(expert_actions(seen[-1]["state"], scene.side_B))
            position_B2 = step(scene, position_B2, actions[-1])
            arrived.append(reached(scene, position_B2))
        arrived_BT = np.stack(arrived, axis=1)
        actions_BT2 = np.stack(actions, axis=1)
        obs_BT = {name: np.stack([one[name] for one in seen], axis=1) for name in seen[0]}
        for row, arrived_T in enumerate(arrived_BT):
            steps = int(arrived_T.argmax()) + 1 if arrived_T.any() else MOST_STEPS
            yield records.Episode(
                actions_TA=actions_BT2[row, :steps],
                obs={name: values[row, :steps] for name, values in obs_BT.items()},
                meta={
                    "source": f"gate/{int(seeds[first + row])}",
                    "side": int(scene.side_B[row]),
                    "reached": bool(arrived_T.any()),
                },
            )


def episodes(n: int, seed: int, *, first: int = 0, pictures: bool = False) -> Iterator[shards.Sample]:
    """The expert's episodes `first` ... `first + n - 1` of a seed, to be written."""
    seeds = mixed(seed, np.arange(first, first + n))
    for number, episode in enumerate(demonstrations(seeds, pictures=pictures), start=first):
        yield records.episode_sample(f"{number:09d}", episode.actions_TA, episode.obs, episode.meta)


def _observe(scene: Scenes, position_B2: np.ndarray, pictures: bool) -> dict[str, np.ndarray]:
    seen = {"state": state(scene, position_B2)}
    return seen | {"picture": picture(scene, position_B2)} if pictures else seen


def _norm(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """sqrt(x^2 + y^2): unlike `hypot`, rounded alike in every batch."""
    return np.sqrt(x * x + y * y)
