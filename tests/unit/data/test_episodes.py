"""Episodes: records are checked, windows stand where the paper's indices say, and positions and ranges are closed forms."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from latentray.data import episodes, members, shards
from latentray.data.episodes import Episode, Horizon, Range, WindowSet
from latentray.errors import ConfigError, DataError, SampleRejected


def episode(steps: int) -> Episode:
    """Step t is seen as 100 + t, and action t is (t, -t)."""
    t = np.arange(steps, dtype=np.float32)
    return Episode(actions_TA=np.stack([t, -t], axis=1), obs={"state": 100 + t[:, None]}, meta={})


def tensors(**changes) -> dict[str, torch.Tensor]:
    whole = {
        "actions": torch.arange(10.0).reshape(5, 2),
        "obs.state": torch.ones(5, 3),
        "obs.picture": torch.zeros(5, 8, 8, 3, dtype=torch.uint8),
    }
    return {name: value for name, value in (whole | changes).items() if value is not None}


def sample(**changes) -> dict:
    return {"__key__": "a", "__url__": "x.tar", "episode.safetensors": tensors(**changes), "json": {"task": "reach"}}


def test_an_episode_is_read_as_it_was_written():
    given_ = tensors()
    obs = {"state": given_["obs.state"].numpy(), "picture": given_["obs.picture"].numpy()}
    written = episodes.episode_sample("e/1", given_["actions"].numpy(), obs, {"task": "reach"})
    assert written.key == "e/1"
    assert written.columns["steps"] == 5 and len(written.columns["sha256"]) == 32
    read = episodes.read_episode(members.decode_sample({"__key__": "e/1", "__url__": "x.tar", **written.members}))
    np.testing.assert_array_equal(read.actions_TA, given_["actions"])
    assert set(read.obs) == {"state", "picture"}
    np.testing.assert_array_equal(read.obs["picture"], obs["picture"])
    assert read.meta["task"] == "reach" and read.meta["sha256"] == written.columns["sha256"].hex()
    assert read.steps == 5


def test_the_columns_leave_the_index_its_own_names(tmp_path):
    written = episodes.episode_sample("a", np.zeros((4, 2), np.float32), {})
    table = shards.write_shard([written], tmp_path / "0.tar").table
    assert table["steps"].to_pylist() == [4]
    assert table["length"][0].as_py() > 1024  # bytes, not steps


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"actions": None}, "tensors"),
        ({"rewards": torch.ones(5)}, "tensors"),
        ({"actions": torch.ones(5, 2, dtype=torch.float64)}, "dtype"),
        ({"actions": torch.ones(5, 2, dtype=torch.bfloat16)}, "dtype"),
        ({"obs.state": torch.ones(5, 3, dtype=torch.int64)}, "dtype"),
        ({"actions": torch.ones(5)}, "shape"),
        ({"actions": torch.ones(0, 2), "obs.state": None, "obs.picture": None}, "shape"),
        ({"obs.state": torch.ones(4, 3)}, "length"),
        ({"obs.state": torch.tensor(1.0)}, "length"),
        ({"obs.state": torch.full((5, 3), float("nan"))}, "not_finite"),
        ({"actions": torch.full((5, 2), float("inf"))}, "not_finite"),
    ],
)
def test_what_is_wrong_with_a_record_is_its_reason(changes, reason):
    with pytest.raises(SampleRejected) as caught:
        episodes.read_episode(sample(**changes))
    assert caught.value.reason == reason
    assert "x.tar" in str(caught.value)


def test_the_step_that_is_not_finite_is_named_and_never_written():
    actions = np.zeros((6, 2), np.float32)
    actions[4, 1] = np.nan
    with pytest.raises(SampleRejected, match="step 4"):
        episodes.episode_sample("a", actions, {})


def test_a_sample_without_an_episode_is_an_error_of_the_data_set():
    with pytest.raises(DataError, match="no episode"):
        episodes.read_episode({"__key__": "a", "__url__": "x.tar", "jpg": None})


def test_a_window_is_observations_up_to_t_and_actions_from_t():
    found = episodes.window(episode(10), 4, Horizon(observations=3, actions=4))
    assert found.obs["state"][:, 0].tolist() == [102, 103, 104]
    assert found.actions.tolist() == [[4, -4], [5, -5], [6, -6], [7, -7]]
    assert found.observation_mask.all() and found.action_mask.all()
    assert found.start == 4


def test_ends_repeat_and_are_masked():
    first = episodes.window(episode(10), 1, Horizon(observations=4, actions=2))
    assert first.obs["state"][:, 0].tolist() == [100, 100, 100, 101]
    assert first.observation_mask.tolist() == [False, False, True, True]
    last = episodes.window(episode(10), 8, Horizon(observations=1, actions=4))
    assert last.actions[:, 0].tolist() == [8, 9, 9, 9]
    assert last.action_mask.tolist() == [True, True, False, False]


def test_an_episode_shorter_than_both_horizons_still_has_a_window_for_each_step():
    horizon = Horizon(observations=5, actions=8)
    assert WindowSet([2], horizon).count == 2
    found = episodes.window(episode(2), 0, horizon)
    assert found.obs["state"][:, 0].tolist() == [100] * 5
    assert found.actions[:, 0].tolist() == [0, 1, 1, 1, 1, 1, 1, 1]


horizons = st.builds(
    lambda to, tp, before, after: Horizon(
        observations=to,
        actions=tp,
        pad_before=None if before is None else min(before, to - 1),
        pad_after=None if after is None else min(after, tp - 1),
    ),
    st.integers(1, 6),
    st.integers(1, 9),
    st.none() | st.integers(0, 5),
    st.none() | st.integers(0, 8),
)


@settings(max_examples=100, deadline=None)
@given(steps=st.lists(st.integers(1, 30), min_size=1, max_size=12), horizon=horizons)
def test_positions_are_exactly_the_windows_that_padding_allows(steps, horizon):
    windows = WindowSet(steps, horizon)
    found = list(zip(*(part.tolist() for part in windows.locate(np.arange(windows.count))), strict=True))
    before = horizon.observations - 1 if horizon.pad_before is None else horizon.pad_before
    after = horizon.actions - 1 if horizon.pad_after is None else horizon.pad_after
    expected = [
        (number, t)
        for number, length in enumerate(steps)
        for t in range(length)
        if t - horizon.observations + 1 >= -before and t + horizon.actions - 1 <= length - 1 + after
    ]
    assert found == expected
    if found:
        np.testing.assert_array_equal(windows.position(*zip(*found, strict=True)), np.arange(windows.count))
    for number, t in found[:20]:
        one = episodes.window(episode(steps[number]), t, horizon)
        assert (~one.observation_mask).sum() <= before and (~one.action_mask).sum() <= after


def test_the_count_with_the_paper_s_padding_is_that_of_its_sampler():
    """Chi et al.'s `create_indices`: T - horizon + pad_after + pad_before + 1, where their horizon covers both ours."""
    to, tp, ta = 2, 15, 8
    horizon = Horizon(observations=to, actions=tp, pad_before=to - 1, pad_after=ta - 1)
    theirs = 50 - (to - 1 + tp) + (ta - 1) + (to - 1) + 1
    assert WindowSet([50], horizon).count == theirs


def test_a_hundred_million_windows_are_found_in_no_time():
    windows = WindowSet(np.full(1_000_000, 100), Horizon(observations=2, actions=16))
    assert windows.count == 100_000_000
    found, start = windows.locate([0, 99, 100, 99_999_999])
    assert found.tolist() == [0, 0, 1, 999_999]
    assert start.tolist() == [0, 99, 0, 99]


@pytest.mark.parametrize(
    "settings_",
    [{"observations": 0}, {"actions": 0}, {"pad_before": 2}, {"pad_after": 4}, {"pad_before": -1}],
)
def test_impossible_horizons_are_refused(settings_):
    with pytest.raises(ConfigError):
        Horizon(**({"observations": 2, "actions": 4} | settings_))


floats = st.floats(-1e6, 1e6, width=32)


@settings(max_examples=60, deadline=None)
@given(data=st.lists(st.tuples(floats, floats), min_size=2, max_size=30), at=st.integers(1, 29))
def test_ranges_of_parts_merge_into_the_range_of_the_whole_exactly(data, at):
    values = np.array(data, np.float32)
    at = min(at, len(values) - 1)
    parts = Range.of(values[:at]), Range.of(values[at:])
    for merged in (parts[0].merged(parts[1]), parts[1].merged(parts[0])):
        np.testing.assert_array_equal(merged.low, values.min(axis=0))
        np.testing.assert_array_equal(merged.high, values.max(axis=0))


@settings(max_examples=60, deadline=None)
@given(data=st.lists(st.tuples(floats, floats), min_size=2, max_size=30))
def test_values_map_onto_minus_one_to_one_and_back(data):
    values = np.array(data, np.float32)
    own = Range.of(values)
    mapped = own.normalised(values)
    assert mapped.dtype == np.float32
    assert (np.abs(mapped) <= 1).all()
    for d in range(2):
        if own.high[d] - own.low[d] > 1e-3 * np.abs(values[:, d]).max():
            assert mapped[:, d].min() == -1 and mapped[:, d].max() == 1
    scale = np.maximum(np.abs(values).max(axis=0), 1)
    np.testing.assert_allclose(own.restored(mapped) / scale, values / scale, atol=3e-7)


def test_a_constant_dimension_becomes_zero_and_comes_back():
    values = np.array([[3.0, 1.0], [3.0, 2.0]], np.float32)
    own = Range.of(values)
    assert own.normalised(values).tolist() == [[0, -1], [0, 1]]
    np.testing.assert_array_equal(own.restored(own.normalised(values)), values)
    noisy = np.array([[1000.0], [np.nextafter(np.float32(1000), np.float32(2000))]])
    assert np.abs(Range.of(noisy).normalised(noisy)).max() < 1e-3


def test_ranges_of_a_data_set_are_of_actions_and_vectors_in_any_order():
    a, b = episode(4), episode(9)
    a.obs["picture"] = b.obs["picture"] = np.zeros((1, 8, 8, 3), np.uint8)
    found = episodes.ranges([a, b])
    assert set(found) == {"actions", "obs.state"}
    assert found["actions"].high.tolist() == [8, 0] and found["actions"].low.tolist() == [0, -8]
    assert found["obs.state"].high.tolist() == [108]
    other = episodes.ranges([b, a])
    assert {name: one.to_json() for name, one in found.items()} == {name: one.to_json() for name, one in other.items()}


def test_a_range_survives_json_bit_for_bit():
    own = Range.of(np.random.default_rng(0).normal(size=(7, 3)).astype(np.float32))
    again = Range.from_json(json.loads(json.dumps(own.to_json())))
    assert (again.low == own.low).all() and (again.high == own.high).all() and again.low.dtype == np.float32


def test_episodes_that_differ_in_kind_have_no_common_range():
    other = Episode(actions_TA=np.zeros((3, 5), np.float32), obs={}, meta={})
    with pytest.raises(DataError, match="Episode 1"):
        episodes.ranges([episode(3), other])
    with pytest.raises(DataError, match="no episodes"):
        episodes.ranges([])
