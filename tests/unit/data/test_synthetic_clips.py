"""Moving shapes: the caption is true, the motion is the closed form, and clip i is always the same clip."""

import collections
import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latentray.data import synthetic, synthetic_clips
from latentray.data.synthetic_clips import DIRECTIONS, FRAMES, Moving


def measured(count: int, split: str = "train", seed: int = 0):
    for index in range(count):
        moving = synthetic_clips.moving_of(split, index)
        clip = synthetic_clips.draw(moving, seed, index, split=split)
        yield moving, clip, synthetic_clips.motion_of(clip)


def test_the_direction_in_the_caption_is_the_one_that_is_measured():
    found = [motion.direction == moving.direction for moving, _, motion in measured(216, "validation")]
    assert np.mean(found) >= 0.99


@pytest.mark.parametrize("split", ["train", "validation"])
def test_kinds_and_directions_are_balanced(split):
    n = len(synthetic.SPLITS[split].kinds) * len(DIRECTIONS)
    counts = collections.Counter(synthetic_clips.moving_of(split, i) for i in range(2 * n))
    assert set(counts.values()) == {2}
    assert len(counts) == n
    directions = collections.Counter(synthetic_clips.moving_of(split, i).direction for i in range(40))
    assert set(directions.values()) == {10}


def test_caption():
    kind = synthetic.Kind(color="red", shape="circle", background="white")
    moving = Moving(kind=kind, direction="right")
    assert synthetic_clips.caption(moving) == "a red circle on a white background moving right"


@settings(max_examples=50, deadline=None)
@given(start=st.floats(0, 30), velocity=st.floats(-3, 3), frames=st.integers(1, 60))
def test_the_path_is_that_of_a_ball_between_two_walls(start, velocity, frames):
    room = 30.0
    place, speed, walked = start, velocity, []
    for _ in range(frames):
        walked.append(place)
        place += speed
        if not 0 <= place <= room:
            place = -place if place < 0 else 2 * room - place
            speed = -speed
    np.testing.assert_allclose(synthetic_clips.path(start, velocity, room, frames), walked, atol=1e-9)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("shape", synthetic.SHAPES)
@pytest.mark.parametrize("speed", [1.0, 1.7, 3.0])
def test_speed_and_direction_are_measured_to_a_twentieth_of_a_pixel(direction, shape, speed):
    x, y = DIRECTIONS[direction]
    steps = speed * (np.arange(8) - 3.5)
    clip = np.stack([synthetic.SHAPES[shape](22.3 + x * s, 21.6 + y * s, 18.0) for s in steps])[..., None]
    motion = synthetic_clips.motion_of(np.rint(245 + clip * (np.array([50, 80, 220]) - 245)).astype(np.uint8))
    assert motion.direction == direction
    assert motion.speed == pytest.approx(speed, abs=0.05)


def test_speeds_span_their_range_and_shapes_stay_inside():
    speeds = []
    for moving, clip, motion in measured(60):
        assert clip.shape == (FRAMES, 64, 64, 3)
        assert clip.dtype == np.uint8
        speeds.append(motion.speed)
        covered = (clip != synthetic.BACKGROUNDS[moving.kind.background]).any(axis=-1).sum(axis=(1, 2))
        assert covered.max() <= 1.25 * covered.min()  # never cut by the border
    assert 0.95 < min(speeds) < 1.3 and 2.6 < max(speeds) < 3.05


def test_some_clips_bounce_but_none_in_its_first_half():
    bounced = 0
    for moving, clip, _ in measured(60):
        halves = [synthetic_clips.motion_of(part).direction for part in (clip[: FRAMES // 2], clip[FRAMES // 2 :])]
        assert halves[0] == moving.direction
        bounced += halves[1] != moving.direction
    assert bounced > 5


@pytest.mark.parametrize("frames", [2, 5, 33])
def test_other_lengths_keep_the_caption_true(frames):
    for index in range(24):
        moving = synthetic_clips.moving_of("train", index)
        clip = synthetic_clips.draw(moving, 1, index, frames=frames)
        assert len(clip) == frames
        assert synthetic_clips.motion_of(clip).direction == moving.direction


def test_nothing_that_moves_is_still():
    shape = np.rint(15 + synthetic.SHAPES["square"](20.0, 20.0, 16.0)[..., None] * np.array([200, 20, 20]))
    assert synthetic_clips.motion_of(np.stack([shape.astype(np.uint8)] * 6)).direction == "still"
    assert synthetic_clips.motion_of(np.full((6, 64, 64, 3), 128, np.uint8)).direction == "still"


def test_a_clip_is_a_function_of_seed_split_and_index_alone():
    moving = synthetic_clips.moving_of("validation", 5)
    clip = synthetic_clips.draw(moving, 3, 5, split="validation")
    np.testing.assert_array_equal(clip, synthetic_clips.draw(moving, 3, 5, split="validation"))
    for seed, index, split in [(4, 5, "validation"), (3, 6, "validation"), (3, 5, "train")]:
        assert (clip != synthetic_clips.draw(moving, seed, index, split=split)).any()


def test_samples_of_any_part_are_those_of_the_whole():
    whole = list(synthetic_clips.samples("train", seed=1, count=6))
    part = list(synthetic_clips.samples("train", seed=1, first=4, count=2))
    assert part == whole[4:]
    assert [sample.key for sample in part] == ["000000004", "000000005"]
    about = json.loads(part[0].members["json"])
    assert about["captions"] == [synthetic_clips.caption(synthetic_clips.moving_of("train", 4))]
    assert about["fps"] == synthetic_clips.FPS
    assert len({sample.columns["sha256"] for sample in itertools.chain(whole)}) == 6
